"""Audits of mounted disks are told at points, are true there whatever is written meanwhile, and find what went by."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from mobility_agent.auditing import CHUNK_BYTES, PIECE_BYTES
from mobility_agent.capture.trace.audits import PointAuditor
from mobility_agent.capture.trace.extents import DirtyExtents
from mobility_agent.regions import DirtyRegions
from replicar.clock import SystemClock
from tests.mobility_agent.core import MIB
from tests.mobility_agent.trace.rig import Churn, Rig, loop_disk, random_direct_writes, tracing

needs_root = pytest.mark.needs_root
LIMIT_SECONDS = 90
DISK_BYTES = 8 * MIB + 4096


async def read(rig: Rig) -> None:
    """Read for audits until a point has to come; the disks are copied by then."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while not rig.capture.is_whole:
            await asyncio.sleep(0.01)
        while await rig.audits.step():
            pass


async def one_round(rig: Rig) -> None:
    """Read and make points until a round is over."""
    before = rig.audits.last_round
    async with asyncio.timeout(LIMIT_SECONDS):
        while rig.audits.last_round is before:
            await read(rig)
            await rig.point()
            await rig.audits.step()


@needs_root
async def test_a_round_over_a_quiet_disk_proves_all_of_it_at_one_point(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=DISK_BYTES) as loop:
        random_direct_writes(loop.device, 200, seed=1, span=DISK_BYTES)
        async with tracing(tmp_path, [loop]) as rig:
            await one_round(rig)
            assert [(offset, length) for _, offset, length, _ in rig.replica.audits] == [
                *((number * CHUNK_BYTES, CHUNK_BYTES) for number in range(8)),
                (8 * MIB, 4096),
            ]
            assert all(agrees for *_, agrees in rig.replica.audits)
            assert rig.audits.last_round is not None
            assert rig.audits.last_round.skipped_bytes == 0


@needs_root
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
async def test_every_audit_is_true_of_its_point_under_load(tmp_path: Path, filesystem: str) -> None:
    with loop_disk(tmp_path, "a", filesystem=filesystem) as loop:
        async with tracing(tmp_path, [loop]) as rig:
            with Churn([loop.mountpoint], seed=4):
                for _ in range(2):
                    await read(rig)
                    await rig.point()
            assert rig.disks[0].doubts == 0
            assert len(rig.replica.audits) > 10  # of what held still; how much does, is the load's affair
            assert [item for item in rig.replica.audits if not item[-1]] == []


@needs_root
async def test_what_is_written_between_its_reading_and_the_point_is_read_again(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=DISK_BYTES) as loop:
        async with tracing(tmp_path, [loop]) as rig:
            await read(rig)
            random_direct_writes(loop.device, 1, seed=2, span=CHUNK_BYTES)
            await rig.point()
            told = {offset for _, offset, _, _ in rig.replica.audits}
            assert told == {*range(CHUNK_BYTES, DISK_BYTES, CHUNK_BYTES)}
            await rig.point()
            again = [(offset, length) for _, offset, length, _ in rig.replica.audits[len(told) :]]
            assert again == [(start, PIECE_BYTES) for start in range(0, CHUNK_BYTES, PIECE_BYTES)]
            assert all(agrees for *_, agrees in rig.replica.audits)


@needs_root
async def test_what_no_event_told_of_is_found(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=DISK_BYTES) as loop:
        async with tracing(tmp_path, [loop]) as rig:
            await read(rig)
            await rig.point()
            await rig.audits.step()  # ends the round
            with loop.image.open("r+b") as behind:  # below the device: the kernel sees no request
                behind.seek(3 * MIB + 8192)
                behind.write(b"not by way of the device")
                os.fsync(behind.fileno())
            await read(rig)
            rig.stage.images.clear()  # the replica is not what the disk is, and that is the story
            rig.replica.audits.clear()
            await rig.point()
            assert [offset for _, offset, _, agrees in rig.replica.audits if not agrees] == [3 * MIB]


@needs_root
async def test_audits_that_events_were_lost_under_are_not_told(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=DISK_BYTES) as loop:
        async with tracing(tmp_path, [loop]) as rig:
            await read(rig)
            rig.disks[0].doubt()
            async with asyncio.timeout(LIMIT_SECONDS):
                while not rig.capture.is_whole:
                    await asyncio.sleep(0.01)
            await rig.point()
            assert rig.replica.audits == []


@needs_root
async def test_the_position_that_survives_is_a_points(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=DISK_BYTES) as loop:
        async with tracing(tmp_path, [loop], audit_rate=1 << 40) as rig:
            async with asyncio.timeout(LIMIT_SECONDS):
                while not rig.capture.is_whole:
                    await asyncio.sleep(0.01)
            for _ in range(3):
                assert await rig.audits.step()
            await rig.point()
            for _ in range(2):  # read, and in no point
                assert await rig.audits.step()
            running = asyncio.create_task(rig.audits.run())
            await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait({running})
            again = PointAuditor(rig.ladder, SystemClock(), tmp_path / "audit.json", bytes_per_second=1)
            assert again.report.done_bytes == 3 * CHUNK_BYTES


@needs_root
async def test_disks_are_read_at_the_operators_rate(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", size_bytes=DISK_BYTES) as loop:
        async with tracing(tmp_path, [loop], audit_rate=4 * MIB) as rig:
            async with asyncio.timeout(LIMIT_SECONDS):
                while not rig.capture.is_whole:
                    await asyncio.sleep(0.01)
            began = asyncio.get_running_loop().time()
            for _ in range(3):
                assert await rig.audits.step()
            assert asyncio.get_running_loop().time() - began >= 0.7


def _array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def test_an_expectation_ends_with_any_event_that_touches_it_and_with_no_other(tmp_path: Path) -> None:
    extents = DirtyExtents(DirtyRegions(tmp_path / "regions", 64 * MIB))
    for offset, length, is_hit in (
        (MIB, 512, True),
        (2 * MIB - 512, 512, True),
        (MIB - 512, 512, False),
        (2 * MIB, 512, False),
        (0, 40 * MIB, True),
        (2 * MIB, 40 * MIB, False),
    ):
        expected = extents.expect(MIB, MIB)
        assert expected is not None
        extents.mark(_array(offset), _array(length))
        assert extents.is_as_expected(MIB, MIB, expected) is not is_hit, (offset, length)


def test_nothing_is_expected_while_a_write_is_under_way_nor_after_all_is_in_doubt(tmp_path: Path) -> None:
    extents = DirtyExtents(DirtyRegions(tmp_path / "regions", 64 * MIB))
    extents.begin(_array(MIB + 4096), _array(4096))
    assert extents.expect(MIB, PIECE_BYTES) is None
    assert extents.expect(3 * MIB, PIECE_BYTES) is not None
    extents.finish(_array(MIB + 4096), _array(4096))
    expected = extents.expect(MIB, PIECE_BYTES)
    assert expected is not None
    assert extents.is_as_expected(MIB, PIECE_BYTES, expected)
    extents.mark_all()
    assert not extents.is_as_expected(MIB, PIECE_BYTES, expected)
