"""The records of a segment: MARK, GAP and DISK descriptors with what they carry, which lies in payload chunks.

Records are rare, so the few chunks that hold one are fetched and all others are left where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recovery.chunks import ChunkSource
from replicar.errors import CorruptionError
from replicar.formats import record
from replicar.formats.frame import Flag, Kind
from replicar.formats.record import Disk, Gap, Mark
from replicar.formats.segment import SegmentTable
from replicar.log.reader import Segment


@dataclass(frozen=True, slots=True)
class Record:
    """One record and its place in the stream; `row` is its descriptor's row in the segment's table."""

    row: int
    sequence: int
    time_ns: int
    flags: Flag
    body: Mark | Gap | Disk


def record_rows(table: SegmentTable) -> np.ndarray[Any, Any]:
    """Rows of the descriptors that are records, ascending."""
    kind = table.descriptors["kind"]
    return np.flatnonzero((kind == Kind.MARK) | (kind == Kind.GAP) | (kind == Kind.DISK))


def chunks_of(table: SegmentTable, place: int, length: int) -> range:
    """The chunks in which `length` bytes at `place` of the run lie."""
    size = table.header.chunk_bytes
    return range(place // size, (place + length - 1) // size + 1)


def bytes_from(table: SegmentTable, chunks: Mapping[int, bytes], place: int, length: int) -> bytes:
    """`length` bytes at `place` of the run, out of opened chunks."""
    wanted = chunks_of(table, place, length)
    start = place - wanted.start * table.header.chunk_bytes
    return b"".join(chunks[index] for index in wanted)[start : start + length]


async def read_records(source: ChunkSource, found: Segment) -> list[Record]:
    """The records of a segment, in order.

    Raises:
        CorruptionError: a chunk fails its seal, or a record is none.
    """
    table = found.table
    rows = record_rows(table)
    if not len(rows):
        return []
    places, lengths = table.payload_places(), table.descriptors["length"]
    needed = sorted({i for row in rows for i in chunks_of(table, int(places[row]), int(lengths[row]))})
    return parse_records(table, await source.open(found, needed))


def parse_records(table: SegmentTable, chunks: Mapping[int, bytes]) -> list[Record]:
    """The records of a segment out of the opened chunks that hold them.

    Raises:
        CorruptionError: a record is none; says at which sequence.
    """
    places, first = table.payload_places(), table.header.position.first_sequence
    records = []
    for row in record_rows(table).tolist():
        entry = table.descriptors[row]
        data = bytes_from(table, chunks, int(places[row]), int(entry["length"]))
        try:
            body = _parse(Kind(int(entry["kind"])), data)
        except CorruptionError as error:
            raise CorruptionError(f"{error.message} (sequence {first + row})", sequence=first + row) from None
        records.append(Record(row, first + row, int(entry["time_ns"]), Flag(int(entry["flags"])), body))
    return records


def _parse(kind: Kind, data: bytes) -> Mark | Gap | Disk:
    if kind is Kind.MARK:
        return record.read_mark(data)
    return record.read_gap(data) if kind is Kind.GAP else record.read_disk(data)
