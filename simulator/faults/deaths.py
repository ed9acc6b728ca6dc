"""Deaths: of processes, at any call they make, and of machines, with what their disks had not got."""

from __future__ import annotations

import asyncio
import random
import shutil
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from simulator.stage import Stage
    from simulator.world.processes import Process

#: A process that is to die within its calls, and makes none, dies after so long.
_PATIENCE_SECONDS: Final = 3.0


async def kill(stage: Stage, process: Process | None, draw: random.Random) -> None:
    """SIGKILL, at once or at one of the next calls."""
    if process is None or not process.alive:
        return
    if draw.random() < 0.3:
        stage.world.kill(process)
        return
    process.dies_behind = draw.random() < 0.5
    process.dies_in = draw.choice((1, 2, 3, draw.randint(1, 30), draw.randint(1, 150)))
    await asyncio.sleep(_PATIENCE_SECONDS)
    if process.alive:
        stage.world.kill(process)


async def agent_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """SIGKILL to the agent, in the middle of whatever it does.

    Nothing that was acknowledged is lost, order is kept: no gap begins because of it.
    """
    await kill(stage, stage.agent_process, draw)


async def agent_stopped(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The agent is asked to stop, and started again.

    The same, and the machine may even restart afterwards without a gap.
    """
    stage.stop_agent()


async def server_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """SIGKILL to a process server.

    It takes up its cache and the log's end; agents go on where it says.
    """
    await kill(stage, stage.server_process(draw.choice(stage.servers_by_name)), draw)


async def server_stopped(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A process server is asked to stop, and started again; it stores what it can and keeps the rest."""
    stage.stop_server(draw.choice(stage.servers_by_name))


async def application_killed(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Whoever writes to the disks dies with requests half sent.

    What was not acknowledged may be there or not; the agent stands for its other clients.
    """
    stage.kill_application()


async def machine_power(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The protected machine loses its power: of what was not synced, anything may be there.

    What was flushed is on its disk. What the replica then gets is the disk as it is now, behind a gap; the points from
    before stand.
    """
    await stage.lose_power(stage.machine, seconds)


async def server_power(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A process server's machine loses its power, its cache may be torn anywhere behind the last sync.

    What it said was received may be gone; what it said was stored is stored.
    """
    await stage.lose_power(draw.choice(stage.servers_by_name), seconds)


async def server_disk_lost(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A process server dies and comes back with an empty disk, but for its identity.

    Agents still hold everything that is not stored.
    """
    name = draw.choice(stage.servers_by_name)
    process = stage.server_process(name)
    if process is None or not process.alive:
        return
    stage.world.kill(process)
    state = stage.world.machines[name].directory / "state"
    for found in ("cache", "assignments.json", "status.json", "port", "container.json"):
        path = state / found
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
