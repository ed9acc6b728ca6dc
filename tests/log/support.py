"""Logs for the reader's tests, written into a `MemoryStore` segment by segment, by writers that may die."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence

import zstandard

from replicar.formats import frame, logblob, segment
from replicar.formats.frame import Flag, Kind
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.segment import Position
from replicar.log.reader import LogReader, Segment as Found, Start, Tail
from replicar.storage.memory import MemoryStore

MACHINE = uuid.UUID("11111111-2222-4333-8444-555555555555")
KEY = bytes(range(32))
BLOB_BYTES = 4 << 20


class Writer:
    """One run: makes its stripes, seals segments and puts them down, in order or not."""

    def __init__(
        self, store: MemoryStore, *, epoch: int = 1, run: int = 1, stripes: int = 1, after: Tail | None = None
    ) -> None:
        self.store, self.epoch, self.run, self.stripes = store, epoch, run, stripes
        tail = after or Tail()
        self.number, self.sequence, self.digest = tail.number + 1, tail.sequence + 1, tail.digest
        self.first = (self.number, self.sequence, self.digest)
        self.key = KEY
        self._ends = [logblob.HEADER_BYTES] * stripes

    def name(self, stripe: int = 0) -> str:
        return str(BlobName(MACHINE, self.epoch, self.run, stripe))

    async def begin(self, *, headers: bool = True) -> Writer:
        await self.store.ensure_container()
        for stripe in range(self.stripes):
            await self.store.create(self.name(stripe), BLOB_BYTES)
            if headers:
                name = BlobName(MACHINE, self.epoch, self.run, stripe)
                header = BlobHeader(name, *self.first, 1, bytes(40), 5)
                await self.store.put_pages(self.name(stripe), 0, header.pack())
        return self

    def seal(
        self,
        *,
        machine: uuid.UUID = MACHINE,
        run: int | None = None,
        jump: int = 0,
        anew: bool = False,
        payload_bytes: int = 512,
    ) -> bytes:
        """The next segment of this run: one frame of two writes (or a new beginning, after a jump).

        Beyond 512 bytes the payload can't be compressed.
        """
        self.sequence += jump
        first = frame.describe(Kind.WRITE, length=512, time_ns=self.sequence)
        if anew:
            first = frame.describe(Kind.GAP, length=8, time_ns=self.sequence, flags=Flag.GAP_BEGIN)
        table = first + frame.describe(Kind.WRITE, offset=512, length=512, time_ns=self.sequence)
        payload = hashlib.sha512(b"%d" % self.number).digest() * 8
        payload += hashlib.shake_256(payload).digest(payload_bytes - len(payload))
        raw = frame.build_frame(machine, self.sequence, table, payload)
        where = Position(machine, self.epoch, run or self.run, self.number, self.sequence, self.sequence + 1)
        salt = hashlib.sha256(repr(where).encode()).digest()
        chunks = segment.seal_chunks(memoryview(raw), where, self.key, salt, zstandard.ZstdCompressor(level=1))
        data, self.digest = segment.finish(chunks, list(frame.frames_in(raw)), self.digest)
        self.number += 1
        self.sequence += 2
        return bytes(data)

    def place(self, data: bytes, stripe: int = 0) -> tuple[str, int]:
        """Where the next segment of a stripe goes; taken from then on, written or not."""
        offset = self._ends[stripe]
        self._ends[stripe] += len(data)
        return self.name(stripe), offset

    async def put(self, data: bytes, stripe: int = 0) -> tuple[str, int]:
        name, offset = self.place(data, stripe)
        await self.store.put_pages(name, offset, data)
        return name, offset

    async def write(self, count: int, order: Sequence[int] = (0,)) -> Writer:
        """`count` segments, over the stripes in this order again and again."""
        for index in range(count):
            await self.put(self.seal(), order[index % len(order)])
        return self

    @property
    def tail(self) -> Tail:
        return Tail(self.number - 1, self.sequence - 1, self.digest)


def reader(store: MemoryStore, key: bytes = KEY) -> LogReader:
    return LogReader(store, MACHINE, {1: key})


async def read(
    store: MemoryStore, *, after: Tail | None = None, stored_number: int = 0, stored_digest: bytes | None = None
) -> tuple[list[Found], Tail]:
    """All segments, and where the log ended."""
    log = reader(store)
    start = Start(after) if after is not None else None
    found = [item async for item in log.segments(after=start, stored_number=stored_number, stored_digest=stored_digest)]
    return found, log.tail


async def flip(store: MemoryStore, name: str, offset: int) -> None:
    """Alter one byte of a blob, as a storage that lies would."""
    page = offset // 512 * 512
    data = bytearray(await store.read(name, page, 512))
    data[offset - page] ^= 0xFF
    await store.put_pages(name, page, bytes(data))
