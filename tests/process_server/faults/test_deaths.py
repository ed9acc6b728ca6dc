"""A process server that dies at seeded instants, over storage in trouble: nothing is lost, doubled or written by two.

Each seed is a story of `DEATHS` deaths of the real command, under traffic that never stops: SIGKILL by the clock (also
while it starts) or between two steps of its own disk, a power cut that forgets what was not flushed, the loss of its
disk, a 412 that means nothing, a second server that takes the machine over while the first one lives. Storage is a real
Azurite behind `rough_storage`. What is checked:

    nothing acknowledged is missing        the log, read to its end, is byte for byte what the machine wrote; the agent
                                           has forgotten what was stored, so nobody else could bring it back
    nothing is stored twice, differently   by `page_record`, which sees every page that the service took
    no fenced writer's byte in the log     by the same

`make soak` runs 200 deaths, every test run one seed of them. A failure names its seed; the weather and the deaths are
drawn from it, the machine's own speed is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from process_server.cache import SLOT_BYTES
from simulator.azurite import Azurite
from tests.process_server.faults import power
from tests.process_server.faults.rough_storage import Fault, RoughStorage
from tests.process_server.processes import Server, World, world

DEATHS = 8
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 26))]
STORY_SECONDS = 280
#: Frames that the machine holds and storage does not, beyond which it writes no more for now.
MOST_PENDING = 60
#: The steps of its disk among which a server that kills itself does so, if it comes that far in time.
MOST_STEPS = 250
LONGEST_LIFE_SECONDS = 4.0
#: What an agent may be told while its server dies, is taken over, or has lost its lease. A ConflictError means loss.
FINE = {"TransientError", "FencedError"}


@dataclass
class Story:
    """A world, its weather, and the seed's choices."""

    here: World
    storage: RoughStorage
    draw: Random
    directory: Path
    servers: list[Server] = field(default_factory=list)
    lost: int = 0
    told: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        weather = {fault.name: count for fault, count in self.storage.seen.items()}
        record = self.storage.record
        return (
            f"{', '.join(self.told)}; {self.lost} bytes forgotten by power cuts; requests {weather}; "
            f"{self.storage.landed} landed late, {self.storage.refused} too late; "
            f"{record.ranges} ranges written, {record.repeats} of them again with the same bytes"
        )

    @property
    def server(self) -> Server:
        return self.here.server

    @server.setter
    def server(self, server: Server) -> None:
        self.here.server = server
        self.servers.append(server)

    def journal(self, server: Server) -> Path:
        return server.directory.with_suffix(".journal")

    async def launch(self, server: Server, step: int = 0) -> None:
        """Start it over a layer that forgets; it kills itself at a step, if one is given."""
        layer: list[str | Path] = [
            sys.executable,
            "-m",
            "tests.process_server.faults.power",
            self.journal(server),
            str(step),
        ]
        server.command = layer
        await server.launch()

    async def write(self) -> None:
        """What the machine does meanwhile: bursts of all sizes, as far as its log goes."""
        agent = self.here.agent
        while True:
            if len(agent.frames) < MOST_PENDING:
                agent.fill(self.draw.randint(1, 12), size=self.draw.choice((2_000, 40_000, 300_000)))
            await asyncio.sleep(self.draw.uniform(0, 0.2))

    async def send(self) -> None:
        """What the machine's agent does, for ever, whichever server there is."""
        agent = self.here.agent
        while True:
            with contextlib.suppress(OSError, ValueError):
                agent.port = self.server.port
                await agent.converse()
            await asyncio.sleep(0.05)

    async def stored(self, server: Server, more: int, *, seconds: float = 30.0) -> None:
        """Wait until so many more sequences are stored, or the server is dead already, but not for ever: of two that
        fight for the machine, the one that the agent knows may be the one that lost."""
        agent = self.here.agent
        wanted = agent.stored + more
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while agent.stored < wanted and self.alive(server):
                    await asyncio.sleep(0.01)

    @staticmethod
    def alive(server: Server) -> bool:
        return server.process is not None and server.process.poll() is None

    async def live_and_die(self) -> None:
        """One life: from a start to whatever ends it, and what that takes along."""
        server, step = self.server, self.draw.choice((0, self.draw.randrange(1, MOST_STEPS)))
        late, first = self.draw.choice((Fault.LATE, Fault.NONE)), not self.told
        self.storage.due.append(Fault.LATE if first else late)
        await self.launch(server, 0 if first else step)
        if first:
            await self.stored(server, 60)
        elif step:
            await self.stored(server, 1)
            await self.stored(server, 1 << 40, seconds=LONGEST_LIFE_SECONDS)  # it dies first, or has lived long enough
        elif self.draw.random() < 0.8:  # else it dies while it starts, or soon after
            await self.stored(server, self.draw.randrange(1, 60))
        await asyncio.sleep(self.draw.uniform(0, 0.8))
        how = self.draw.choice(("kill", "power", "power", "disk", "lease", "taken over"))
        self.told.append(how)
        if how == "lease":
            self.storage.due.append(Fault.LOST_LEASE)
            await asyncio.sleep(self.draw.uniform(0, 0.6))
        elif how == "taken over":
            await self.take_over()
        server.kill()
        self.storage.due.clear()
        self.check()
        if how in ("power", "taken over"):
            self.lost += power.cut(self.journal(server), self.draw)
        elif how == "disk":
            (server.directory / "cache").unlink(missing_ok=True)
            (server.directory / "status.json").unlink(missing_ok=True)

    async def take_over(self) -> None:
        """Another server with the same assignment, on another disk, while the first one goes on writing."""
        older = self.server
        newer = Server(self.directory / f"ps{len(self.servers)}", older.storage, older.extra)
        shutil.copytree(older.directory, newer.directory, ignore=shutil.ignore_patterns("cache", "port", ".*"))
        await self.launch(newer)
        await asyncio.sleep(self.draw.uniform(0, 2))
        self.server = newer
        await self.stored(newer, self.draw.randrange(1, 20), seconds=10.0)
        newer.kill()

    def check(self) -> None:
        assert not self.storage.record.faults, self.storage.record.faults
        assert {each.error for each in self.here.agent.refusals} <= FINE, self.here.agent.refusals


@pytest.mark.timeout(STORY_SECONDS + 20)
@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_dies_whenever_nothing_is_lost_doubled_or_written_by_two(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path, seed: int
) -> None:
    draw = Random(seed)
    async with RoughStorage(azurite, tmp_path / "rough", draw) as storage:
        through = {"endpoint": storage.endpoint, "authority_file": str(storage.authority_file)}
        async with world(azurite, container_name, key_file, tmp_path, through=through, seconds=STORY_SECONDS) as here:
            story = Story(here, storage, draw, tmp_path, [here.server])
            agent = here.agent
            agent.begin()
            await here.run_agent(agent.fill(2))
            here.server.extra = {"cache_bytes": 8 * SLOT_BYTES, "buffers_bytes": 8 << 20}
            here.server.kill()
            storage.calm = False
            tasks = [asyncio.create_task(story.write()), asyncio.create_task(story.send())]
            try:
                for _ in range(DEATHS):
                    await story.live_and_die()
                storage.calm = True
                tasks[0].cancel()
                here.server.command = [sys.executable, "-m", "process_server.cli"]
                await here.server.start()
                while agent.stored < agent.next_sequence - 1:
                    story.check()
                    await asyncio.sleep(0.05)
                await storage.settled()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for server in story.servers:
                    server.kill()
                print(f"seed {seed}: {story}")
            story.check()
            assert await here.stored() == agent.everything
            assert storage.seen[Fault.LATE]
            assert storage.record.ranges
