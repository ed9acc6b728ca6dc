"""The records of a change log: the rare descriptors (marks, gaps, disks) among millions of writes.

`RecordedLog` tells an observer of each record as it is appended; `held_records` finds those that a log holds already,
after a restart. A record always has a frame of its own, so the search looks at headers and skips every larger frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mobility_agent.changelog import ChangeLog
from replicar.errors import CorruptionError
from replicar.formats import frame, record
from replicar.formats.frame import Flag, Kind


@dataclass(frozen=True, slots=True)
class Record:
    """A record and where it is in the stream. `time_ns` is the wall clock of its capture."""

    sequence: int
    kind: Kind
    item: record.Item
    flags: Flag
    time_ns: int


class RecordedLog(ChangeLog):
    """A change log that says `on_record(record)` for each record, right after it was appended."""

    on_record: Callable[[Record], None] | None = None

    def _put_record(self, kind: Kind, item: record.Item, flags: Flag) -> int | None:
        sequence = super()._put_record(kind, item, flags)
        if sequence is not None and self.on_record is not None:
            self.on_record(Record(sequence, kind, item, flags, self.last_time_ns))
        return sequence


def held_records(log: ChangeLog, sequence: int) -> Iterator[Record]:
    """The records that `log` holds from `sequence` on, in order. Nothing may be trimmed while it runs.

    Raises:
        CorruptionError: the log was damaged after it was opened.
    """
    while (data := log.take(sequence)) is not None:
        offset = 0
        while offset < len(data):
            header = frame.read_header(data, offset)
            if header is None:
                raise CorruptionError("the change log ends within a frame", sequence=sequence)
            if header.count == 1 and header.first_sequence >= sequence:
                found = _record_at(data, offset, header)
                if found is not None:
                    yield found
            offset += header.frame_bytes
            sequence = header.next_sequence


def _record_at(data: memoryview, offset: int, header: frame.FrameHeader) -> Record | None:
    at = offset + header.table_offset
    _, length, time_ns, place, _, kind, flags = frame.PACK_DESCRIPTOR.unpack_from(data, at)
    start = offset + frame.HEADER_BYTES + place
    item: record.Item
    match kind:
        case Kind.MARK:
            item = record.read_mark(data[start : start + length])
        case Kind.GAP:
            item = record.read_gap(data[start : start + length])
        case Kind.DISK:
            item = record.read_disk(data[start : start + length])
        case _:
            return None
    return Record(header.first_sequence, Kind(kind), item, Flag(flags), time_ns)
