"""`simulator`: how many stories a second the simulation tells, and how many of the planted bugs it finds.

One process, so the figures are for a core. Each story is at least a virtual minute with at least ten faults; telling
it includes judging it, recovery of points and all.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from bench.report import Report
from simulator.planted import PLANTED
from simulator.seeds import Summary, run, tell

DEFAULT_SEEDS: Final = 40
#: Seeds that a planted bug may take to be found.
DEFAULT_TRIES: Final = 12


def measure(*, seeds: int = DEFAULT_SEEDS, tries: int = DEFAULT_TRIES, directory: Path | None = None) -> Report:
    """Tell stories, then plant bugs; a story's files are in memory, whatever `directory` says."""
    next(run([0]))  # what is made once is made
    summary, began = Summary(), time.monotonic()
    for outcome in run(range(seeds)):
        summary.add(outcome)
    summary.seconds = time.monotonic() - began
    found = [name for name in PLANTED if any(tell(seed, bug=name).violations for seed in range(tries))]
    figures = summary.as_dict() | {"planted_found": len(found), "planted": len(PLANTED)}
    faults = tuple(f"seed {seed} breaks a promise: {broken[0]}" for seed, broken in summary.failed.items())
    missed = sorted(PLANTED.keys() - set(found))
    faults += tuple(f"{name} is not found within {tries} seeds" for name in missed)
    return Report("simulator", {"seeds": seeds, "tries": tries}, figures, faults)
