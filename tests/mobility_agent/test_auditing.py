"""Audits say what the disk held at their place in the stream, whatever is written meanwhile, and find what went by."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest
import xxhash

from mobility_agent.auditing import CHUNK_BYTES, PIECE_BYTES, Auditor
from mobility_agent.capture.disk import Disk
from replicar.clock import SystemClock
from replicar.formats.frame import AUDIT_DIGEST_BYTES, Frame, Kind
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import MIB, Core, agent_core, frames_of

DISK_BYTES = 4 * MIB + 512
FAST = 1 << 40


class Timed(SystemClock):
    """A clock whose time passes by being slept."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def auditor(core: Core, *, rate: int = FAST, clock: SystemClock | None = None) -> Auditor:
    path = core.disk.path.parent / "audit.json"
    return Auditor(core.ladder, clock or SystemClock(), path, bytes_per_second=rate)


async def ordered(core: Core) -> None:
    """Return when the disk is copied and the stream is in order."""
    seeding = asyncio.create_task(core.seeder.run())
    async with asyncio.timeout(20):
        while core.ladder.in_gap:
            await asyncio.sleep(0.01)
    seeding.cancel()
    await asyncio.wait({seeding})


async def one_round(audits: Auditor) -> None:
    before = audits.last_round
    async with asyncio.timeout(30):
        while audits.last_round is before:
            assert await audits.step()


def compared(frames: list[Frame]) -> list[tuple[int, int, int, bool]]:
    """Every AUDIT of the frames, which begin with the stream: sequence, offset, length, whether a replay agrees."""
    disk, found = bytearray(DISK_BYTES), []
    for item in frames:
        for row, (offset, length, _, place, _, kind, _) in enumerate(item.table.tolist()):
            if kind == Kind.WRITE:
                disk[offset : offset + length] = item.payload[place : place + length]
            elif kind == Kind.ZERO:
                disk[offset : offset + length] = bytes(length)
            elif kind == Kind.AUDIT:
                digest = bytes(item.payload[place : place + AUDIT_DIGEST_BYTES])
                agrees = xxhash.xxh3_128_digest(disk[offset : offset + length]) == digest
                found.append((item.header.first_sequence + row, offset, length, agrees))
    return found


def made(directory: Path) -> None:
    (directory / "disk.img").write_bytes(random.Random(1).randbytes(3 * MIB) + bytes(DISK_BYTES - 3 * MIB))


