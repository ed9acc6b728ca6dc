"""Faults of the control plane, and of clocks."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from simulator.registered import server_of
from simulator.world.cast import CONFIG_SERVER, who

if TYPE_CHECKING:
    from simulator.stage import Stage


async def config_away(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Nobody reaches the config server.

    Replication goes on under the last assignment, also over restarts; marks wait.
    """
    others = [name for name in stage.world.machines if name != CONFIG_SERVER]
    away = others if draw.random() < 0.5 else [draw.choice(others)]
    for name in away:
        stage.world.shut(name, CONFIG_SERVER)
    await asyncio.sleep(seconds)
    for name in away:
        stage.world.reopen(name, CONFIG_SERVER)


async def config_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """SIGKILL to the config server.

    What it answered is in its registry; what it did not answer is asked again.
    """
    process = stage.config_process
    if process is not None and process.alive:
        stage.world.kill(process)


async def takeover(stage: Stage, draw: random.Random, seconds: float) -> None:
    """`replicar move`: the machine is given to the other process server, in a new epoch; the old one may not know of it
    yet. Now and then the operator gives it back at once, or leaves the choice to the config server.

    At most one of them writes: the older is refused by the store itself. Nothing that was stored is missing, and what
    only the older had received comes again from the agent.
    """
    now = server_of(stage.world, stage.machine_id)
    names = [name for name in stage.servers_by_name if who(name).id != now]
    if now is None or not names:
        return
    chance = draw.random()
    stage.move(draw.choice(names) if chance < 0.9 else None)
    if chance < 0.1:
        await asyncio.sleep(draw.uniform(0.1, 2.0))
        stage.move(next(name for name in stage.servers_by_name if who(name).id == now))


async def clock_jumps(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A machine's wall clock is set, forwards or back, by up to a few minutes.

    Times of the stream never fall, and nothing but the times in points depends on them. A config server refuses to
    speak with clocks that are far off, and hears them again when they are right.
    """
    name = draw.choice(list(stage.world.clocks))
    seconds = draw.choice((-200.0, -30.0, -2.0, -0.1, 0.1, 2.0, 30.0, 200.0))
    stage.world.note(f"the clock of {name} jumps by {seconds:g} s")
    stage.world.clocks[name].jump(seconds)
    stage.jumped[name] = stage.jumped.get(name, 0.0) + seconds
