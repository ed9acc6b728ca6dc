"""Jobs: what operators asked for, kept as data until it is reached or failed.

`plan` says which steps each kind has and which kinds exclude each other, `book` keeps jobs in the registry, `opening`
makes them and ends them, `claims` gives them to recovery workers, `own` carries out those that need no worker, and
`points` turns a chosen recovery point down where the registry knows better.
"""
