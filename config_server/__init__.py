"""The config server: the vault's registry, certificate authority and HTTPS API.

`vault` is the directory that everything lives in, `authority` issues certificates, `enrolment` holds the rules for
letting a part in, `registry` (with `parties`, `machines`, `points`) is the SQLite database, `bells` wakes long polls,
`api` (with `part_routes`, `operator_routes`) the HTTP side, `service` runs it all, `cli` is `config-server`.
"""
