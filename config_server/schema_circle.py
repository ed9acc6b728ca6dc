"""The registry's tables of the operator's circle: lives, jobs, drills, recovery workers, policies, alerts, upkeep."""

from __future__ import annotations

from typing import Final

#: Each a statement; new registries have them from the beginning, older ones get them by a step.
TABLES: Final = (
    # a machine's stored state (see `lifecycle`), since when; when it last left plain replication; and, while a job
    # holds its stream, the process server that it was taken from
    "CREATE TABLE lives ("
    " machine_id TEXT PRIMARY KEY REFERENCES machines (id), state TEXT NOT NULL, since_ns INTEGER NOT NULL,"
    " left_ns INTEGER, held INTEGER NOT NULL DEFAULT 0, held_server_id TEXT) STRICT",
    # a job (JSON), and what it is found by: `due_ns` is when a worker may claim it (the end of a lease, or of a pause)
    "CREATE TABLE jobs ("
    " number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, machine_id TEXT NOT NULL REFERENCES machines (id),"
    " kind TEXT NOT NULL, state TEXT NOT NULL, job TEXT NOT NULL, state_before TEXT NOT NULL,"
    " worker_id TEXT, due_ns INTEGER NOT NULL, ended_ns INTEGER) STRICT",
    "CREATE INDEX jobs_of ON jobs (machine_id, number)",
    "CREATE INDEX jobs_going ON jobs (machine_id) WHERE ended_ns IS NULL",
    # drills that count (JSON)
    "CREATE TABLE drills ("
    " job_id TEXT PRIMARY KEY, machine_id TEXT NOT NULL REFERENCES machines (id), ended_ns INTEGER NOT NULL,"
    " drill TEXT NOT NULL) STRICT",
    "CREATE INDEX drills_of ON drills (machine_id, ended_ns)",
    # recovery workers: when they last asked for work or reported, and what kinds they do (JSON)
    "CREATE TABLE recovery_workers ("
    " party_id TEXT NOT NULL, instance TEXT NOT NULL, heartbeat_ns INTEGER NOT NULL, kinds TEXT NOT NULL,"
    " PRIMARY KEY (party_id, instance)) STRICT, WITHOUT ROWID",
)
#: Policies, target settings and alerts, which came a step later.
ARRANGEMENTS: Final = (
    # every version of a policy (JSON) that is kept
    "CREATE TABLE policies ("
    " name TEXT NOT NULL, version INTEGER NOT NULL, policy TEXT NOT NULL, changed_ns INTEGER NOT NULL,"
    " PRIMARY KEY (name, version)) STRICT, WITHOUT ROWID",
    # a machine's policy by name, and what it is to be made of (JSON)
    "CREATE TABLE arrangements ("
    " machine_id TEXT PRIMARY KEY REFERENCES machines (id), policy TEXT, target TEXT) STRICT",
    # what operators should know of machines; cleared when it is over
    "CREATE TABLE alerts ("
    " number INTEGER PRIMARY KEY, machine_id TEXT NOT NULL REFERENCES machines (id), code TEXT NOT NULL,"
    " message TEXT NOT NULL, hint TEXT NOT NULL, raised_ns INTEGER NOT NULL, cleared_ns INTEGER) STRICT",
    "CREATE UNIQUE INDEX alerts_lasting ON alerts (machine_id, code) WHERE cleared_ns IS NULL",
)
#: Tokens, a step later again.
TOKENS: Final = (
    # bearer tokens: the hash of each one's secret, its role, and until when it is good
    "CREATE TABLE tokens ("
    " id TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, digest BLOB NOT NULL, created_by TEXT NOT NULL,"
    " created_ns INTEGER NOT NULL, expires_ns INTEGER NOT NULL, revoked_ns INTEGER) STRICT",
)
#: Upkeep, which came last.
UPKEEP: Final = (
    # by machine and kind: the worker that has it, when it is due (or its lease ends), when it last was done
    "CREATE TABLE upkeep ("
    " machine_id TEXT NOT NULL REFERENCES machines (id), kind TEXT NOT NULL, owner TEXT NOT NULL,"
    " due_ns INTEGER NOT NULL, done_ns INTEGER NOT NULL, failures INTEGER NOT NULL DEFAULT 0,"
    " PRIMARY KEY (machine_id, kind)) STRICT, WITHOUT ROWID",
    # what retention has left of a machine's past (JSON)
    "CREATE TABLE retentions (machine_id TEXT PRIMARY KEY REFERENCES machines (id), retention TEXT NOT NULL) STRICT",
)
#: What was protected before there were lives goes on as it is.
TAKE_OVER: Final = (
    "INSERT INTO lives (machine_id, state, since_ns)"
    " SELECT id, 'protected', 0 FROM machines WHERE process_server_id IS NOT NULL"
)
