"""`replicar`: the operator's command. One sub-command per thing an operator wants; each is a thin use of other rooms.

app       the sub-commands' place, and the entry point `main`
settings  where the operator's identity and the storage account are
console   how results, progress and errors are told, to people and to machines
access    a machine's log and what opens it, from the config server or from the vault's key
overview  how a vault, its machines and their points look on a terminal
vault     `status`, `machines`, `protect`, `points`, `tag`
protection  `move`, `remove`
keys      `rotate-key`, `rewrap`
recover   `recover`
verify    `verify`
circle    `drill`, `cleanup`, `failover`, `commit`, `cancel`, `failback`, `reprotect`, `disable`
jobs      `jobs`: list, show, follow, cancel, drills
arrangements  `policy`, `target`, `alerts`
following, watched  how a job is followed to its end
"""

from replicar.cli.app import app, main

__all__ = ["app", "main"]
