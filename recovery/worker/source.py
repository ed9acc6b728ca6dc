"""Shutting the source down before a failover: a best effort, and never what a failover fails by.

Who can do that depends on what the source is, so it is a program of the operator's on the worker's host
(`shut_down_program` among the job's options): a call to a hypervisor, an `ssh ... poweroff`. Fencing does not depend on
it: a source that goes on writing is refused by storage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from recovery.compute.check import run_check
from replicar.control.messages import Job
from replicar.errors import ReplicarError

DEFAULT_SECONDS: Final = 120.0


async def shut_down_source(job: Job) -> str:
    """What became of it, in words."""
    options = job.parameters.options
    program = options.get("shut_down_program")
    if program is None:
        return "nothing was tried: no shut_down_program was given"
    try:
        seconds = float(options.get("shut_down_seconds", str(DEFAULT_SECONDS)))
        said = await run_check(Path(program), {"REPLICAR_MACHINE": job.machine}, seconds)
    except (ReplicarError, ValueError) as error:
        return f"it was tried and failed: {error}"
    return f"done: {said}" if said else "done"
