"""A small machine whose point is served: data, holes and zeros on its first disk, a second one that is smaller."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from recovery.export.disk import ServedDisk, base_of
from recovery.export.overlay import Overlay
from recovery.export.server import ExportServer
from recovery.points import Latest, locate
from recovery.view import View
from replicar.formats import segment
from replicar.nbd.client import NbdClient
from replicar.storage import MemoryStore
from tests.recovery.log_builder import LogBuilder

MIB = 1 << 20
SIZES = (16 * MIB + 512, 2 * MIB)
MACHINE = uuid.UUID("6d616368-696e-4520-8000-6f6e65000001")


async def build() -> LogBuilder:
    """Always the same log, but for its seals."""
    store = MemoryStore()
    await store.ensure_container()
    builder = LogBuilder(store, machine_id=MACHINE, chunk_bytes=segment.DEFAULT_CHUNK_BYTES)
    random_ = random.Random(5)
    builder.begin(*SIZES)
    builder.model = False  # a copy of the disks for every descriptor would be too much here

    def write(disk: int, offset: int, length: int) -> None:
        data = random_.randbytes(length)
        builder.write(disk, offset, data)
        builder.disks[disk][offset : offset + length] = data

    for offset in range(0, 4 * MIB, MIB):
        write(0, offset, MIB)
        await builder.seal()
    write(0, 9 * MIB - 4096, 12288)
    write(0, SIZES[0] - 8192, 8192)
    write(1, MIB, 65536)
    for _ in range(40):
        write(0, 4096 * random_.randrange(0, 1024), 4096)
    await builder.seal()
    builder.zero(0, 2 * MIB, MIB)
    builder.disks[0][2 * MIB : 3 * MIB] = bytes(MIB)
    await builder.seal()
    return builder


async def view_of(builder: LogBuilder) -> View:
    return View(builder.log, await locate(builder.log, Latest()))


def served(view: View, *, overlay: Path | None = None, scratch: Path | None = None) -> list[ServedDisk]:
    """All disks: with overlays at `overlay` (its name with the disk's behind it), or thrown away, or without."""
    disks = []
    for disk in view.disks:
        over = None
        if overlay is not None:
            over = Overlay.kept(overlay.with_suffix(f".{disk.name}"), base_of(view, disk), created_ns=1)
        elif scratch is not None:
            over = Overlay.thrown_away(scratch, base_of(view, disk))
        disks.append(ServedDisk(view, disk, over))
    return disks


async def run(*command: str | Path) -> tuple[int, str]:
    """A tool's status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


@asynccontextmanager
async def exported(disks: list[ServedDisk], socket: Path, export: str) -> AsyncIterator[NbdClient]:
    """A client of one of the disks, served at a socket."""
    async with ExportServer(disks, socket), await NbdClient.connect(socket, export=export) as client:
        yield client