async def test_a_round_covers_the_disk_to_its_last_sector_and_agrees_with_the_stream(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        audits = auditor(core)
        assert audits.report.last_ended_ns is None
        await one_round(audits)
        found = compared(frames_of(core.log))
        assert [(offset, length) for _, offset, length, _ in found] == [
            *((number * CHUNK_BYTES, CHUNK_BYTES) for number in range(4)),
            (4 * MIB, 512),
        ]
        assert all(agrees for *_, agrees in found)
        report = audits.report
        assert report.last_began_ns is not None
        assert report.last_ended_ns is not None
        assert report.last_began_ns <= report.last_ended_ns
        assert (report.total_bytes, report.last_skipped_bytes) == (DISK_BYTES, 0)


async def test_every_audit_is_true_of_its_place_while_the_disk_is_written(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=256 * MIB) as core, await NbdClient.connect(core.socket) as client:
        await ordered(core)
        audits, random_ = auditor(core), random.Random(2)

        async def write() -> None:
            while True:
                length = random_.choice((512, 4096, 65536))
                await client.write(random_.randrange(0, DISK_BYTES - length, 512), random_.randbytes(length))
                if random_.random() < 0.2:
                    await client.trim(random_.randrange(0, DISK_BYTES - 4096, 512), 4096)

        writing = asyncio.create_task(write())
        for _ in range(4):
            await one_round(audits)
        writing.cancel()
        await asyncio.wait({writing})
        core.log.seal()
        found = compared(frames_of(core.log))
        assert len(found) >= 8
        assert [item for item in found if not item[-1]] == []
        assert max(sequence for sequence, *_ in found) - min(sequence for sequence, *_ in found) > len(found)


async def test_a_write_past_the_agent_is_found_where_it_was_made(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        with core.disk.path.open("r+b") as behind:
            behind.seek(2 * MIB + 4096)
            behind.write(b"not by way of the agent")
        await one_round(auditor(core))
        wrong = [offset for _, offset, _, agrees in compared(frames_of(core.log)) if not agrees]
        assert wrong == [2 * MIB]


async def test_nothing_is_audited_inside_a_gap(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        audits = auditor(core)
        assert core.ladder.in_gap
        assert not await audits.step()
        await ordered(core)
        assert await audits.step()
        core.ladder.distrust(0, 0, 4096)
        core.ladder.declare()
        assert not await audits.step()
        assert audits.audits == 1


async def test_a_gap_that_begins_while_a_chunk_is_read_keeps_its_audit_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        audits, loop, read = auditor(core), asyncio.get_running_loop(), Disk.read_direct

        def failing_meanwhile(disk: Disk, offset: int, target: memoryview) -> None:
            read(disk, offset, target)
            loop.call_soon_threadsafe(core.ladder.distrust, 0, 3 * MIB, 4096)
            loop.call_soon_threadsafe(core.ladder.declare)

        monkeypatch.setattr(Disk, "read_direct", failing_meanwhile)
        assert not await audits.step()
        assert compared(frames_of(core.log)) == []


async def test_a_round_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        audits = auditor(core, rate=8 * MIB)
        running = asyncio.create_task(audits.run())
        async with asyncio.timeout(20):
            while audits.report.done_bytes < 2 * MIB:
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})
        at = audits.report.done_bytes
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        audits = auditor(core)
        assert audits.report.done_bytes == at
        await one_round(audits)
        found = compared(frames_of(core.log))
        assert [offset for _, offset, _, _ in found] == [*range(0, 4 * MIB, MIB), 4 * MIB]
        assert all(agrees for *_, agrees in found)


async def test_a_damaged_memory_of_the_position_begins_a_new_round(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        for text in ("", "{}", '{"disk": 0, "offset": 7, "began_ns": 1, "skipped": 0, "last_round": null}', "[" * 9999):
            (tmp_path / "audit.json").write_text(text)
            assert auditor(core).report.done_bytes == 0


async def test_the_rate_that_was_set_is_kept(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        clock = Timed()
        await one_round(auditor(core, rate=MIB // 2, clock=clock))
        assert clock.now == pytest.approx(2 * DISK_BYTES / MIB)
        clock.now += 3600  # what was not read in time is not made up for
        begun = clock.now
        await one_round(auditor(core, rate=MIB // 2, clock=clock))
        assert clock.now - begun == pytest.approx(2 * DISK_BYTES / MIB)


async def test_what_is_written_all_the_time_is_left_out_and_the_rest_is_audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        read, hot = Disk.read_direct, MIB + 5 * PIECE_BYTES

        def written_meanwhile(disk: Disk, offset: int, target: memoryview) -> None:
            read(disk, offset, target)
            disk.touched(hot, 512)

        monkeypatch.setattr(Disk, "read_direct", written_meanwhile)
        audits = auditor(core)
        await one_round(audits)
        found = compared(frames_of(core.log))
        assert sum(length for _, _, length, _ in found) == DISK_BYTES - PIECE_BYTES
        assert not any(offset <= hot < offset + length for _, offset, length, _ in found)
        assert all(agrees for *_, agrees in found)
        assert audits.report.last_skipped_bytes == PIECE_BYTES


async def test_a_place_that_cannot_be_read_is_left_out_and_the_agent_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        read = Disk.read_direct

        def failing(disk: Disk, offset: int, target: memoryview) -> None:
            if offset <= 3 * MIB < offset + len(target):
                raise OSError(errno.EIO, "a bad sector")
            read(disk, offset, target)

        monkeypatch.setattr(Disk, "read_direct", failing)
        audits = auditor(core)
        await one_round(audits)
        assert audits.report.last_skipped_bytes == PIECE_BYTES


async def test_an_audit_that_is_not_stored_is_no_change_that_would_be_lost(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        audits, log = auditor(core), core.log
        assert await audits.step()
        assert log.oldest_unstored_time_ns() is not None  # the copies before it
        log.trim(log.next_sequence - 1)
        assert await audits.step()
        assert await audits.step()
        assert log.oldest_unstored_time_ns() is None
        log.trim(log.next_sequence - 2)
        assert log.oldest_unstored_time_ns() is None
        assert log.append_copy(Kind.ZERO, 0, 0, 512)
        assert await audits.step()
        assert log.oldest_unstored_time_ns() is not None


async def test_audits_wait_while_the_log_is_more_than_half_full(tmp_path: Path) -> None:
    made(tmp_path)
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        await ordered(core)
        audits = auditor(core)
        while core.log.used_bytes <= core.log.limit_bytes / 2:
            assert core.log.append_copy(Kind.WRITE, 0, 0, MIB, bytes(MIB))
        assert not await audits.step()
        core.log.trim(core.log.next_sequence - 1)
        assert await audits.step()


def test_each_watch_learns_of_the_writes_to_its_own_range(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with Disk(0, "root", tmp_path / "disk") as disk:
        assert (disk.watch_start, disk.watch_end) == (0, 0)
        with disk.watch(4096, 8192) as low, disk.watch(65536, 69632) as high:
            assert (disk.watch_start, disk.watch_end) == (4096, 69632)
            for offset, length in ((8192, 512), (3584, 512), (69632, 512)):
                disk.touched(offset, length)
            assert (low.hit, high.hit) == (False, False)
            disk.touched(69120, 4096)
            assert (low.hit, high.hit) == (False, True)
            disk.touched(0, MIB)
            assert low.hit
        assert (disk.watch_start, disk.watch_end) == (0, 0)


def test_a_direct_read_that_is_refused_is_done_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(random.Random(9).randbytes(8192))
    with Disk(0, "root", tmp_path / "disk") as disk:
        target = bytearray(1536)  # neither aligned nor whole pages
        disk.read_direct(512, memoryview(target))
        assert target == disk.read(512, 1536)
