"""A small machine whose log is known: two disks, two writers, everything a stream can say; always the same bytes."""

from __future__ import annotations

import hashlib
import uuid

import xxhash
import zstandard

from replicar.formats import frame, logblob, record, segment
from replicar.formats.frame import Flag, Kind
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.segment import Position

MACHINE = uuid.UUID("6d616368-696e-4520-8000-6f6e65000001")
DATA_KEY = bytes(range(32))
KEY_ID = 1
WRAPPED_KEY = bytes(range(40))  # the vault's matter; what it holds is of no consequence here
FIRST = 1
TIME = 1_764_000_000_000_000_000
BLOB_BYTES = 16 << 10
SYSTEM_BYTES, DATA_BYTES = 16 << 10, 8 << 10

NONE = Flag(0)


class Stream:
    """Frames of one machine, one after the other, and beside them what its disks hold after each sequence."""

    def __init__(self) -> None:
        self.next_sequence = FIRST
        self.frames: list[bytes] = []
        self.states: dict[int, dict[int, bytes]] = {}
        self.in_gap: dict[int, bool] = {}
        self.marks: dict[str, int] = {}
        self._disks: dict[int, bytearray] = {}
        self._gap = False
        self._table: list[bytes] = []
        self._payload = bytearray(b"nbd")  # bytes that no descriptor names, as capture leaves them

    def seal(self) -> None:
        first = self.next_sequence - len(self._table)
        self.frames.append(frame.build_frame(MACHINE, first, b"".join(self._table), bytes(self._payload)))
        self._table, self._payload = [], bytearray(b"nbd")

    def write(self, disk: int, offset: int, data: bytes, flags: Flag = NONE) -> None:
        self._disks[disk][offset : offset + len(data)] = data
        self._describe(Kind.WRITE, disk, offset, len(data), data, flags)

    def zero(self, disk: int, offset: int, length: int) -> None:
        self._disks[disk][offset : offset + length] = bytes(length)
        self._describe(Kind.ZERO, disk, offset, length, b"")

    def dirty(self, disk: int, offset: int, length: int) -> None:
        self._describe(Kind.DIRTY, disk, offset, length, b"")

    def audit(self, disk: int, offset: int, length: int) -> None:
        digest = xxhash.xxh3_128_digest(bytes(self._disks[disk][offset : offset + length]))
        self._describe(Kind.AUDIT, disk, offset, length, digest)

    def mark(self, name: str) -> None:
        self.marks[name] = self.next_sequence
        self._record(Kind.MARK, record.Mark(name, mark_id="m-1"), 0)

    def gap(self, flags: Flag, reason: str) -> None:
        self._gap = flags == Flag.GAP_BEGIN
        self._record(Kind.GAP, record.Gap(reason), 0, flags)

    def disk(self, index: int, name: str, size_bytes: int) -> None:
        old = self._disks.get(index, bytearray())
        self._disks[index] = bytearray(old[:size_bytes].ljust(size_bytes, b"\0"))
        self._record(Kind.DISK, record.Disk(index, name, size_bytes), index)

    def remove(self, index: int, name: str) -> None:
        del self._disks[index]
        self._record(Kind.DISK, record.Disk(index, name, 0, record.DiskAction.REMOVED), index)

    def _record(self, kind: Kind, item: record.Mark | record.Gap | record.Disk, disk: int, flags: Flag = NONE) -> None:
        data = record.pack_record(item)
        self._describe(kind, disk, 0, len(data), data, flags)

    def _describe(self, kind: Kind, disk: int, offset: int, length: int, data: bytes, flags: Flag = NONE) -> None:
        sequence = self.next_sequence
        place = len(self._payload) if data else 0
        self._table.append(
            frame.describe(
                kind, disk=disk, offset=offset, length=length, time_ns=TIME + sequence, place=place, flags=flags
            )
        )
        self._payload += data
        self.next_sequence += 1
        self.states[sequence] = {index: bytes(content) for index, content in self._disks.items()}
        self.in_gap[sequence] = self._gap


