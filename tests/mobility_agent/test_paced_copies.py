"""Copies with a limit to their rate: what happens while the copying waits is not taken for copied."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from mobility_agent import seeding
from mobility_agent.allocation import asking, volumes
from mobility_agent.seeding import Seeder
from replicar.clock import SystemClock
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import MIB, Core, agent_core, frames_of, replay

DISK_BYTES = 8 * MIB
#: So low that every copy of a region is followed by a wait.
RATE = MIB // 4


class Waits(SystemClock):
    """A clock that does not wait for the rate: it does `then` instead, once, the first time."""

    def __init__(self, then: Callable[[], Awaitable[None]]) -> None:
        self._then: Callable[[], Awaitable[None]] | None = then

    async def sleep(self, seconds: float) -> None:
        if seconds <= seeding.IDLE_SECONDS:
            await super().sleep(seconds)
        elif self._then is not None:
            then, self._then = self._then, None
            await then()


async def copied(core: Core, seeder: Seeder) -> None:
    """Return when nothing is dirty and no gap is open."""
    task = asyncio.create_task(seeder.run())
    async with asyncio.timeout(30):
        while core.ladder.in_gap or not core.ladder.is_clean:
            if task.done():
                task.result()
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    core.log.seal()


def is_equal(core: Core) -> bool:
    return replay(frames_of(core.log), DISK_BYTES) == core.disk.path.read_bytes()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return tmp_path


async def test_a_region_that_is_marked_while_its_copy_is_paced_is_copied_again(disk: Path) -> None:
    async with agent_core(disk, limit_bytes=128 * MIB) as core, await NbdClient.connect(core.socket) as client:
        await copied(core, core.seeder)
        core.ladder.distrust(0, 3 * MIB, 512)
        core.ladder.declare()

        async def write() -> None:
            core.log.seal()
            core.log.ordered, core.ladder._overflowed = False, True  # the log is full, and so is the row of extents
            await client.write(3 * MIB + 65536, b"z" * 4096)

        await copied(core, Seeder(core.ladder, Waits(write), bytes_per_second=RATE))
        assert is_equal(core)


async def test_an_extent_is_not_taken_for_another_that_was_copied_while_copying_is_paced(disk: Path) -> None:
    async with (
        agent_core(disk, limit_bytes=128 * MIB, extents_held=8) as core,
        await NbdClient.connect(core.socket) as client,
    ):
        await copied(core, core.seeder)

        async def write(*places: int) -> None:
            core.log.seal()
            core.log.ordered = False
            for place in places:
                await client.write(place, b"written".ljust(512))

        async def write_before() -> None:
            await write(*[MIB] * 4, MIB + 8192)  # finds the row full, which is merged: other places come first

        core.ladder.open_gap("the change log is full")
        await write(*range(4 * MIB, 6 * MIB, MIB // 2))
        await copied(core, Seeder(core.ladder, Waits(write_before), bytes_per_second=256))
        assert is_equal(core)


async def test_a_page_that_is_written_in_part_while_its_region_is_paced_is_copied(disk: Path) -> None:

    def free(*_: object) -> volumes.FreeSpace:
        return volumes.FreeSpace(np.array([[2 * MIB, 6 * MIB]]), ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "free_space", free)
        async with (
            agent_core(disk, limit_bytes=128 * MIB, copy_free_space=False) as core,
            await NbdClient.connect(core.socket) as client,
        ):
            await copied(core, core.seeder)
            await client.write(3 * MIB + 512, b"one".ljust(512))
            core.log.seal()

            async def write() -> None:
                await client.write(3 * MIB + 65536 + 512, b"two".ljust(512))
                core.log.seal()

            await copied(core, Seeder(core.ladder, Waits(write), bytes_per_second=RATE))
            replica, source = replay(frames_of(core.log), DISK_BYTES), core.disk.path.read_bytes()
            for place in (3 * MIB, 3 * MIB + 65536):
                assert replica[place : place + 4096] == source[place : place + 4096]
