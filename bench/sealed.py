"""A machine's log in memory, really compressed and sealed, and indexed: what recovery is measured on.

A disk may be copied first, in writes of 1 MiB as initial replication makes them, and is then written at random, 4 KiB a
write. What is written is that of all benchmarks (see `data`).
"""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import zstandard

from bench.data import mixed
from recovery.chunks import MachineLog
from recovery.extents import Ints
from recovery.indexing import make_index
from replicar.clock import SystemClock
from replicar.formats import frame, logblob, segment
from replicar.formats.frame import Flag, Kind
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.record import Disk, Gap, pack_record
from replicar.log.tail import Stored
from replicar.storage import MemoryStore

WRITE_BYTES: Final = 4096
WRITES_A_FRAME: Final = 250
FRAMES_A_SEGMENT: Final = 4
COPY_BYTES: Final = 1 << 20
COPIES_A_SEGMENT: Final = 3
_DATA_BYTES: Final = 16 << 20
_START_NS: Final = 1_780_000_000_000_000_000


class CountingStore(MemoryStore):
    """Counts reads; each takes `round_trip_seconds` longer than it does. If it `remembers`, what was read once
    is there when it is read again, without being copied."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.round_trip_seconds = 0, 0.0
        self.remembers = False
        self._read: dict[tuple[str, int, int], bytes] = {}

    async def read(self, name: str, offset: int, length: int) -> bytes:
        self.reads += 1
        if self.round_trip_seconds:
            await asyncio.sleep(self.round_trip_seconds)
        if not self.remembers:
            return await super().read(name, offset, length)
        found = self._read.get((name, offset, length))
        if found is None:
            found = self._read[name, offset, length] = await super().read(name, offset, length)
        return found


@dataclass
class SealedLog:
    """A machine's log in memory, and how it came to be."""

    log: MachineLog
    store: CountingStore
    segments: int
    writes: int
    first_write: int  # the sequence of the first random one
    last_sequence: int
    blocks: Ints  # what was written at random, in order
    digest: bytes
    index_bytes: int = 0

    def writes_before(self, sequence: int) -> int:
        """How many of `blocks` are written at a sequence."""
        return sequence - self.first_write + 1


async def sealed_log(size_bytes: int, writes: int, seed: int, *, is_copied: bool = False) -> SealedLog:
    """A disk of that size, copied as a whole first if `is_copied`, and then written at random so often."""
    random_ = np.random.default_rng(seed)
    store, machine, key = CountingStore(), uuid.UUID(int=size_bytes + seed, version=4), os.urandom(32)
    await store.ensure_container()
    name = BlobName(machine, 1, 1, 0)
    await store.create(str(name), 64 << 30)
    header = BlobHeader(name, 1, 1, segment.FIRST_DIGEST, 1, bytes(logblob.WRAPPED_KEY_BYTES), _START_NS)
    await store.put_pages(str(name), 0, header.pack())
    compressor = zstandard.ZstdCompressor(level=1)
    source = mixed(_DATA_BYTES, seed=seed)
    sequence, place, number, digest, done = 1, logblob.HEADER_BYTES, 1, segment.FIRST_DIGEST, 0
    frames = [_beginning(machine, size_bytes)]
    sequence += 3
    first, copied, written = 1, 0 if is_copied else size_bytes, list[Ints]()
    while copied < size_bytes or done < writes or frames:
        room = COPIES_A_SEGMENT if copied < size_bytes else FRAMES_A_SEGMENT
        while copied < size_bytes and len(frames) < room:
            frames.append(_copy(machine, sequence, copied, source))
            sequence, copied = sequence + 1, copied + COPY_BYTES
        while copied >= size_bytes and done < writes and len(frames) < room:
            count = min(WRITES_A_FRAME, writes - done)
            blocks = random_.integers(0, size_bytes // WRITE_BYTES, count)
            at = WRITE_BYTES * int(random_.integers(0, (_DATA_BYTES - COPY_BYTES) // WRITE_BYTES))
            frames.append(_frame(machine, sequence, blocks, source, at))
            sequence, done = sequence + count, done + count
            written.append(blocks)
        raw = memoryview(b"".join(frames))
        where = segment.Position(machine, 1, 1, number, first, sequence - 1)
        chunks = segment.seal_chunks(raw, where, key, os.urandom(32), compressor)
        data, digest = segment.finish(chunks, list(frame.frames_in(raw)), digest)
        await store.put_pages(str(name), place, data)
        place, number, first, frames = place + len(data), number + 1, sequence, []
    log = MachineLog(store, machine, {1: key})
    there = np.concatenate(written)
    made = SealedLog(log, store, number - 1, writes, sequence - writes, sequence - 1, there, digest)
    stored = Stored(made.segments, made.last_sequence, digest)
    made.index_bytes = (await make_index(log, clock=SystemClock(), random=os.urandom, stored=stored)).written_bytes
    return made


def _beginning(machine: uuid.UUID, size_bytes: int) -> bytes:
    records = [pack_record(Disk(0, "disk0", size_bytes)), pack_record(Gap("seeding")), pack_record(Gap("seeded"))]
    kinds = ((Kind.DISK, Flag(0)), (Kind.GAP, Flag.GAP_BEGIN), (Kind.GAP, Flag.GAP_END))
    table, payload = b"", b""
    for (kind, flags), data in zip(kinds, records, strict=True):
        table += frame.describe(kind, length=len(data), time_ns=_START_NS, place=len(payload), flags=flags)
        payload += data
    return frame.build_frame(machine, 1, table, payload)


def _copy(machine: uuid.UUID, sequence: int, offset: int, data: memoryview) -> bytes:
    """One write of initial replication."""
    at = offset % _DATA_BYTES
    table = frame.describe(Kind.WRITE, offset=offset, length=COPY_BYTES, time_ns=_START_NS + sequence, flags=Flag.SEED)
    return frame.build_frame(machine, sequence, table, data[at : at + COPY_BYTES])


def _frame(machine: uuid.UUID, sequence: int, blocks: Any, data: memoryview, at: int) -> bytes:
    table = bytearray()
    for row, block in enumerate(blocks.tolist()):
        table += frame.describe(
            Kind.WRITE,
            offset=block * WRITE_BYTES,
            length=WRITE_BYTES,
            time_ns=_START_NS + sequence + row,
            place=row * WRITE_BYTES,
        )
    return frame.build_frame(machine, sequence, bytes(table), data[at : at + len(blocks) * WRITE_BYTES])
