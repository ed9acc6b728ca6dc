"""A flush that fails counts for everybody, whoever asked for it, until what the kernel dropped was written again."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from mobility_agent.capture.disk import Disk
from mobility_agent.checkpoint import Checkpointer
from mobility_agent.touched import REGION_BYTES
from replicar.clock import SystemClock
from replicar.errors import ReplicarError
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import MIB, Core, agent_core

LIMIT_SECONDS = 60
DISK_BYTES = 3 * REGION_BYTES


def _failing(patch: pytest.MonkeyPatch, disk: Disk) -> Callable[[], None]:
    """A mock stands for a disk that can't be written: it fails syncs of it, until what is returned is called."""
    sync = os.fdatasync

    def fail(fd: int) -> None:
        if fd == disk.fd:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    patch.setattr(os, "fdatasync", fail)
    return lambda: patch.setattr(os, "fdatasync", sync)


def test_a_flush_behind_one_that_failed_fails_until_the_disk_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    with Disk(0, "data", tmp_path / "disk.img") as disk:
        heal = _failing(monkeypatch, disk)
        with pytest.raises(OSError, match="Input/output error"):
            disk.flush()
        with pytest.raises(OSError, match="Input/output error"):
            disk.mended()
        heal()
        for _ in range(2):
            with pytest.raises(OSError, match="not written again yet"):
                disk.flush()
        disk.mended()
        disk.flush()


def test_a_flush_beside_one_that_fails_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells one of the two; a mock stands for a disk that fails at the wrong moment."""
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    began, go_on, calls = threading.Event(), threading.Event(), []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            began.set()
            assert go_on.wait(LIMIT_SECONDS)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Disk(0, "root", tmp_path / "disk.img") as disk, ThreadPoolExecutor(2) as threads:
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        first = threads.submit(disk.flush)
        assert began.wait(LIMIT_SECONDS)
        second = threads.submit(disk.flush)
        with suppress(TimeoutError):
            second.result(0.2)  # one that did not wait would be through by then, and have been told nothing
        go_on.set()
        assert isinstance(first.exception(LIMIT_SECONDS), OSError)
        assert isinstance(second.exception(LIMIT_SECONDS), OSError)


async def _seeded(core: Core) -> None:
    seeding = asyncio.create_task(core.seeder.run())
    while core.ladder.in_gap:
        await asyncio.sleep(0.005)
    seeding.cancel()
    await asyncio.gather(seeding, return_exceptions=True)


async def test_a_checkpoint_mends_the_disk_by_writing_again_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent_core(tmp_path, disk_bytes=DISK_BYTES) as core:
        await _seeded(core)
        checkpointer, touched = Checkpointer(core.ladder, SystemClock()), core.ladder.touched[0]
        await checkpointer.checkpoint()
        async with await NbdClient.connect(core.socket) as client:
            await client.write(REGION_BYTES + 8192, b"x" * 4096)
            heal = _failing(monkeypatch, core.disk)
            with pytest.raises(ReplicarError):
                await client.flush()
            with pytest.raises(OSError, match="Input/output error"):
                await checkpointer.checkpoint()  # a disk that can't be mended: nothing is retired
            heal()
            with pytest.raises(ReplicarError):
                await client.flush()
            assert touched.ranges() == [(REGION_BYTES, REGION_BYTES)]
            written: list[tuple[int, bytes]] = []
            write = core.disk.write

            def watched(at: int, data: bytes) -> None:
                written.append((at, data))
                write(at, data)

            monkeypatch.setattr(core.disk, "write", watched)
            await checkpointer.checkpoint()
            again = [(at, data) for at, data in written if at <= REGION_BYTES + 8192 < at + len(data)]
            assert [data[REGION_BYTES + 8192 - at :][:4096] for at, data in again] == [b"x" * 4096]
            await client.flush()
            assert core.ladder.in_gap  # what the kernel may have read anew is compared
        await _seeded(core)
        await checkpointer.checkpoint()
        await checkpointer.checkpoint()
        assert touched.count == 0


async def test_the_next_agent_mends_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent_core(tmp_path, disk_bytes=4 * MIB) as core:
        await _seeded(core)
        async with await NbdClient.connect(core.socket) as client:
            await client.write(0, b"x" * 4096)
            with monkeypatch.context() as patched:
                _failing(patched, core.disk)
                with pytest.raises(ReplicarError):
                    await client.flush()
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        with pytest.raises(ReplicarError):
            await client.flush()
        await Checkpointer(core.ladder, SystemClock()).checkpoint()
        await client.flush()
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        await client.flush()
