"""SIGKILL at any instant, on any rung: the replica ends equal to the disk, and only what is dirty is read again."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mobility_agent.logstate import Past
from replicar.errors import ReplicarError
from replicar.formats import frame
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import MIB, Core, agent_core, replay
from tests.mobility_agent.killable import FEW_EXTENTS, SMALL_LOG, last_of

DISK_BYTES = 24 * MIB


async def _life(directory: Path, draw: random.Random) -> None:
    """Write through an agent in a process of its own, whose server comes late, until it is killed."""
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "tests.mobility_agent.killable",
            str(directory),
            f"--away={draw.choice((0.0, 0.2, 0.5))}",
        ),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"serving\n"

    async def write(client: NbdClient) -> None:
        while True:
            await client.write(
                draw.randrange(0, DISK_BYTES - MIB, 512), draw.randbytes(draw.choice((512, 4096, 262144)))
            )
            if draw.random() < 0.05:
                await client.trim(draw.randrange(0, DISK_BYTES - MIB, 4096), draw.choice((8192, MIB)))

    client = await NbdClient.connect(directory / "nbd")
    lanes = [asyncio.create_task(write(client)) for _ in range(4)]
    await asyncio.sleep(draw.uniform(0.0, 0.9))
    process.send_signal(signal.SIGKILL)
    await process.wait()
    results = await asyncio.gather(*lanes, return_exceptions=True)
    assert all(isinstance(result, ReplicarError) for result in results), results
    _cut(directory / "stored")


def _cut(stored: Path) -> None:
    """Take away what the killed process was writing: it is not whole, and so was not trimmed either."""
    data, end = memoryview(stored.read_bytes()), 0
    while (header := frame.read_header(data[end:])) is not None and end + header.frame_bytes <= len(data):
        end += header.frame_bytes
    data.release()
    os.truncate(stored, end)


async def _settle(core: Core, stored: Path) -> None:
    """Have everything dirty copied, and everything in the log stored."""
    seeding = asyncio.create_task(core.seeder.run())
    with stored.open("ab") as file:
        while core.ladder.in_gap or core.log.stored_sequence < core.log.next_sequence - 1:
            core.log.seal()
            frames = core.log.take(core.log.stored_sequence + 1)
            if frames is not None:
                file.write(frames)
                core.log.trim(last_of(bytes(frames)))
            await asyncio.sleep(0.002)
    seeding.cancel()
    await asyncio.gather(seeding, return_exceptions=True)


async def _killed(directory: Path, seed: int) -> None:
    draw = random.Random(seed)
    (directory / "disk.img").write_bytes(draw.randbytes(4 * MIB).ljust(DISK_BYTES, b"\0"))
    stored = directory / "stored"
    async with agent_core(directory, limit_bytes=SMALL_LOG, extents_held=FEW_EXTENTS) as core:
        await _settle(core, stored)
    for _ in range(2):
        await _life(directory, draw)
    async with agent_core(directory, limit_bytes=SMALL_LOG, extents_held=FEW_EXTENTS) as core:
        assert core.log.past is Past.KNOWN
        dirty = core.ladder.dirty_bytes
        await _settle(core, stored)
        replica = replay([found for _, found in frame.frames_in(stored.read_bytes())], DISK_BYTES)
        assert replica == core.disk.path.read_bytes()
        assert core.seeder.copied_bytes + core.seeder.equal_bytes <= dirty


@pytest.mark.parametrize("seed", range(6))
async def test_a_kill_on_any_rung_leaves_a_replica_that_ends_equal(tmp_path: Path, seed: int) -> None:
    await _killed(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2000, 2200))
async def test_two_hundred_kills(tmp_path: Path, seed: int) -> None:
    await _killed(tmp_path, seed)


async def test_a_disk_that_was_used_after_a_clean_stop_is_left_as_it_is(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        seeding = asyncio.create_task(core.seeder.run())
        while core.ladder.in_gap:
            await asyncio.sleep(0.01)
        seeding.cancel()
        await asyncio.gather(seeding, return_exceptions=True)
        async with await NbdClient.connect(core.socket) as client:
            await client.write(4096, b"A" * 4096)
    with (tmp_path / "disk.img").open("r+b") as disk:
        disk.seek(4096)
        disk.write(b"B" * 4096)
    async with agent_core(tmp_path, boot_id=b"later".ljust(16)) as core:
        assert core.disk.path.read_bytes()[4096:8192] == b"B" * 4096


async def test_what_was_written_while_the_log_was_full_is_not_undone_by_the_start_after_a_kill(tmp_path: Path) -> None:
    running, left = tmp_path / "running", tmp_path / "left"
    running.mkdir()
    async with agent_core(running, limit_bytes=SMALL_LOG) as core, await NbdClient.connect(core.socket) as client:
        assert core.ladder.in_gap  # else the log would say GAP when it is full, in a frame of its own behind the others
        number = 0
        while core.ladder.rung == "ordered":
            number += 1
            await client.write(0, number.to_bytes(4, "big") * 16384)
        await client.write(0, b"last" * 16384)
        shutil.copytree(running, left, ignore=shutil.ignore_patterns("nbd"))  # what a kill would leave here and now
    async with agent_core(left, limit_bytes=SMALL_LOG) as core:
        assert core.disk.read(0, 65536) == b"last" * 16384
