"""What a segment says of itself, in the clear: its header, and the table section before it is sealed.

The header is 192 bytes. The table section is

    frames u32, descriptors u32 | chunks x 24 | frames x 72 | descriptors x 32

and holds what recovery needs to know without reading payloads. How both are sealed is `segment`'s matter; what is read
here from a sealed table is authentic, and checked all the same, since a writer may be wrong.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import xxhash

from replicar.errors import CorruptionError, LimitError
from replicar.formats import frame
from replicar.formats.cipher import TAG_BYTES, Position
from replicar.formats.frame import Buffer, Frame, FrameHeader, Table

MAGIC: Final = b"RPSEGMT\x01"
VERSION: Final = 1
HEADER_BYTES: Final = 192
ALIGNMENT: Final = 512
#: One Put Page holds a whole segment, so a segment is in storage or it is not.
MAX_SEGMENT_BYTES: Final = 4 << 20
#: Frames and their table entries together; the rest is for header, tags and zstd's growth on what does not shrink.
MAX_RAW_BYTES: Final = MAX_SEGMENT_BYTES - (64 << 10)
#: What a table section may be before compression: the above, and the entries of chunks.
MAX_INDEX_BYTES: Final = MAX_SEGMENT_BYTES
MIN_CHUNK_BYTES: Final = 4 << 10

_HEADER = struct.Struct("<8sHHI16sIIQQQQQIIIIIIQ32s32s")
_INDEX = struct.Struct("<II")
CHUNK_ENTRY: Final = np.dtype([("sealed_bytes", "<u4"), ("codec", "<u4"), ("tag", "V16")])
FRAME_ENTRY: Final = np.dtype([("place", "<u4"), ("reserved", "<u4"), ("header", "V64")])
#: The same for who writes them, one at a time: numpy is slow at single rows, and slower where it is not in the caches.
PACK_CHUNK: Final = struct.Struct("<II16s")
_PACK_PLACE = struct.Struct("<II")
assert (PACK_CHUNK.size, _PACK_PLACE.size + frame.HEADER_BYTES) == (CHUNK_ENTRY.itemsize, FRAME_ENTRY.itemsize)
CODEC_NONE, CODEC_ZSTD = 0, 1


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The first 192 bytes of a segment, decoded. Authentic only once its table was opened with it."""

    position: Position
    first_time_ns: int
    last_time_ns: int
    raw_bytes: int
    chunk_bytes: int
    chunk_count: int
    data_bytes: int
    table_bytes: int
    total_bytes: int
    key_id: int
    salt: bytes
    previous: bytes

    @property
    def table_offset(self) -> int:
        return HEADER_BYTES + self.data_bytes

    def pack(self) -> bytes:
        where = self.position
        body = _HEADER.pack(
            *(MAGIC, VERSION, 0, HEADER_BYTES, where.machine_id.bytes, where.epoch, where.run, where.number),
            *(where.first_sequence, where.last_sequence, self.first_time_ns, self.last_time_ns),
            *(self.raw_bytes, self.chunk_bytes, self.chunk_count, self.data_bytes, self.table_bytes, self.total_bytes),
            *(self.key_id, self.salt, self.previous),
        )
        body = body.ljust(HEADER_BYTES - 8, b"\0")
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """What the table section says. Arrays are read-only views.

    `chunk_offsets` has one entry more than there are chunks: chunk i lies at [i], [i + 1] of the segment.
    `frame_places[i]` is where frame i begins in the run; `descriptor_starts[i]` its first row of `descriptors`.
    """

    header: SegmentHeader
    digest: bytes
    chunks: np.ndarray[Any, Any]
    chunk_offsets: np.ndarray[Any, Any]
    frame_places: np.ndarray[Any, Any]
    frame_headers: tuple[FrameHeader, ...]
    descriptor_starts: np.ndarray[Any, Any]
    descriptors: Table

    def payload_places(self) -> np.ndarray[Any, Any]:
        """For every descriptor, where its bytes begin in the run of frames (int64, shape (descriptors,))."""
        base = np.repeat(self.frame_places.astype(np.int64) + frame.HEADER_BYTES, np.diff(self.descriptor_starts))
        return base + self.descriptors["place"].astype(np.int64)

    def sequences(self) -> np.ndarray[Any, Any]:
        """The descriptors' sequence numbers (uint64); consecutive, for a segment holds a run."""
        first = np.uint64(self.header.position.first_sequence)
        return first + np.arange(len(self.descriptors), dtype=np.uint64)


def index_bytes(frames: int, descriptors: int) -> int:
    """Upper bound of what so many frames and descriptors take in the table section, before compression."""
    return frames * FRAME_ENTRY.itemsize + descriptors * frame.DESCRIPTOR_BYTES


