"""Faults of the ways between machines."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.stage import Stage


def _ends(stage: Stage, draw: random.Random) -> tuple[str, str]:
    return stage.machine, draw.choice(stage.servers_by_name)


async def reset(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Every connection between the machine and a process server breaks.

    What was under way is lost. The agent connects again and goes on where the server says; nothing is missing and
    nothing comes twice.
    """
    here, there = _ends(stage, draw)
    stage.world.network.reset(here, there)


async def cut(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Nothing passes between the two, in neither direction; then what was held up arrives.

    The agent notices by silence, or the connection outlives it. Changes gather in the log meanwhile.
    """
    here, there = _ends(stage, draw)
    stage.world.shut(here, there)
    await asyncio.sleep(seconds)
    stage.world.reopen(here, there)


async def one_way(stage: Stage, draw: random.Random, seconds: float) -> None:
    """One direction only: frames arrive and acknowledgements don't, or the other way round.

    Neither side may conclude more than it heard.
    """
    here, there = _ends(stage, draw)
    if draw.random() < 0.5:
        here, there = there, here
    stage.world.network.shut(here, there)
    await asyncio.sleep(seconds)
    stage.world.network.reopen(here, there)


async def half_open(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The agent's end breaks, the server's does not know; what was under way arrives later, beside the new connection.

    The old connection's frames are repeats, or a lead that the new one does not contradict; the stream stays one.
    """
    here, there = _ends(stage, draw)
    network = stage.world.network
    network.shut(here, there)
    await asyncio.sleep(min(0.5, seconds))
    network.reset(here, there, one_side=True)
    network.reopen(here, there)
    network.way(here, there).delay_seconds = seconds / 4
    await asyncio.sleep(seconds)
    network.reopen(here, there)


async def slow(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The link is thin and far away.

    The agent's log fills instead; the ladder, if it comes to that, says so in the stream.
    """
    here, there = _ends(stage, draw)
    for source, target in ((here, there), (there, here)):
        way = stage.world.network.way(source, target)
        way.delay_seconds, way.bytes_per_second = draw.uniform(0.02, 0.4), draw.choice((20e3, 100e3, 1e6))
    await asyncio.sleep(seconds)
    stage.world.reopen(here, there)
