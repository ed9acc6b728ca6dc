"""Faults of a second machine, and of what points of both machines go through. Only stories with a group have them."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from simulator.faults.deaths import kill
from simulator.world.cast import CONFIG_SERVER, MACHINES

if TYPE_CHECKING:
    from simulator.stage import Stage


async def neighbour_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """SIGKILL to the second machine's agent.

    Whoever it held is let go with it; a group that it was part of is none, or it has its mark.
    """
    if stage.neighbour is not None and stage.neighbour.agent is not None:
        await kill(stage, stage.neighbour.agent.process, draw)


async def group_slow(stage: Stage, draw: random.Random, seconds: float) -> None:
    """One machine's way to the config server is long: it hears verdicts long after the other.

    Writers wait meanwhile, or the group is none: the point stays one instant.
    """
    name = draw.choice(MACHINES)
    delay = draw.choice((0.1, 0.4, 1.0))
    for source, target in ((name, CONFIG_SERVER), (CONFIG_SERVER, name)):
        stage.world.network.way(source, target).delay_seconds = delay
    await asyncio.sleep(seconds)
    stage.world.reopen(name, CONFIG_SERVER)


async def group_cut_off(stage: Stage, draw: random.Random, seconds: float) -> None:
    """One direction between a machine and the config server is shut, in the middle of whatever they were saying.

    A machine lets its writers go by its own clock; what was not said to be kept is not taken for kept.
    """
    ends = [draw.choice(MACHINES), CONFIG_SERVER]
    draw.shuffle(ends)
    stage.world.network.shut(*ends)
    await asyncio.sleep(seconds)
    stage.world.network.reopen(*ends)
