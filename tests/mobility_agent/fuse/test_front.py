"""A disk as a file: real file systems on it, whose every write is in the log, and which outlive the agent."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from pathlib import Path

import pytest

from mobility_agent.capture.fuse import session
from mobility_agent.capture.fuse.keeper import Keeper
from replicar.errors import PermanentError
from replicar.formats.frame import Kind
from replicar.fuse import mount
from tests.mobility_agent.core import MIB, agent_core, frames_of
from tests.mobility_agent.fuse.stage import (
    LIMIT_SECONDS,
    SIZES,
    agent,
    check_filesystem,
    fio,
    looped,
    make_filesystem,
    mounted,
)
from tests.mobility_agent.killable import LARGE_LOG
from tests.mobility_agent.trace.rig import run, unmount

pytestmark = pytest.mark.needs_root


async def _ends_well(process: subprocess.Popen[bytes], limit_seconds: float = LIMIT_SECONDS) -> None:
    said, _ = await asyncio.to_thread(process.communicate, timeout=limit_seconds)
    assert process.returncode == 0, said.decode()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_a_mounted_file_systems_writes_and_trims_are_in_the_log(tmp_path: Path, kind: str) -> None:
    async with agent(tmp_path, SIZES[kind]) as shown:
        with looped(shown.file) as device:
            make_filesystem(kind, device)
            with mounted(device, tmp_path / "mounted") as where:
                await _ends_well(fio(where))
                (where / "load.0.0").unlink()
                run("fstrim", where)
                (where / "kept").write_bytes(b"kept" * 100_000)
        await shown.stop()
        assert not mount.is_mounted(shown.file.parent)
        assert await shown.replica() == shown.disk.read_bytes()
        async with agent_core(tmp_path, limit_bytes=LARGE_LOG) as core:
            tables = [found.table for found in frames_of(core.log)]
    zeroed = sum(int(row["length"]) for table in tables for row in table if row["kind"] == Kind.ZERO)
    assert zeroed > 20 * MIB
    check_filesystem(kind, tmp_path / "disk.img")


async def _outlives(directory: Path, kills: int, seed: int, rate: str) -> None:
    """Kill agents under a load that notices every error; then the log says what the disk is."""
    draw = random.Random(seed)
    async with agent(directory, SIZES["ext4"]) as shown:
        with looped(shown.file) as device:
            make_filesystem("ext4", device)
            with mounted(device, directory / "mounted") as where:
                load = fio(where, "--time_based=1", f"--runtime={kills + 1}", f"--rate={rate}", "--verify=0")
                for _ in range(kills):
                    await asyncio.sleep(draw.uniform(0.1, 0.6))
                    await shown.kill()
                    await asyncio.sleep(draw.uniform(0.0, 0.1))
                    await shown.start()
                await _ends_well(load, LIMIT_SECONDS + 2 * kills)
                await _ends_well(fio(where))  # which reads back what it writes
        await shown.stop()
        assert await shown.replica() == shown.disk.read_bytes()
    check_filesystem("ext4", directory / "disk.img")


async def test_a_file_system_outlives_agents_that_are_killed_under_its_load(tmp_path: Path) -> None:
    await _outlives(tmp_path, 2, seed=1, rate="30m")


@pytest.mark.soak
async def test_a_file_system_outlives_two_hundred_agents(tmp_path: Path) -> None:
    await _outlives(tmp_path, 200, seed=2, rate="700k")


async def test_a_stop_leaves_a_file_that_is_in_use_to_the_next_agent(tmp_path: Path) -> None:
    async with agent(tmp_path, 8 * MIB) as shown:
        with looped(shown.file) as device:
            await shown.stop()
            assert mount.is_mounted(shown.file.parent)
            writing = asyncio.create_task(asyncio.to_thread(_write, device, b"late" * 1024))
            await asyncio.sleep(0.3)
            assert not writing.done()  # it waits, and is not refused
            await shown.start()
            await asyncio.wait_for(writing, LIMIT_SECONDS)
        await shown.stop()
        assert not mount.is_mounted(shown.file.parent)
        assert not list((tmp_path / "files").iterdir())
        assert shown.disk.read_bytes()[:4096] == b"late" * 1024
        assert await shown.replica() == shown.disk.read_bytes()


async def test_a_disk_that_grew_under_its_users_has_its_new_size(tmp_path: Path) -> None:
    async with agent(tmp_path, 8 * MIB) as shown:
        with looped(shown.file) as device:
            await shown.stop()
            os.truncate(shown.disk, 12 * MIB)
            await shown.start()
            await asyncio.to_thread(run, "losetup", "-c", device)
            assert int(await asyncio.to_thread(run, "blockdev", "--getsize64", device)) == 12 * MIB
            await asyncio.to_thread(_write_at, device, 10 * MIB, b"new!" * 1024)
        await shown.stop()
        assert await shown.replica() == shown.disk.read_bytes()


async def test_release_lets_those_go_who_wait_for_no_agent(tmp_path: Path) -> None:
    async with agent(tmp_path, 8 * MIB) as shown:
        with looped(shown.file) as device:
            await shown.kill()
            writing = asyncio.create_task(asyncio.to_thread(_write, device, bytes(4096)))
            await asyncio.sleep(0.3)
            assert not writing.done()
            assert session.release(tmp_path / "files") == [shown.file.parent]
            with pytest.raises(OSError):
                await asyncio.wait_for(writing, LIMIT_SECONDS)
        assert not mount.is_mounted(shown.file.parent)
        assert session.release(tmp_path / "files") == []


async def test_a_file_that_is_set_no_longer_is_not_taken_from_who_uses_it(tmp_path: Path) -> None:
    async with agent(tmp_path, 8 * MIB) as shown:
        with looped(shown.file):
            await shown.kill()
            with pytest.raises(PermanentError, match="still shown"):
                session.settle(tmp_path / "files", set())
            assert Keeper(tmp_path / "files" / "root").ask() is not None
        session.settle(tmp_path / "files", set())
        assert not mount.is_mounted(shown.file.parent)


async def test_a_directory_that_holds_something_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "letters").write_text("mine")
    with pytest.raises(PermanentError, match="would be hidden"):
        async with agent_core(tmp_path, file=tmp_path / "shown" / "disk"):
            pass
    assert (tmp_path / "shown" / "letters").read_text() == "mine"


async def test_a_disk_that_fails_a_write_fails_it_for_whoever_wrote_and_a_gap_begins(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)
    try:
        (tmp_path / "disk.img").symlink_to(small / "disk.img")
        async with agent(tmp_path, 8 * MIB) as shown:
            await asyncio.to_thread(_write_at, shown.file, 0, b"fits" * 1024)
            with pytest.raises(OSError, match="No space left"):
                await asyncio.to_thread(_write_at, shown.file, 4096, bytes(range(256)) * 8192)
            await shown.stop()
            async with agent_core(tmp_path, limit_bytes=LARGE_LOG) as core:
                assert core.ladder.in_gap
    finally:
        unmount(small)


async def test_a_range_of_no_whole_sectors_is_refused(tmp_path: Path) -> None:
    async with agent(tmp_path, 8 * MIB) as shown:
        for offset, length in ((100, 512), (512, 100), (8 * MIB, 512)):
            with pytest.raises(OSError):
                await asyncio.to_thread(_write_at, shown.file, offset, bytes(length))


def _write(path: Path, data: bytes) -> None:
    _write_at(path, 0, data)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        for done in range(0, len(data), 65536):
            os.pwrite(fd, data[done : done + 65536], offset + done)
        os.fsync(fd)
    finally:
        os.close(fd)
