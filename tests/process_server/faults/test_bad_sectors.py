"""A cache disk with sectors that can't be read: what lay there is asked for again, never uploaded, never skipped.

A mock stands here for the disk: reads that touch a bad sector fail with EIO, as the kernel has them fail, until it is
written again (a disk then puts another in its place). Device mapper, which could do it for real, is not everywhere.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from process_server.cache import PAGE_BYTES, SLOT_BYTES
from tests.process_server.stores import GatedStore
from tests.process_server.support import Site, running, stored_frames
from tests.process_server.test_cache_paths import STORY_SECONDS, TUNING, received_only

SECTOR_BYTES = 512


class Disk:
    """The disk under one file, by its kernel interface; `bad` holds the places of sectors that can't be read."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.bad: set[int] = set()
        self.failed = 0
        self._path = str(path)
        self._read, self._write = os.preadv, os.pwritev
        patch.setattr(os, "preadv", self._reading)
        patch.setattr(os, "pwritev", self._writing)

    def _touched(self, fd: int, offset: int, count: int) -> set[int]:
        if os.readlink(f"/proc/self/fd/{fd}") != self._path:
            return set()
        return {place for place in self.bad if offset <= place < offset + count}

    def _reading(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if self._touched(fd, offset, sum(map(len, buffers))):
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._read(fd, buffers, offset)

    def _writing(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self.bad -= self._touched(fd, offset, sum(map(len, buffers)))
        return self._write(fd, buffers, offset)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


@pytest.fixture
def disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(site.directory / "cache", monkeypatch)


async def test_what_cannot_be_read_back_is_asked_for_again(site: Site, disk: Disk) -> None:
    store = GatedStore()
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=32, buffers=1, tuning=TUNING) as server,
    ):
        agent, last = await received_only(site, store, server, 30)
        machine = server.machine(agent.machine_id)
        assert machine.stream is not None
        cold = [slot for slot in machine.stream.slots if slot.buffer is None]
        disk.bad = {
            cold[1].index * SLOT_BYTES + PAGE_BYTES + 700 * SECTOR_BYTES,
            cold[-1].index * SLOT_BYTES + PAGE_BYTES,
        }
        store.gate.set()
        await agent.run(until_stored=last)
        assert disk.failed
        assert machine.counters.frames > 31  # some of them twice
        assert machine.health().error is None
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


@pytest.mark.parametrize("place", [0, PAGE_BYTES + 2000 * SECTOR_BYTES], ids=["header", "frames"])
async def test_what_an_earlier_life_received_and_cannot_be_read_is_asked_for_again(
    site: Site, disk: Disk, place: int
) -> None:
    store = GatedStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store, tuning=TUNING) as server:
            agent, last = await received_only(site, store, server, 20)
            stream = server.machine(agent.machine_id).stream
            assert stream is not None
            broken = list(stream.slots)[1].index
        disk.bad = {broken * SLOT_BYTES + place}
        store.gate.set()
        async with running(site, store, tuning=TUNING) as server:
            agent.port = server.port
            await agent.run(until_stored=last)
            assert disk.failed
            assert 0 < server.machine(agent.machine_id).counters.frames < 20
            await server.holding_nothing()
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything
