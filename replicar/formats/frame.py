"""A frame: the one unit from capture to blob, a run of disk changes with their bytes and a table of what they are.

The change log is frames, the wire carries the same bytes, the process server's cache stores the same bytes, and a
segment is a run of frames compressed and sealed. Nobody re-encodes one, so nobody can re-encode one wrongly.

    header 64 | payload, padded to 8 | table: count x 32

The table lies *behind* the payload, so that an agent can receive writes straight into their final place and describe
them afterwards. A payload may hold bytes that no descriptor names (an NBD request header, say): only the descriptors
give bytes a meaning. Three checksums (header, payload, table) allow each to be judged alone: recovery reads tables
without payloads.

Checksums find accidents, not attackers: on the wire TLS stands guard, in storage the seal of the segment.

Sequence numbers count descriptors: descriptor i of a frame has sequence `first_sequence + i`, whatever its kind.
One machine is one stream, over all its disks. The upper 16 bits are the *incarnation* of the machine's change log
(raised when a log was lost and begun anew), so that numbers never repeat.

Weak: a frame names no codec but 0 yet, so payloads are compressed at the process server only.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import xxhash

from replicar.errors import CorruptionError, LimitError
from replicar.formats.descriptor import (
    AUDIT_DIGEST_BYTES as AUDIT_DIGEST_BYTES,
    DESCRIPTOR as DESCRIPTOR,
    DESCRIPTOR_BYTES as DESCRIPTOR_BYTES,
    MAX_DISK_BYTES as MAX_DISK_BYTES,
    MAX_RECORD_BYTES as MAX_RECORD_BYTES,
    MAX_TIME_NS as MAX_TIME_NS,
    PACK_DESCRIPTOR as PACK_DESCRIPTOR,
    SECTOR_BYTES as SECTOR_BYTES,
    Buffer as Buffer,
    Flag as Flag,
    Kind as Kind,
    Table as Table,
    begins_anew as begins_anew,
    check_table as check_table,
    describe as describe,
    payload_ends as payload_ends,
    table_view as table_view,
)

MAGIC: Final = b"RPFR"
VERSION: Final = 1
HEADER_BYTES: Final = 64
ALIGNMENT: Final = 8

#: One NBD request of 1 MiB with its header must fit, and some small ones beside it.
MAX_PAYLOAD_BYTES: Final = (1 << 20) + (64 << 10)
#: 128 KiB of table; a frame of 4 KiB writes holds 272.
MAX_DESCRIPTORS: Final = 4096
MAX_FRAME_BYTES: Final = HEADER_BYTES + MAX_PAYLOAD_BYTES + MAX_DESCRIPTORS * DESCRIPTOR_BYTES
#: Sequences end below this, so that "the next one" fits 64 bits.
MAX_SEQUENCE: Final = (1 << 64) - 2
#: Sequence numbers of one incarnation; the incarnation is what lies above.
INCARNATION_SHIFT: Final = 48
#: A change log that has to leave numbers out begins anew at a multiple of this, plus one.
ANEW_STEP: Final = 1 << 32

_HEADER = struct.Struct("<4sBBHII16sQQQQ")
assert _HEADER.size == HEADER_BYTES


class FrameHeader(NamedTuple):
    """The first 64 bytes of a frame, decoded. A tuple, since every frame needs one and a dataclass costs threefold."""

    machine_id: uuid.UUID
    first_sequence: int
    count: int  # type: ignore[assignment]  # hides a method of tuples that nobody wants of a header
    payload_bytes: int
    payload_checksum: int
    table_checksum: int

    @property
    def last_sequence(self) -> int:
        return self.first_sequence + self.count - 1

    @property
    def next_sequence(self) -> int:
        return self.first_sequence + self.count

    @property
    def table_offset(self) -> int:
        """Where the table begins, in bytes from the frame's start."""
        return HEADER_BYTES + padded(self.payload_bytes)

    @property
    def frame_bytes(self) -> int:
        padding = -self.payload_bytes & (ALIGNMENT - 1)
        return HEADER_BYTES + self.payload_bytes + padding + self.count * DESCRIPTOR_BYTES

    def pack(self) -> bytes:
        body = _HEADER.pack(
            MAGIC,
            VERSION,
            0,
            0,
            self.payload_bytes,
            self.count,
            self.machine_id.bytes,
            self.first_sequence,
            self.payload_checksum,
            self.table_checksum,
            0,
        )[:-8]
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose checksums and descriptors were verified, as views of the buffer it lies in."""

    header: FrameHeader
    data: memoryview

    @property
    def payload(self) -> memoryview:
        return self.data[HEADER_BYTES : HEADER_BYTES + self.header.payload_bytes]

    @property
    def table(self) -> Table:
        return table_view(self.data[self.header.table_offset : self.header.frame_bytes])


def padded(count: int) -> int:
    """`count` rounded up to the alignment of a frame's parts."""
    return (count + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


def anew_after(sequence: int) -> int:
    """The first sequence above `sequence` at which a log may begin anew."""
    return (sequence // ANEW_STEP + 1) * ANEW_STEP + 1


def may_begin_anew(sequence: int) -> bool:
    """Whether a log that begins at `sequence` may be one that began anew, leaving numbers out."""
    return sequence % ANEW_STEP == 1


def read_header(data: Buffer, offset: int = 0) -> FrameHeader | None:
    """Decode the header at `offset`.

    Returns:
        None when fewer than 64 bytes are there.

    Raises:
        CorruptionError: when what is there is no header of this version within the limits.
    """
    if len(data) - offset < HEADER_BYTES:
        return None
    raw = bytes(data[offset : offset + HEADER_BYTES])
    fields = _HEADER.unpack(raw)
    magic, version, codec, flags, payload_bytes, count, machine, first, payload_sum, table_sum, own = fields
    if magic != MAGIC:
        raise _corrupt("no frame begins here", offset, magic=magic.hex())
    if xxhash.xxh3_64_intdigest(raw[:-8]) != own:
        raise _corrupt("the frame's header fails its checksum", offset)
    if version != VERSION or codec or flags:
        raise CorruptionError(
            f"frame version {version}, codec {codec}, flags {flags:#x} is not known here",
            hint="a newer part wrote this; upgrade this one",
            offset=offset,
        )
    if not 0 < count <= MAX_DESCRIPTORS or payload_bytes > MAX_PAYLOAD_BYTES:
        raise _corrupt(f"the frame claims {count} descriptors and {payload_bytes} bytes", offset)
    if first == 0 or first + count - 1 > MAX_SEQUENCE:
        raise _corrupt(f"the frame claims {count} sequences from {first} on", offset)
    return FrameHeader(_machine(machine), first, count, payload_bytes, payload_sum, table_sum)


def read_frame(data: Buffer, offset: int = 0) -> Frame | None:
    """Decode and verify the whole frame at `offset`: checksums, and that every descriptor makes sense.

    Returns:
        None when the frame is not all there yet.

    Raises:
        CorruptionError: when its bytes are not those that were sealed, or its descriptors point out of bounds.
    """
    header = read_header(data, offset)
    if header is None or len(data) - offset < header.frame_bytes:
        return None
    return read_body(header, data, offset)


def read_body(header: FrameHeader, data: Buffer, offset: int = 0) -> Frame:
    """Verify the frame at `offset`, which is all there, behind its header, which was decoded already.

    Raises:
        CorruptionError: as `read_frame`.
    """
    table_offset, frame_bytes = header.table_offset, header.frame_bytes
    view = memoryview(data)[offset : offset + frame_bytes]
    table_bytes = view[table_offset:]
    if xxhash.xxh3_64_intdigest(table_bytes) != header.table_checksum:
        raise _corrupt("the frame's table fails its checksum", offset, sequence=header.first_sequence)
    if xxhash.xxh3_64_intdigest(view[HEADER_BYTES:table_offset]) != header.payload_checksum:
        raise _corrupt("the frame's payload fails its checksum", offset, sequence=header.first_sequence)
    check_table(table_bytes, header.payload_bytes, sequence=header.first_sequence)
    return Frame(header, view)


def seal_in_place(
    region: memoryview, payload_bytes: int, table: Buffer, machine_id: uuid.UUID, first_sequence: int
) -> int:
    """Finish a frame whose payload already lies at region[64 : 64 + payload_bytes]: add the table, then the header.

    The header is written last, and its first 8 bytes (one store) last of all, so that a region is never taken for a
    frame before it is one, nor for half a frame if the process is killed in here.

    Args:
        region: writable, at least as long as the frame will be.
        table: the descriptors' bytes, a multiple of 32.

    Returns:
        The frame's length in bytes.

    Raises:
        LimitError: when payload or table are larger than a frame may be, or the region than it is, or when sequence
            numbers have run out.
    """
    count, rest = divmod(len(table), DESCRIPTOR_BYTES)
    table_offset = HEADER_BYTES + padded(payload_bytes)
    frame_bytes = table_offset + len(table)
    fits = 0 <= payload_bytes <= MAX_PAYLOAD_BYTES and 0 < count <= MAX_DESCRIPTORS and frame_bytes <= len(region)
    if rest or not fits or not 0 < first_sequence <= MAX_SEQUENCE + 1 - count:
        raise LimitError(
            f"a frame of {payload_bytes} bytes and {count} descriptors does not fit here", sequence=first_sequence
        )
    region[HEADER_BYTES + payload_bytes : table_offset] = bytes(table_offset - HEADER_BYTES - payload_bytes)
    region[table_offset:frame_bytes] = table
    header = FrameHeader(
        machine_id,
        first_sequence,
        count,
        payload_bytes,
        xxhash.xxh3_64_intdigest(region[HEADER_BYTES:table_offset]),
        xxhash.xxh3_64_intdigest(table),
    ).pack()
    region[8:HEADER_BYTES] = header[8:]
    region[:8] = header[:8]
    return frame_bytes


def first_time_ns(region: Buffer, offset: int, header: FrameHeader) -> int:
    """When the first change of the frame that begins at `offset` was captured; no later than any other of it."""
    time_ns: int = PACK_DESCRIPTOR.unpack_from(region, offset + header.table_offset)[2]
    return time_ns


def build_frame(machine_id: uuid.UUID, first_sequence: int, table: Buffer, payload: Buffer = b"") -> bytes:
    """A whole frame from its parts, for records and tests; capture seals in place instead."""
    region = bytearray(HEADER_BYTES + padded(len(payload)) + len(table))
    region[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    with memoryview(region) as view:
        seal_in_place(view, len(payload), table, machine_id, first_sequence)
    return bytes(region)


def frames_in(data: Buffer) -> Iterator[tuple[int, Frame]]:
    """The frames of a run of frames, with their offsets.

    Raises:
        CorruptionError: when the run does not consist of whole, sound frames to its last byte.
    """
    offset = 0
    while offset < len(data):
        frame = read_frame(data, offset)
        if frame is None:
            raise _corrupt("the run of frames ends within a frame", offset)
        yield offset, frame
        offset += frame.header.frame_bytes


@lru_cache(maxsize=1024)
def _machine(packed: bytes) -> uuid.UUID:
    """A stream names its machine in every frame; making the object anew would cost as much as all else of a header."""
    return uuid.UUID(bytes=packed)


def _corrupt(what: str, offset: int, **fields: Any) -> CorruptionError:
    return CorruptionError(f"{what} (at byte {offset})", offset=offset, **fields)
