"""Faults of whoever folds the log: recovery worker, and an operator by hand. Only stories with upkeep have them."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from simulator.faults.deaths import kill
from simulator.world.blobs import STORAGE
from simulator.world.cast import WORKER

if TYPE_CHECKING:
    from simulator.stage import Stage


async def folder_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """SIGKILL to somebody who folds the log, before or behind any of their requests to storage.

    Nothing that a kept point needs is touched, whatever was half done: what was decided is in force or is not, and the
    next round makes good the rest.
    """
    alive = stage.upkeep.folders() if stage.upkeep is not None else []
    if alive:
        await kill(stage, draw.choice(alive), draw)


async def folder_cut_off(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Whoever folds does not reach storage for a while, in the middle of whatever they do, and then goes on.

    Another one may have taken them for dead and have folded meanwhile; what the late one still does harms nothing.
    """
    if stage.upkeep is None:
        return
    stage.world.shut(WORKER, STORAGE)
    await asyncio.sleep(seconds)
    stage.world.reopen(WORKER, STORAGE)


async def reader_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """SIGKILL to somebody who reads a point that they have pinned.

    What they had pinned stays until the pin ends by itself; nobody is held up but the sweep of that state.
    """
    await kill(stage, stage.upkeep.reader() if stage.upkeep is not None else None, draw)
