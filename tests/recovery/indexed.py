"""What the tests of checkpoints and of retention share: long random logs, an index made of them, disks read back."""

from __future__ import annotations

import random
from typing import Final

from process_server.logwriter import LogLimits
from recovery.indexing import Indexed, make_index
from recovery.view import View
from replicar.clock import SystemClock
from replicar.formats.record import DiskAction
from replicar.log.tail import Stored
from replicar.storage import PageBlobStore
from tests.recovery.log_builder import LogBuilder

SECTOR: Final = 512
SECTORS: Final = (64, 24)


class Story:
    """A machine whose disks come, go, grow and shrink, and whose log has gaps, points, audits and several writers.

    `offered` are the sequences outside of gaps, `ends` those that a segment ends with.
    """

    def __init__(self, store: PageBlobStore, seed: int, *, tick_ns: int = 0, limits: LogLimits | None = None) -> None:
        self.random = random.Random(seed)
        stripes = self.random.choice([1, 3])
        self.builder = LogBuilder(store, stripe_count=stripes, frame_descriptors=9, blob_bytes=1 << 20, limits=limits)
        self.offered: list[int] = []
        self.marks: dict[str, int] = {}
        self.ends: list[int] = []
        self.tick_ns = tick_ns
        self._in_gap = False
        self._names = 0
        self.builder.begin(*(sectors * SECTOR for sectors in SECTORS))
        self.offered.append(self.builder.sequence - 1)

    async def go_on(self, segments: int) -> None:
        """So many segments more."""
        for _ in range(segments):
            for _ in range(self.random.randrange(1, 12)):
                self._step()
            self.builder.time_ns += self.tick_ns
            await self.builder.seal()
            self.ends.append(self.builder.sequence - 1)
            if self.random.random() < 0.1:
                await self.builder.begin_run()

    async def end_gap(self) -> None:
        """See that the last state is offered."""
        if self._in_gap:
            self._note(self.builder.gap_end(), in_gap=False)
        self._note(self.builder.mark("the-end"))
        await self.builder.seal()
        self.ends.append(self.builder.sequence - 1)

    def _step(self) -> None:
        random_, builder = self.random, self.builder
        disk = random_.choice(sorted(builder.disks))
        sectors = len(builder.disks[disk]) // SECTOR
        start = random_.randrange(sectors)
        length = random_.randrange(1, min(sectors - start, 12) + 1)
        choice = random_.choices("wzmagds", (40, 8, 6, 6, 2, 2, 2))[0]
        if choice == "z":
            self._note(builder.zero(disk, start * SECTOR, length * SECTOR))
        elif choice == "m":
            self._names += 1
            name = f"point-{self._names}"
            self._note(builder.mark(name))
            if not self._in_gap:
                self.marks[name] = builder.sequence - 1
        elif choice == "a" and not self._in_gap:
            self._note(builder.audit(disk, start * SECTOR, length * SECTOR))
        elif choice == "g":
            self._note(builder.gap_end() if self._in_gap else builder.gap_begin("full"), in_gap=not self._in_gap)
        elif choice == "d" and disk == 1:
            self._note(builder.disk(1, "disk1", 0, DiskAction.REMOVED))
            self._note(builder.disk(1, random_.choice(["disk1", "other"]), SECTORS[1] * SECTOR))
        elif choice == "s":
            self._note(builder.disk(0, "disk0", random_.randrange(32, 65) * SECTOR))
        else:
            data = random_.randbytes(16) * (length * SECTOR // 16)
            self._note(builder.write(disk, start * SECTOR, data))

    def _note(self, sequence: int, *, in_gap: bool | None = None) -> None:
        self._in_gap = self._in_gap if in_gap is None else in_gap
        if not self._in_gap:
            self.offered.append(sequence)


async def index_of(builder: LogBuilder, *, every: int = 2, seed: int = 1) -> Indexed:
    """Make the log's index as far as it goes."""
    stored = Stored(builder.number - 1, builder.sequence - 1, builder.previous)
    bytes_of = random.Random(f"{seed} {builder.number}").randbytes
    return await make_index(builder.log, clock=SystemClock(), random=bytes_of, stored=stored, every=every)


async def contents(view: View) -> dict[int, bytes]:
    """Every disk of a view twice: read at random, and put together from its pieces; they must agree."""
    disks = {}
    for disk in view.disks:
        whole = await view.read(disk, 0, disk.size_bytes)
        image = bytearray(disk.size_bytes)
        async for offset, data in view.pieces(disk):
            image[offset : offset + len(data)] = data
        assert bytes(image) == whole
        disks[disk.index] = whole
    return disks
