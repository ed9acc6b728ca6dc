"""Power cuts: whatever of the last writes reached disk, log, both or neither, the replica ends equal to the disk.

The receiver in these stories is as real ones are: it has received some of the frames, perhaps also such as the machine
has forgotten with the power.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
from pathlib import Path

import pytest

from mobility_agent.checkpoint import Checkpointer
from mobility_agent.ladder import Rung
from mobility_agent.logstate import Past
from mobility_agent.touched import REGION_BYTES, TouchedRegions
from replicar.clock import SystemClock
from replicar.errors import ReplicarError
from replicar.formats import frame
from replicar.formats.frame import Frame
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import FILE_BYTES, MIB, Core, agent_core, frames_of, replay
from tests.mobility_agent.power import Power

DISK_BYTES = 4 * REGION_BYTES
_PUNCH_HOLE = 3  # and keep the size
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
FILLED = 3 * MIB


async def _seed_all(core: Core) -> None:
    seeding = asyncio.create_task(core.seeder.run())
    while core.ladder.in_gap:
        await asyncio.sleep(0.005)
    seeding.cancel()
    await asyncio.gather(seeding, return_exceptions=True)


async def _write(core: Core, draw: random.Random, count: int) -> None:
    """Writes to two of the four regions, with a flush now and then; ends in the middle of one."""
    async with await NbdClient.connect(core.socket) as client:
        for _ in range(count):
            region = draw.choice((0, 2)) * REGION_BYTES
            length = draw.choice((512, 4096, 65536))
            await client.write(region + draw.randrange(0, 2 * MIB, 512), draw.randbytes(length))
            if draw.random() < 0.05:
                await client.flush()
            if draw.random() < 0.05:
                await client.trim(region + draw.randrange(0, MIB, 4096), 8192)


async def _write_file(core: Core, file: Path, draw: random.Random, count: int) -> None:
    """The same by way of the file that the disk is shown as."""

    def write() -> None:
        fd = os.open(file, os.O_RDWR)
        try:
            for _ in range(count):
                region = draw.choice((0, 2)) * REGION_BYTES
                length = draw.choice((512, 4096, 65536))
                os.pwrite(fd, draw.randbytes(length), region + draw.randrange(0, 2 * MIB, 512))
                if draw.random() < 0.05:
                    os.fsync(fd)
                if draw.random() < 0.05:
                    assert _libc.fallocate(fd, _PUNCH_HOLE, region + draw.randrange(0, MIB, 4096), 8192) == 0
        finally:
            os.close(fd)

    await asyncio.to_thread(write)


async def _life_and_death(directory: Path, patch: pytest.MonkeyPatch, seed: int, *, file: Path | None = None) -> None:
    draw = random.Random(seed)

    async def write(core: Core, count: int) -> None:
        await (_write(core, draw, count) if file is None else _write_file(core, file, draw, count))

    before, after = directory / "before", directory / "after"
    before.mkdir()
    (before / "disk.img").write_bytes(draw.randbytes(FILLED).ljust(DISK_BYTES, b"\0"))
    with patch.context() as patched:
        power = Power(before, patched)
        async with agent_core(before, limit_bytes=64 * MIB, file=file) as core:
            await _seed_all(core)
            await write(core, 30)
            settled = draw.random() < 0.8
            if settled:
                await Checkpointer(core.ladder, SystemClock()).checkpoint()
            await write(core, draw.randrange(1, 60))
            core.log.seal()
            sealed = frames_of(core.log)
            received = sealed[: draw.randrange(len(sealed) // 2, len(sealed) + 1)]
            held = replay(received, DISK_BYTES)
            power.cut(after, draw)
    async with agent_core(after, limit_bytes=64 * MIB, boot_id=b"after the cut".ljust(16)) as core:
        assert core.log.past is (Past.TOUCHED if settled else Past.UNKNOWN)
        if settled:  # what is read again is bounded by the record: the two regions that were written
            assert core.ladder.dirty_bytes <= 2 * REGION_BYTES
        await _seed_all(core)
        wanted = received[-1].header.next_sequence
        resent = frames_of(core.log, wanted)
        _assert_continues(resent, wanted)
        assert replay(resent, DISK_BYTES, base=held) == core.disk.path.read_bytes()


def _assert_continues(frames: list[Frame], wanted: int) -> None:
    """No number is missing but where the stream says so, and none comes twice."""
    for item in frames:
        if item.header.first_sequence != wanted:
            assert item.header.first_sequence > wanted
            assert frame.begins_anew(item.table)
        wanted = item.header.next_sequence


@pytest.mark.parametrize("seed", range(10))
async def test_after_a_power_cut_the_replica_ends_equal_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    await _life_and_death(tmp_path, monkeypatch, seed)


@pytest.mark.needs_root
@pytest.mark.parametrize("seed", range(3))
async def test_after_a_power_cut_under_the_users_of_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    await _life_and_death(tmp_path, monkeypatch, seed, file=tmp_path / "shown" / "disk")


async def test_initial_replication_goes_on_where_a_checkpoint_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(7)
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    content = b"".join(
        draw.randbytes(4 * MIB) + bytes(REGION_BYTES - 4 * MIB) for _ in range(DISK_BYTES // REGION_BYTES)
    )
    (before / "disk.img").write_bytes(content)
    with monkeypatch.context() as patched:
        power = Power(before, patched)
        async with agent_core(before, limit_bytes=64 * MIB) as core:
            seeding = asyncio.create_task(core.seeder.run())
            while core.ladder.dirty_bytes > 2 * REGION_BYTES:
                await asyncio.sleep(0.001)
            seeding.cancel()
            await asyncio.gather(seeding, return_exceptions=True)
            for _ in range(2):  # what the first one's round was about goes with the second
                await Checkpointer(core.ladder, SystemClock()).checkpoint()
            left = core.ladder.dirty_bytes
            received = frames_of(core.log)
            power.cut(after, draw)
    async with agent_core(after, limit_bytes=64 * MIB, boot_id=b"after the cut".ljust(16)) as core:
        assert core.log.past is Past.TOUCHED
        await _seed_all(core)
        assert core.seeder.copied_bytes + core.seeder.equal_bytes <= left
        wanted = received[-1].header.next_sequence
        resent = frames_of(core.log, wanted)
        assert replay(resent, DISK_BYTES, base=replay(received, DISK_BYTES)) == content


@pytest.mark.parametrize("extents_held", [4096, 4])
async def test_what_a_full_log_did_not_take_is_sent_after_a_power_cut_however_long_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extents_held: int
) -> None:
    draw = random.Random(3)
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    with monkeypatch.context() as patched:
        power = Power(before, patched)
        async with agent_core(
            before, disk_bytes=DISK_BYTES, limit_bytes=2 * FILE_BYTES, extents_held=extents_held
        ) as core:
            await _seed_all(core)
            async with await NbdClient.connect(core.socket) as client:
                while core.ladder.rung is Rung.ORDERED:
                    await client.write(0, draw.randbytes(256 << 10))
                for number in range(8):
                    await client.write(2 * REGION_BYTES + number * 8192, draw.randbytes(4096))
                await client.flush()
            for _ in range(2):  # nothing is written in the second one's round
                await Checkpointer(core.ladder, SystemClock()).checkpoint()
            received = frames_of(core.log)
            power.cut(after, draw)
    async with agent_core(after, limit_bytes=64 * MIB, boot_id=b"after the cut".ljust(16)) as core:
        assert core.log.past is Past.TOUCHED
        await _seed_all(core)
        resent = frames_of(core.log, received[-1].header.next_sequence)
        held = replay(received, DISK_BYTES)
        assert replay(resent, DISK_BYTES, base=held) == core.disk.path.read_bytes()


@pytest.mark.soak
@pytest.mark.needs_root
@pytest.mark.parametrize("seed", range(3000, 3050))
async def test_fifty_power_cuts_under_the_users_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    await _life_and_death(tmp_path, monkeypatch, seed, file=tmp_path / "shown" / "disk")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1200))
async def test_two_hundred_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    await _life_and_death(tmp_path, monkeypatch, seed)


async def test_a_region_is_retired_when_nothing_was_written_there_since(tmp_path: Path) -> None:
    async with agent_core(tmp_path, disk_bytes=DISK_BYTES) as core:
        await _seed_all(core)
        checkpointer = Checkpointer(core.ladder, SystemClock())
        await checkpointer.checkpoint()
        assert core.ladder.touched[0].count == 0
        async with await NbdClient.connect(core.socket) as client:
            await client.write(REGION_BYTES, b"x" * 512)
            assert core.ladder.touched[0].ranges() == [(REGION_BYTES, REGION_BYTES)]
            await checkpointer.checkpoint()
            assert core.ladder.touched[0].ranges() == []


async def test_a_write_during_a_checkpoint_keeps_its_region_recorded(tmp_path: Path) -> None:
    touched = TouchedRegions(tmp_path / "touched", DISK_BYTES)
    await touched.record(0, 512)
    touched.begin_round()
    assert touched.covers(0, 512)
    await touched.retire()
    assert touched.count == 1
    touched.close()


async def test_a_region_that_cannot_be_recorded_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent_core(tmp_path, disk_bytes=DISK_BYTES) as core:

        async def refuse(offset: int, length: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(core.ladder.touched[0], "record", refuse)
        client = await NbdClient.connect(core.socket)
        with pytest.raises(ReplicarError):
            await client.write(0, b"y" * 512)
        assert core.disk.path.read_bytes()[:512] == bytes(512)
