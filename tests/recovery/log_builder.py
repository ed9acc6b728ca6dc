"""Writes real logs into a store, segment by segment, beside a model that knows every disk after every descriptor."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash
import zstandard

from process_server.logwriter import LogLimits, LogWriter, Writer
from recovery.chunks import MachineLog
from replicar.clock import SystemClock
from replicar.formats import frame, logblob, segment
from replicar.formats.frame import Flag, Kind
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.record import Consistency, Disk, DiskAction, Gap, Mark, pack_record
from replicar.log.reader import Tail
from replicar.storage.store import PageBlobStore

START_NS = 1_780_000_000_000_000_000
TICK_NS = 1_000_000
NO_FLAGS = Flag(0)


@dataclass
class Stripe:
    name: str
    end: int = logblob.HEADER_BYTES


@dataclass
class LogBuilder:
    """Descriptors gather until `seal` makes a segment of them. Time moves one tick with each.

    `expected[sequence]` is every disk's content (bytes by index) after that sequence, if `model` is set. With `limits`
    segments are placed and stored by a process server's log writer: every run is a takeover, and full blobs roll.
    """

    store: PageBlobStore
    machine_id: uuid.UUID = field(default_factory=uuid.uuid4)
    key: bytes = field(default_factory=lambda: os.urandom(32))
    key_id: int = 1
    wrapped_key: bytes = bytes(logblob.WRAPPED_KEY_BYTES)
    blob_bytes: int = 32 << 20
    stripe_count: int = 1
    model: bool = True
    frame_descriptors: int = 7
    chunk_bytes: int = 4096
    compress_level: int = 1
    limits: LogLimits | None = None

    def __post_init__(self) -> None:
        self.sequence = 1
        self.time_ns = START_NS
        self.number = 1
        self.epoch, self.run = 1, 0
        self.previous = segment.FIRST_DIGEST
        self.stripes: list[Stripe] = []
        self.disks: dict[int, bytearray] = {}
        self.expected: dict[int, dict[int, bytes]] = {}
        self.times: dict[int, int] = {}
        self.placed: dict[int, tuple[str, int, int]] = {}  # segment number: blob, offset, length
        self._frames: list[bytes] = []
        self._writer: LogWriter | None = None
        self._first = 1
        self._table, self._payload, self._frame_first = bytearray(), bytearray(), 1

    @property
    def log(self) -> MachineLog:
        return MachineLog(self.store, self.machine_id, {self.key_id: self.key})

    # --- descriptors; each returns its sequence ---

    def write(self, disk: int, offset: int, data: bytes, *, flags: Flag = NO_FLAGS) -> int:
        def change() -> None:
            self.disks[disk][offset : offset + len(data)] = data

        # As an NBD request header would, some bytes that no descriptor names lie between the payloads.
        self._payload += b"\xee" * 28
        return self._add(Kind.WRITE, change, disk=disk, offset=offset, length=len(data), payload=data, flags=flags)

    def zero(self, disk: int, offset: int, length: int) -> int:
        def change() -> None:
            self.disks[disk][offset : offset + length] = bytes(length)

        return self._add(Kind.ZERO, change, disk=disk, offset=offset, length=length)

    def dirty(self, disk: int, offset: int, length: int) -> int:
        return self._add(Kind.DIRTY, _nothing, disk=disk, offset=offset, length=length)

    def audit(self, disk: int, offset: int, length: int, *, digest: bytes | None = None) -> int:
        held = bytes(self.disks[disk][offset : offset + length])
        payload = digest if digest is not None else xxhash.xxh3_128_digest(held)
        return self._add(Kind.AUDIT, _nothing, disk=disk, offset=offset, length=length, payload=payload)

    def mark(self, name: str, consistency: Consistency = Consistency.CRASH) -> int:
        return self._record(Kind.MARK, Mark(name, consistency))

    def gap_begin(self, reason: str = "initial replication") -> int:
        return self._record(Kind.GAP, Gap(reason), flags=Flag.GAP_BEGIN)

    def gap_end(self) -> int:
        return self._record(Kind.GAP, Gap("order is whole again"), flags=Flag.GAP_END)

    def disk(self, index: int, name: str, size: int, action: DiskAction = DiskAction.PRESENT) -> int:
        def change() -> None:
            if action is DiskAction.REMOVED:
                self.disks.pop(index, None)
            else:
                self.disks[index] = (self.disks.get(index, bytearray()) + bytearray(size))[:size]

        return self._record(Kind.DISK, Disk(index, name, size, action), change=change)

    def begin(self, *sizes: int) -> int:
        """What every stream begins with: its disks, and initial replication, at once complete."""
        for index, size in enumerate(sizes):
            self.disk(index, f"disk{index}", size)
        self.gap_begin()
        return self.gap_end()

    # --- frames and segments ---

    def cut_frame(self) -> None:
        if self._table:
            self._frames.append(
                frame.build_frame(self.machine_id, self._frame_first, bytes(self._table), bytes(self._payload))
            )
        self._table, self._payload, self._frame_first = bytearray(), bytearray(), self.sequence

    def jump(self, incarnation: int) -> None:
        """The change log was lost; the next one begins."""
        assert not self._frames, "seal first"
        assert not self._table, "seal first"
        self.sequence = self._first = self._frame_first = (incarnation << frame.INCARNATION_SHIFT) + 1

    async def begin_run(self, *, epoch: int | None = None) -> None:
        """A new writer: the next segment goes into new blobs."""
        if self.limits is not None:
            await self._take_over(self.limits, epoch if epoch is not None else self.epoch)
            return
        self.run += 1
        self.epoch = epoch if epoch is not None else self.epoch
        self.stripes = []
        for index in range(self.stripe_count):
            name = BlobName(self.machine_id, self.epoch, self.run, index)
            await self.store.create(str(name), self.blob_bytes)
            header = BlobHeader(
                name, self.number, self._first, self.previous, self.key_id, self.wrapped_key, self.time_ns
            )
            await self.store.put_pages(str(name), 0, header.pack())
            self.stripes.append(Stripe(str(name)))

    def sealed(self, *, number: int | None = None) -> tuple[bytes, bytes]:
        """What is gathered, as a segment's bytes and digest; it stays gathered."""
        self.cut_frame()
        raw = memoryview(b"".join(self._frames))
        position = segment.Position(
            *(self.machine_id, self.epoch, self.run, number or self.number, self._first, self.sequence - 1)
        )
        compressor = zstandard.ZstdCompressor(level=self.compress_level)
        chunks = segment.seal_chunks(
            raw, position, self.key, os.urandom(32), compressor, key_id=self.key_id, chunk_bytes=self.chunk_bytes
        )
        data, digest = segment.finish(chunks, list(frame.frames_in(raw)), self.previous)
        return bytes(data), digest

    async def seal(self) -> int:
        """Store what is gathered as the next segment; returns its number."""
        if not self.stripes and self._writer is None:
            await self.begin_run()
        if self._writer is not None:
            await self._seal_by(self._writer)
        else:
            data, self.previous = self.sealed()
            stripe = self.stripes[self.number % len(self.stripes)]
            await self.store.put_pages(stripe.name, stripe.end, data)
            self.placed[self.number] = (stripe.name, stripe.end, len(data))
            stripe.end += len(data)
        self._frames, self._first = [], self.sequence
        self.number += 1
        return self.number - 1

    async def _take_over(self, limits: LogLimits, epoch: int) -> None:
        writer = Writer(self.machine_id, epoch, self.key_id, self.key, self.wrapped_key)
        keys = {self.key_id: self.key}
        opened = await LogWriter.open(self.store, writer, limits, SystemClock(), keys=keys)
        assert (opened.tail.number, opened.tail.digest) == (self.number - 1, self.previous)
        self._writer, self.epoch, self.run = opened, epoch, opened.run

    async def _seal_by(self, writer: LogWriter) -> None:
        if not writer.reserve():
            await writer.roll(Tail(self.number - 1, self._first - 1, self.previous))
            assert writer.reserve()
        self.run = writer.run
        data, digest = self.sealed()
        place = await writer.place(len(data))
        await writer.write(place, memoryview(data))
        self.previous = digest
        self.placed[self.number] = (place.blob, place.offset, len(data))

    def _record(
        self,
        kind: Kind,
        body: Mark | Gap | Disk,
        *,
        flags: Flag = NO_FLAGS,
        change: Callable[[], None] | None = None,
    ) -> int:
        data = pack_record(body)
        return self._add(kind, change or _nothing, length=len(data), payload=data, flags=flags)

    def _add(
        self,
        kind: Kind,
        change: Callable[[], None],
        *,
        disk: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        flags: Flag = NO_FLAGS,
    ) -> int:
        if len(self._payload) + len(payload) > frame.MAX_PAYLOAD_BYTES:
            self.cut_frame()
        place = len(self._payload)
        self._payload += payload
        self._table += frame.describe(
            kind, disk=disk, offset=offset, length=length, time_ns=self.time_ns, place=place, flags=flags
        )
        if self.model:
            change()
            self.expected[self.sequence] = {index: bytes(data) for index, data in self.disks.items()}
        sequence = self.sequence
        self.times[sequence] = self.time_ns
        self.sequence += 1
        self.time_ns += TICK_NS
        if len(self._table) // frame.DESCRIPTOR_BYTES >= self.frame_descriptors:
            self.cut_frame()
        return sequence


def _nothing() -> None:
    return None
