"""Real loop devices with real file systems, load on them, and a replica that is fed from the change log.

Everything is taken down again, also when a test fails: a file system that was left frozen is thawed first.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import xxhash

from mobility_agent.capture.trace.audits import PointAuditor
from mobility_agent.capture.trace.capture import Point, TraceCapture
from mobility_agent.capture.trace.choice import Method, open_source
from mobility_agent.capture.trace.events import EventSource
from mobility_agent.capture.trace.freeze import Freeze, thaw_all
from mobility_agent.capture.trace.stage import Stage
from mobility_agent.capture.trace.tracked import BlockDevice, TrackedDisk
from mobility_agent.changelog import ChangeLog
from mobility_agent.digests import Digests
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import TouchedRegions
from replicar.clock import SystemClock
from replicar.errors import TransientError
from replicar.formats import frame, record
from replicar.formats.frame import AUDIT_DIGEST_BYTES, Flag, Kind
from tests.mobility_agent.core import MIB, frames_of, open_log
from tests.support.tools import need

#: The smallest that the file system takes.
SIZES = {"ext4": 96 * MIB, "xfs": 320 * MIB}
BOOT_ID = b"boot".ljust(16)
FEED_SECONDS = 0.05
#: Of a point beside load.
TRIES = 5


def run(*command: str | Path) -> str:
    """Run a tool; its output, or an error with what it said."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@dataclass
class LoopDisk:
    """A loop device over a file; `mountpoint` if it has a file system."""

    device: Path
    image: Path
    mountpoint: Path

    @property
    def block(self) -> BlockDevice:
        return BlockDevice(self.device)