def stream() -> Stream:
    """The whole life of the machine: seven frames."""
    made = Stream()
    made.disk(0, "system", SYSTEM_BYTES)
    made.disk(1, "data", DATA_BYTES)
    made.gap(Flag.GAP_BEGIN, "initial replication")
    made.write(0, 0, b"boot" * 256, Flag.SEED)
    made.seal()
    made.write(0, 4096, bytes(range(256)) * 8)
    made.dirty(1, 0, 1024)
    made.write(1, 0, b"seed" * 256, Flag.SEED)
    made.gap(Flag.GAP_END, "everything is copied")
    made.seal()
    made.write(1, 512, b"first" * 512)
    made.mark("before the upgrade \u2713")
    made.write(0, 0, b"BOOT" * 128)
    made.seal()
    made.zero(0, 4096, 512)
    made.audit(0, 4096, 2048)
    made.seal()
    made.write(1, 1024, hashlib.sha512(b"noise").digest() * 8)
    made.disk(0, "system", SYSTEM_BYTES + 1024)
    made.write(0, SYSTEM_BYTES, b"grown!!!" * 128)
    made.seal()
    made.disk(2, "scratch", 512)
    made.remove(2, "scratch")
    made.seal()
    made.write(0, 1024, b"last" * 128)
    made.seal()
    return made


def sealed(
    frames: list[bytes], epoch: int, run: int, number: int, previous: bytes, *, chunk_bytes: int = 4096
) -> tuple[bytes, bytes]:
    """These frames as a segment, with its digest; the salt follows from the place."""
    raw = b"".join(frames)
    items = list(frame.frames_in(raw))
    first, last = items[0][1].header.first_sequence, items[-1][1].header.last_sequence
    position = Position(MACHINE, epoch, run, number, first, last)
    salt = hashlib.sha256(f"{epoch} {run} {number} {first}".encode()).digest()
    compressor = zstandard.ZstdCompressor(level=1)
    chunks = segment.seal_chunks(memoryview(raw), position, DATA_KEY, salt, compressor, chunk_bytes=chunk_bytes)
    data, digest = segment.finish(chunks, items, previous)
    return bytes(data), digest


def log() -> tuple[dict[str, bytes], bytes]:
    """The stream's log, blob by blob, and the digest of its last segment (number 4).

    Run 1 of epoch 1 has two stripes and a third segment that run 1 of epoch 2 replaces.
    """
    frames = stream().frames
    one, first = sealed(frames[:2], 1, 1, 1, segment.FIRST_DIGEST)
    two, second = sealed(frames[2:3], 1, 1, 2, first)
    lost, _ = sealed(frames[3:4], 1, 1, 3, second)
    three, third = sealed(frames[3:5], 2, 1, 3, second)
    four, fourth = sealed(frames[5:], 2, 1, 4, third)
    after_two = stream().frames[:3]
    going_on = list(frame.frames_in(b"".join(after_two)))[-1][1].header.next_sequence
    return {
        **_blob(1, 1, 0, 1, FIRST, segment.FIRST_DIGEST, [one, lost]),
        **_blob(1, 1, 1, 1, FIRST, segment.FIRST_DIGEST, [two]),
        **_blob(2, 1, 0, 3, going_on, second, [three, four]),
    }, fourth


def _blob(
    epoch: int, run: int, stripe: int, number: int, sequence: int, previous: bytes, segments: list[bytes]
) -> dict[str, bytes]:
    name = BlobName(MACHINE, epoch, run, stripe)
    header = BlobHeader(name, number, sequence, previous, KEY_ID, WRAPPED_KEY, TIME)
    return {str(name): (header.pack() + b"".join(segments)).ljust(BLOB_BYTES, b"\0")}


assert len(WRAPPED_KEY) == logblob.WRAPPED_KEY_BYTES
