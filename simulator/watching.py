"""Watching a story while it is told: what must hold at every moment is looked at every so often."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from simulator.stage import Stage

#: Virtual seconds between two looks.
LOOK_SECONDS: Final = 0.5


async def watch(stage: Stage) -> None:
    """Look for ever: order, bounds, and who is ahead of whom."""
    stored, seen = 0, None
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if stage.upkeep is not None:
            await stage.upkeep.look()
        core = stage.core
        if core is not seen:  # an agent that starts again begins with what its log begins with
            stored, seen = 0, core
        if core is None:
            continue
        log = core.log
        if log.stored_sequence < stored and log.stored_sequence:
            stage.violated(f"what is stored goes back from {stored} to {log.stored_sequence}")
        stored = log.stored_sequence
        if log.stored_sequence >= log.next_sequence:
            stage.violated(f"stored is {log.stored_sequence}, and only {log.next_sequence - 1} was captured")
        if log.used_bytes > log.limit_bytes + 2 * stage.story.agent.journal_files * (4 << 20):
            stage.violated(f"the change log holds {log.used_bytes} bytes, its limit is {log.limit_bytes}")
