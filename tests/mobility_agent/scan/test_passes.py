"""Passes over volumes that change meanwhile: what two passes agree on is what the volumes held between them."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import xxhash

from mobility_agent.capture.scan.audits import PassAuditor
from mobility_agent.capture.scan.volume import FileVolume
from mobility_agent.digests import Digests
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.scanned import MAX_TRIES, ScanCapture, ScannedDisk
from mobility_agent.touched import TouchedRegions
from replicar.clock import SystemClock
from replicar.errors import PermanentError, TransientError
from replicar.formats.frame import AUDIT_DIGEST_BYTES, Flag, Kind
from replicar.formats.record import Consistency, Mark
from tests.mobility_agent.core import MIB, frames_of, gap_flags, open_log
from tests.mobility_agent.test_auditing import Timed

SIZES = [5 * MIB + 512, 3 * MIB]


class Rig:
    """Two scanned disks in files, and the log that they go into."""

    def __init__(
        self, ladder: Ladder, scan: ScanCapture, images: list[Path], audits: PassAuditor, clock: Timed
    ) -> None:
        self.ladder, self.scan, self.images = ladder, scan, images
        self.audits, self.clock = audits, clock  # and the audits' own clock
        self.marked: list[int] = []

    def mark(self) -> int:
        name = f"m{len(self.marked)}"
        self.ladder.log.append_record(Kind.MARK, Mark(name, Consistency.CRASH, name))
        self.marked.append(self.ladder.log.next_sequence - 1)
        return self.marked[-1]

    def write(self, disk: int, offset: int, data: bytes) -> None:
        with self.images[disk].open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def held(self) -> list[bytes]:
        return [image.read_bytes() for image in self.images]

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """Every AUDIT of the stream: disk, offset, length, digest."""
        self.ladder.log.seal()
        return [
            (disk, offset, length, bytes(item.payload[place : place + AUDIT_DIGEST_BYTES]))
            for item in frames_of(self.ladder.log)
            for offset, length, _, place, disk, kind, _ in item.table.tolist()
            if kind == Kind.AUDIT
        ]

    def replica(self, until: int) -> list[bytes]:
        """Both disks as the stream says up to a sequence."""
        self.ladder.log.seal()
        disks = [bytearray(size) for size in SIZES]
        for item in frames_of(self.ladder.log):
            for number, (offset, length, _, place, index, kind, _) in enumerate(item.table.tolist()):
                if item.header.first_sequence + number >= until:
                    break
                if kind == Kind.WRITE:
                    disks[index][offset : offset + length] = item.payload[place : place + length]
                elif kind == Kind.ZERO:
                    disks[index][offset : offset + length] = bytes(length)
        return [bytes(disk) for disk in disks]


@asynccontextmanager
async def rig(directory: Path, *, audit_rate: int = 1) -> AsyncIterator[Rig]:
    images = [directory / f"{number}.img" for number in range(2)]
    for image, size, seed in zip(images, SIZES, (1, 2), strict=True):
        if not image.exists():
            image.write_bytes(random.Random(seed).randbytes(size))
    log = open_log(directory / "log", limit_bytes=64 * MIB)
    disks = [ScannedDisk(number, f"d{number}", image) for number, image in enumerate(images)]
    regions = {disk.index: DirtyRegions(directory / f"{disk.index}.regions", disk.size_bytes) for disk in disks}
    touched = {disk.index: TouchedRegions(directory / f"{disk.index}.touched", disk.size_bytes) for disk in disks}
    digests = {disk.index: Digests(directory / f"{disk.index}.digests", disk.size_bytes) for disk in disks}
    ladder = Ladder(log, disks, regions, touched, digests)
    ladder.start()
    try:
        clock = Timed()
        audits = PassAuditor(ladder, clock, directory / "audit.json", bytes_per_second=audit_rate)
        async with ScanCapture(ladder, SystemClock(), every_seconds=1.0, audits=audits) as scan:
            yield Rig(ladder, scan, images, audits, clock)
        await log.close()
    finally:
        for kept in (digests, touched, regions):
            for part in kept.values():
                part.close()
        for disk in disks:
            disk.close()


async def test_a_point_of_disks_that_are_left_alone_is_what_they_hold(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        point = await made.scan.point(made.mark)
        assert made.replica(point.sequence) == made.held()
        assert made.scan.is_whole
        flags = gap_flags(frames_of(made.ladder.log))
        assert flags[-2:] == [Flag.GAP_END, Flag.GAP_BEGIN]
        assert made.ladder.in_gap


async def test_a_point_tells_what_its_pass_has_read_as_far_as_the_rate_goes(tmp_path: Path) -> None:
    async with rig(tmp_path, audit_rate=MIB) as made:
        made.clock.now += 2.5
        await made.scan.point(made.mark)
        assert [(disk, offset) for disk, offset, _, _ in made.told()] == [(0, 0), (0, MIB), (0, 2 * MIB)]
        await made.scan.point(made.mark)
        assert len(made.told()) == 3  # half a piece ahead of the rate
        made.write(0, 100, b"changed before the point")
        made.clock.now += 100
        point = await made.scan.point(made.mark)
        told = made.told()
        assert made.audits.last_round is not None
        assert sum(length for _, _, length, _ in told) == sum(SIZES)
        assert len({(disk, offset) for disk, offset, _, _ in told}) == len(told)
        held = made.replica(point.sequence)
        for disk, offset, length, digest in told[3:]:
            assert xxhash.xxh3_128_digest(held[disk][offset : offset + length]) == digest


async def test_a_pass_that_no_point_rests_on_tells_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, audit_rate=MIB) as made:
        made.clock.now += 100
        running = asyncio.create_task(made.scan.run())
        async with asyncio.timeout(20):
            while not made.scan.is_whole:
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})
        assert made.told() == []


async def test_only_what_changed_is_sent_also_after_a_restart(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        await made.scan.point(made.mark)
    async with rig(tmp_path) as made:
        made.write(0, 2 * MIB + 100, b"changed")
        assert not made.scan.is_whole
        point = await made.scan.point(made.mark)
        assert made.scan.copied_bytes == 64 << 10
        assert made.replica(point.sequence) == made.held()


async def test_what_was_written_before_a_point_was_asked_for_is_in_it(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        await made.scan.point(made.mark)
        made.write(1, 0, b"first chunk, which the last pass has been over")
        point = await made.scan.point(made.mark)
        assert made.replica(point.sequence) == made.held()


def after_reads(made: Rig, change: Callable[[int], None]) -> None:
    """Have `change` called with the number of every read of both volumes, behind it."""
    count = 0
    for volume in made.scan._volumes:
        read = volume.read_into

        def counted(offset: int, target: memoryview, read: Callable[[int, memoryview], None] = read) -> None:
            nonlocal count
            read(offset, target)
            count += 1
            change(count)

        volume.read_into = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_written_when_a_point_is_a_state_that_both_disks_had_at_once(
    tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    async with rig(tmp_path) as made:
        states, stop_at = [made.held()], draw.randrange(2, 30)

        def change(count: int) -> None:
            if count < stop_at and draw.random() < 0.4:
                disk = draw.randrange(2)
                made.write(disk, draw.randrange(SIZES[disk] - 600), draw.randbytes(600))
                states.append(made.held())

        after_reads(made, change)
        point = await made.scan.point(made.mark)
        assert made.replica(point.sequence) in states


async def test_disks_that_are_never_left_alone_have_no_point_and_are_told_why(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        after_reads(made, lambda count: made.write(count % 2, 0, count.to_bytes(8, "little")))
        with pytest.raises(TransientError, match=f"each of {MAX_TRIES} passes found changes"):
            await made.scan.point(made.mark)
        assert made.marked == []
        assert made.ladder.in_gap


async def test_a_disk_that_can_not_be_read_has_no_point_and_is_scanned_again(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        broken = True

        def fail(count: int) -> None:
            if broken and count == 7:
                raise OSError(5, "Input/output error")

        after_reads(made, fail)
        with pytest.raises(TransientError, match="Input/output error"):
            await made.scan.point(made.mark)
        broken = False
        point = await made.scan.point(made.mark)
        assert made.replica(point.sequence) == made.held()


async def test_changes_are_as_old_as_the_pass_that_did_not_see_them(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        running = asyncio.create_task(made.scan.run())
        async with asyncio.timeout(20):
            while made.scan.passes < 1:
                await asyncio.sleep(0.01)
            first = made.scan.last
            assert first is not None
            made.write(0, MIB, b"new")
            while made.scan.passes < 3:
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})
        assert made.scan.changed_since_ns is not None
        assert made.scan.changed_since_ns <= first.began_ns
        await made.scan.point(made.mark)
        assert made.scan.last is not None
        assert made.scan.changed_since_ns == made.scan.last.began_ns


def test_a_volume_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"gone can't be opened: No such file"):
        FileVolume(tmp_path / "gone", 512)


def test_a_volume_that_ends_early_says_where(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    volume = FileVolume(tmp_path / "short", 512)
    with pytest.raises(OSError, match="ends at 100"):
        volume.read_into(0, memoryview(bytearray(512)))
    volume.close()


def test_scanning_needs_nothing_of_linux(tmp_path: Path) -> None:
    (tmp_path / "volume").write_bytes(b"abc" * 1000)
    program = f"""
import sys
for name in ("fcntl", "ctypes", "termios", "pwd", "grp", "resource"):
    sys.modules[name] = None
import os
del os.preadv, os.O_DIRECT, os.O_CLOEXEC
from pathlib import Path
import mobility_agent.capture.scan.passes
from mobility_agent.capture.scan.volume import FileVolume
target = bytearray(2000)
FileVolume(Path({str(tmp_path / "volume")!r}), 3000).read_into(1000, memoryview(target))
assert bytes(target) == (b"abc" * 1000)[1000:3000]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
