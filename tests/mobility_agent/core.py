"""An agent's core without its service: log, ladder and inline capture over one small disk, for the tests beside it.

`replay` is how these tests know what a log says: it does to zeros what every descriptor says, in order.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mobility_agent.allocation import asking
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.inline import Address, InlineCapture
from mobility_agent.changelog import ChangeLog
from mobility_agent.digests import Digests
from mobility_agent.extents import DirtyExtents
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.seeding import Seeder
from mobility_agent.touched import TouchedRegions
from replicar.clock import SystemClock
from replicar.formats import frame
from replicar.formats.frame import Flag, Kind

MACHINE = uuid.UUID(int=7)
MIB = 1 << 20
FILE_BYTES = 4 * MIB


@dataclass
class Core:
    """What `agent_core` gives."""

    log: ChangeLog
    disk: Disk
    ladder: Ladder
    capture: InlineCapture
    socket: Path
    seeder: Seeder


def open_log(directory: Path, *, limit_bytes: int = 8 * FILE_BYTES, boot_id: bytes = b"boot".ljust(16)) -> ChangeLog:
    return ChangeLog(
        directory,
        MACHINE,
        first_sequence=1,
        limit_bytes=limit_bytes,
        boot_id=boot_id,
        clock=SystemClock(),
        file_bytes=FILE_BYTES,
    )


@asynccontextmanager
async def agent_core(
    directory: Path,
    *,
    disk_bytes: int = 8 * MIB,
    limit_bytes: int = 8 * FILE_BYTES,
    boot_id: bytes = b"boot".ljust(16),
    extents_held: int = 4096,
    address: Address | None = None,
    tls: ssl.SSLContext | None = None,
    file: Path | None = None,
    copy_free_space: bool = True,
) -> AsyncIterator[Core]:
    """Serve `directory`/disk.img; state in `directory`, kept over calls."""
    image = directory / "disk.img"
    if not image.exists():
        with image.open("wb") as made:
            made.truncate(disk_bytes)
    log = open_log(directory / "log", limit_bytes=limit_bytes, boot_id=boot_id)
    disk = Disk(0, "root", image)
    regions = DirtyRegions(directory / "root.regions", disk.size_bytes)
    touched = TouchedRegions(directory / "root.touched", disk.size_bytes)
    digests = Digests(directory / "root.digests", disk.size_bytes)
    extents = DirtyExtents(directory / "extents", capacity=extents_held)
    skipped = asking.open_map(directory / "root.free", regions, copy_free_space=copy_free_space)
    ladder = Ladder(log, [disk], {0: regions}, {0: touched}, {0: digests}, extents, {0: skipped} if skipped else {})
    ladder.start()
    asking.settle(ladder, [disk], copy_free_space=copy_free_space)
    socket = directory / "nbd"
    files = {"root": file} if file is not None else {}
    try:
        async with InlineCapture(
            ladder, {"root": address or socket}, files=files, keepers=directory / "files", tls=tls
        ) as capture:
            yield Core(log, disk, ladder, capture, socket, Seeder(ladder, SystemClock()))
        await log.close()
    finally:
        extents.close()
        digests.close()
        if skipped is not None:
            skipped.close()
        touched.close()
        regions.close()
        disk.close()


def frames_of(log: ChangeLog, sequence: int | None = None) -> list[frame.Frame]:
    """Every sealed frame that the log holds, verified."""
    at = log.first_sequence if sequence is None else sequence
    frames = []
    while (data := log.take(at)) is not None:
        for _, found in frame.frames_in(bytes(data)):
            if found.header.first_sequence >= at:
                frames.append(found)
            at = max(at, found.header.next_sequence)
    return frames


def replay(frames: list[frame.Frame], disk_bytes: int, *, base: bytes | None = None) -> bytes:
    """The disk that the frames describe."""
    disk = bytearray(base or bytes(disk_bytes))
    for item in frames:
        for offset, length, _, place, _, kind, _ in item.table.tolist():
            if kind == Kind.WRITE:
                disk[offset : offset + length] = item.payload[place : place + length]
            elif kind == Kind.ZERO:
                disk[offset : offset + length] = bytes(length)
    return bytes(disk)


def gap_flags(frames: list[frame.Frame]) -> list[Flag]:
    """The GAP records of the frames, as their flags, in order."""
    return [Flag(flags) for item in frames for _, _, _, _, _, kind, flags in item.table.tolist() if kind == Kind.GAP]