def unmount(mountpoint: Path) -> None:
    """Unmount it; in use for longer than whoever was killed may need is a failure."""
    for _ in range(50):  # whoever was killed may need a moment to let go of it
        if subprocess.run(["umount", mountpoint], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    run("umount", mountpoint)


@contextmanager
def loop_disk(directory: Path, name: str, *, filesystem: str = "", size_bytes: int = 0) -> Iterator[LoopDisk]:
    """A loop device with direct I/O, and a mounted file system if one is named."""
    image = directory / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(size_bytes or SIZES[filesystem])
    with attached(image, directory / f"{name}.mnt", filesystem=filesystem) as disk:
        yield disk


@contextmanager
def attached(image: Path, mountpoint: Path, *, filesystem: str = "", make: bool = True) -> Iterator[LoopDisk]:
    """The same over an image that is there; `make` says whether its file system is."""
    device = Path(run("losetup", "-f", "--show", "--direct-io=on", image))
    with ExitStack() as closing:
        closing.callback(run, "losetup", "-d", device)
        if filesystem:
            if make:
                run(need(f"mkfs.{filesystem}"), *(["-q"] if filesystem == "xfs" else ["-q", "-F"]), device)
            mountpoint.mkdir()
            run("mount", device, mountpoint)
            closing.callback(unmount, mountpoint)
            closing.callback(thaw_all, BlockDevice(device).family())
        yield LoopDisk(device, image, mountpoint)


class Image(Protocol):
    """Whatever has a disk's content: a path, for one."""

    def read_bytes(self) -> bytes: ...


class WitnessStage(Stage):
    """A stage that keeps, when everything was read and all is still frozen, what the disks' images hold."""

    def __init__(self, images: Sequence[Image]) -> None:
        super().__init__()
        self.images = list(images)
        self.seen: list[bytes] = []

    def read(self, freeze: Freeze) -> bool:
        done = super().read(freeze)
        if done:
            self.seen = [image.read_bytes() for image in self.images]
        return done


@dataclass
class Replica:
    """The disks that the log describes, fed frame by frame; what was fed is trimmed."""

    log: ChangeLog
    disks: list[bytearray]
    marks: list[str] = field(default_factory=list)
    gap: bool = False
    offered: list[str] = field(default_factory=list)
    audits: list[tuple[int, int, int, bool]] = field(default_factory=list)  # disk, offset, length, whether it agrees
    next_sequence: int = 1

    def feed(self, until: int) -> None:
        """Take in everything up to the sequence `until`."""
        self.log.seal()
        for item in frames_of(self.log, self.next_sequence):
            first = item.header.first_sequence
            if first > until:
                break
            assert first == self.next_sequence or (first > self.next_sequence and frame.begins_anew(item.table))
            self._take(item)
            self.next_sequence = item.header.next_sequence
        self.log.trim(self.next_sequence - 1)

    def _take(self, item: frame.Frame) -> None:
        for offset, length, _, place, disk, kind, flags in item.table.tolist():
            payload = item.payload[place : place + length]
            if kind == Kind.WRITE:
                assert flags & Flag.SEED
                self.disks[disk][offset : offset + length] = payload
            elif kind == Kind.ZERO:
                self.disks[disk][offset : offset + length] = bytes(length)
            elif kind == Kind.AUDIT:
                assert not self.gap, "an audit has its place where order is known"
                agrees = (
                    xxhash.xxh3_128_digest(self.disks[disk][offset : offset + length])
                    == item.payload[place : place + AUDIT_DIGEST_BYTES]
                )
                self.audits.append((disk, offset, length, agrees))
            elif kind == Kind.GAP:
                self.gap = bool(flags & Flag.GAP_BEGIN)
            elif kind == Kind.MARK:
                self.marks.append(record.read_mark(payload).name)
                if not self.gap:
                    self.offered.append(self.marks[-1])


@dataclass
class Rig:
    """A machine under trace capture, its loop disks and its replica."""

    loops: list[LoopDisk]
    disks: list[TrackedDisk]
    log: ChangeLog
    ladder: Ladder
    source: EventSource
    stage: WitnessStage
    capture: TraceCapture
    replica: Replica
    audits: PointAuditor
    count: int = 0

    async def point(self) -> Point:
        """Make a point, and see that the replica is then what the disks were. On a busy machine it takes some tries."""
        self.count += 1
        name = f"point {self.count}"
        for _ in range(TRIES - 1):
            with suppress(TransientError):  # the churn was faster than the copying
                point = await self.capture.point(lambda: self.log.append_record(Kind.MARK, record.Mark(name)))
                break
        else:
            point = await self.capture.point(lambda: self.log.append_record(Kind.MARK, record.Mark(name)))
        self.replica.feed(point.sequence)
        assert self.replica.offered[-1] == name
        for number, seen in enumerate(self.stage.seen):
            assert_same(self.replica.disks[number], seen, f"disk {number} at {name}")
        return point


def assert_same(replica: bytes | bytearray, source: bytes, what: str) -> None:
    """Equal to the byte; else where not."""
    if replica != source:
        differing = [at for at in range(0, len(source), 4096) if replica[at : at + 4096] != source[at : at + 4096]]
        raise AssertionError(f"{what}: {len(differing)} of {len(source) // 4096} blocks differ, first {differing[:5]}")


@asynccontextmanager
async def tracing(
    directory: Path,
    loops: list[LoopDisk],
    *,
    source: EventSource | None = None,
    method: Method = Method.BPF,
    budget_seconds: float = 3.0,
    discard_ranges: bool = False,
    stage: WitnessStage | None = None,
    audit_rate: int = 1 << 40,
    replica: Replica | None = None,
    boot_id: bytes = BOOT_ID,
    feed_seconds: float = FEED_SECONDS,
) -> AsyncIterator[Rig]:
    """Trace these disks; the budget is large by default, since the witness reads the whole image in it.

    Args:
        directory: of the agent's state, kept over calls.
        audit_rate: of the audits, which run only where a story makes them.
        replica: what an earlier agent of this machine fed; by default one that has nothing, and garbage for disks.
        boot_id: of the machine's last start.
        feed_seconds: how often the replica takes what there is.
    """
    source = source or open_source(method, discard_ranges=discard_ranges)
    stage = stage or WitnessStage([loop.image for loop in loops])
    log = open_log(directory / "log", limit_bytes=128 * MIB, boot_id=boot_id)
    with ExitStack() as closing:
        closing.callback(log.abandon)
        disks = []
        for index, loop in enumerate(loops):
            disk = TrackedDisk(index, loop.device.name, loop.device, discard_ranges=discard_ranges)
            closing.callback(disk.close)
            disk.follow(DirtyRegions(directory / f"{index}.regions", disk.size_bytes))
            closing.callback(disk.regions.close)
            disks.append(disk)
        touched, digests = {}, {}
        for disk in disks:
            touched[disk.index] = TouchedRegions(directory / f"{disk.index}.touched", disk.size_bytes)
            closing.callback(touched[disk.index].close)
            digests[disk.index] = Digests(directory / f"{disk.index}.digests", disk.size_bytes)
            closing.callback(digests[disk.index].close)
        ladder = Ladder(log, disks, {disk.index: disk.regions for disk in disks}, touched, digests)
        ladder.start()
        if replica is None:
            replica = Replica(log, [bytearray(os.urandom(4096) * (disk.size_bytes // 4096)) for disk in disks])
        replica.log = log
        clock = SystemClock()
        audits = PointAuditor(ladder, clock, directory / "audit.json", bytes_per_second=audit_rate)
        capture = TraceCapture(
            ladder, disks, source, clock, freeze_budget_seconds=budget_seconds, stage=stage, audits=audits
        )
        async with capture:
            running = asyncio.create_task(capture.run())
            feeding = asyncio.create_task(_feed(replica, feed_seconds))
            try:
                yield Rig(loops, disks, log, ladder, source, stage, capture, replica, audits)
            finally:
                for task in (running, feeding):
                    task.cancel()
                results = await asyncio.gather(running, feeding, return_exceptions=True)
        for result in results:
            if not isinstance(result, asyncio.CancelledError):
                raise result if isinstance(result, BaseException) else AssertionError("a task ended")


async def _feed(replica: Replica, every_seconds: float) -> None:
    """Take the log's frames as a sender would, so that it does not fill up."""
    while True:
        replica.feed(replica.log.next_sequence)
        await asyncio.sleep(every_seconds)


class Churn:
    """Files made, changed, truncated, removed and trimmed at random on some mounted file systems, in a process each."""

    SCRIPT = """
import os, random, subprocess, sys
root, seed, fstrim = sys.argv[1], int(sys.argv[2]), sys.argv[3]
draw = random.Random(seed)
def name(): return f"{root}/{draw.randrange(24)}"
while True:
    what = draw.random()
    try:
        if what < 0.55:
            with open(name(), "r+b" if draw.random() < 0.5 else "wb") as file:
                file.seek(draw.randrange(0, 1 << 20))
                file.write(draw.randbytes(draw.choice((100, 4096, 40000, 300000))))
                if draw.random() < 0.3:
                    os.fsync(file.fileno())
        elif what < 0.75:
            os.remove(name())
        elif what < 0.85:
            os.rename(name(), name())
        elif what < 0.9:
            os.truncate(name(), draw.randrange(0, 1 << 19))
        elif what < 0.95:
            fd = os.open(name(), os.O_RDWR)
            try:
                os.posix_fallocate(fd, 0, 1 << 18)
            finally:
                os.close(fd)
        elif what < 0.952:
            subprocess.run([fstrim, root], capture_output=True)
        else:
            os.sync()
    except OSError:
        pass
"""

    def __init__(self, mountpoints: list[Path], seed: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mountpoints, self._seed = mountpoints, seed

    def __enter__(self) -> Churn:
        for number, mountpoint in enumerate(self._mountpoints):
            command = [sys.executable, "-c", self.SCRIPT, str(mountpoint), str(self._seed + number), "fstrim"]
            self._processes.append(subprocess.Popen(command, cwd="/", start_new_session=True))
            fio = [
                need("fio"),
                "--name=r",
                f"--directory={mountpoint}",
                "--size=8M",
                "--rw=randwrite",
                "--bsrange=4k-64k",
            ]
            fio += [
                "--ioengine=libaio",
                "--direct=1",
                "--iodepth=8",
                "--time_based",
                "--runtime=60",
                "--rate_iops=1500",
                "--thread",  # so that killing it kills all of it
            ]
            self._processes.append(subprocess.Popen(fio, cwd="/", start_new_session=True, stdout=subprocess.DEVNULL))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; a second time it is nothing, for the numbers of processes are given again."""
        processes, self._processes = self._processes, []
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


def random_direct_writes(device: Path, count: int, *, seed: int, span: int) -> None:
    """Direct 4 KiB writes to a raw device, one after the other."""
    draw = random.Random(seed)
    page = mmap.mmap(-1, 4096)
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        for _ in range(count):
            page[:] = draw.randbytes(4096)
            os.pwrite(fd, page, draw.randrange(0, span, 4096))
    finally:
        os.close(fd)
        page.close()
