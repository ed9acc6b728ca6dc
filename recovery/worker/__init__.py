"""The recovery worker: carries out jobs that the config server keeps, by docs/jobs.md.

cli, settings    the command `recovery-worker`, and what it needs to know
service          claims jobs, one after another
desk, rounds     one job in hand: its lease, its steps, what is found; carrying the steps out
logs             the machine's log and its keys, a view of a point
hands, made      what makes and removes machines (on this host), and what they are called
azure_hands      the same in Azure
keeper, exporter a process that serves a point's disks for as long as a machine runs from them
upkeep           what is done by the clock: folding
outward          the steps of drills and failovers
homeward         the steps of failback and re-protection
"""