def read_header(data: Buffer, offset: int = 0) -> SegmentHeader | None:
    """Decode the header at `offset`.

    Returns:
        None where nothing was written (zeros).

    Raises:
        CorruptionError: when something else is there, or it claims sizes that cannot be.
    """
    raw = bytes(data[offset : offset + HEADER_BYTES])
    if len(raw) < HEADER_BYTES:
        raise CorruptionError(f"a segment header of {len(raw)} bytes", offset=offset)
    if not any(raw):
        return None
    (magic, version, flags, header_bytes, machine, epoch, run, number, first, last, first_ns, last_ns, *rest) = (
        _HEADER.unpack_from(raw)
    )
    if magic != MAGIC:
        raise CorruptionError("no segment begins here", offset=offset)
    if struct.unpack_from("<Q", raw, HEADER_BYTES - 8)[0] != xxhash.xxh3_64_intdigest(raw[:-8]):
        raise CorruptionError("the segment's header fails its checksum", offset=offset)
    if version != VERSION or flags or header_bytes != HEADER_BYTES:
        raise CorruptionError(f"segment version {version} is not known here", hint="upgrade this part", offset=offset)
    position = Position(uuid.UUID(bytes=machine), epoch, run, number, first, last)
    header = SegmentHeader(position, first_ns, last_ns, *rest)
    end = header.table_offset + header.table_bytes
    sane = (
        MIN_CHUNK_BYTES <= header.chunk_bytes <= MAX_SEGMENT_BYTES
        and 0 < header.raw_bytes <= MAX_RAW_BYTES
        and header.chunk_count == -(-header.raw_bytes // header.chunk_bytes)
        and header.table_bytes > TAG_BYTES
        and end <= header.total_bytes <= MAX_SEGMENT_BYTES
        and header.total_bytes == -(-end // ALIGNMENT) * ALIGNMENT
        and 0 < first <= last <= frame.MAX_SEQUENCE
        and number > 0
    )
    if not sane:
        raise CorruptionError("the segment's header claims sizes that cannot be", offset=offset, number=number)
    return header


def pack_table(chunks: Sequence[bytes], frames: Sequence[tuple[int, Frame]]) -> bytes:
    """The table section of a run of frames, given the entries of its chunks as `PACK_CHUNK` packs them.

    Raises:
        LimitError: it would be larger than a segment may be.
    """
    headers = (_PACK_PLACE.pack(place, 0) + item.data[: frame.HEADER_BYTES] for place, item in frames)
    tables = [item.data[item.header.table_offset :] for _, item in frames]
    count = sum(item.header.count for _, item in frames)
    index = b"".join((_INDEX.pack(len(frames), count), *chunks, *headers, *tables))
    if len(index) > MAX_INDEX_BYTES:
        raise LimitError(f"a segment's table of {len(index)} bytes; {MAX_INDEX_BYTES} is the limit")
    return index


def read_table(index: bytes, header: SegmentHeader, digest: bytes) -> SegmentTable:
    """Decode a table section that was opened, and check it against itself and the segment's header.

    Raises:
        CorruptionError: it contradicts itself.
    """
    number, what = header.position.number, f"the table of segment {header.position.number}"
    if len(index) < _INDEX.size:
        raise CorruptionError(f"{what} is too short", number=number)
    frames, count = _INDEX.unpack_from(index)
    chunks_end = _INDEX.size + header.chunk_count * CHUNK_ENTRY.itemsize
    frames_end = chunks_end + frames * FRAME_ENTRY.itemsize
    if len(index) != frames_end + count * frame.DESCRIPTOR_BYTES or not frames:
        raise CorruptionError(f"{what} has the wrong length", number=number)
    chunks = np.frombuffer(index, CHUNK_ENTRY, header.chunk_count, _INDEX.size)
    entries = np.frombuffer(index, FRAME_ENTRY, frames, chunks_end)
    headers = tuple(_frame_header(bytes(entry), number) for entry in entries["header"])
    starts = np.concatenate(([0], np.cumsum([item.count for item in headers])))
    offsets = np.concatenate(([0], np.cumsum(chunks["sealed_bytes"], dtype=np.int64))) + HEADER_BYTES
    places = entries["place"].astype(np.int64)
    table = SegmentTable(
        header=header,
        digest=digest,
        chunks=chunks,
        chunk_offsets=offsets,
        frame_places=places,
        frame_headers=headers,
        descriptor_starts=starts,
        descriptors=frame.table_view(index[frames_end:]),
    )
    _check_table(table, count)
    return table


def _check_table(table: SegmentTable, count: int) -> None:
    header, headers = table.header, table.frame_headers
    number, position = header.position.number, header.position
    sizes = [item.frame_bytes for item in headers]
    places = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    follows = all(a.next_sequence == b.first_sequence for a, b in pairwise(headers))
    sound = (
        int(table.descriptor_starts[-1]) == count
        and bool(np.array_equal(places[:-1], table.frame_places))
        and int(places[-1]) == header.raw_bytes
        and int(table.chunk_offsets[-1]) == header.table_offset
        and follows
        and bool(np.all(table.chunks["codec"] <= CODEC_ZSTD))
        and headers[0].first_sequence == position.first_sequence
        and headers[-1].last_sequence == position.last_sequence
        and all(item.machine_id == position.machine_id for item in headers)
        and int(table.descriptors["time_ns"][0]) == header.first_time_ns
        and int(table.descriptors["time_ns"][-1]) == header.last_time_ns
    )
    if not sound:
        raise CorruptionError(f"the table of segment {number} contradicts its header", number=number)
    for row, item in enumerate(headers):
        start, end = table.descriptor_starts[row : row + 2]
        frame.check_table(table.descriptors[start:end].tobytes(), item.payload_bytes, sequence=item.first_sequence)


def _frame_header(raw: bytes, number: int) -> FrameHeader:
    try:
        header = frame.read_header(raw)
    except CorruptionError as error:
        raise CorruptionError(f"the table of segment {number}: {error.message}", number=number) from None
    if header is None:  # entries have 64 bytes each, so a header is there or read_header raised
        raise CorruptionError(f"a frame header of segment {number} is cut off", number=number)
    return header
