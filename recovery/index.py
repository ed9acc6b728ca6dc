"""The index of a log up to one sequence: for every disk, which of its bytes lie where.

It is built from the sealed tables alone, in the log's order; payload is fetched only for the records. Its size is that
of the extents that still count (32 bytes each) and of one small entry per segment, however often a block was
rewritten; the time to build it is O(N log N) for N writes.

Beside it stands which bytes of a disk the agent audited, and when last: how much of a point is proven, if `verify`
finds nothing. It does not say what was written since; that rests on the audits to come.

Weak: it is built from the log's beginning each time, and every segment's entry is kept, also of those that nothing
refers to any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from recovery.chunks import slim
from recovery.extents import ZEROS, ExtentMap, Ints, TieredMap
from recovery.history import Action, History, Place, Step
from recovery.records import Record
from replicar.errors import CorruptionError
from replicar.formats.frame import Kind
from replicar.formats.record import Disk
from replicar.log.reader import Segment


@dataclass(frozen=True, slots=True)
class Audited:
    """How much of a disk had been audited at a point, and the time of the oldest of these audits (None: none).

    Each byte counts by its last audit before the point.
    """

    audited_bytes: int = 0
    oldest_ns: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A machine at one point: its disks, their extents, and the segments that these name; `audited` by disk."""

    place: Place
    disks: tuple[Disk, ...]
    maps: dict[int, ExtentMap]
    segments: dict[int, Segment]
    audited: dict[int, Audited] = field(default_factory=dict)


class Index:
    """Grows segment by segment; see the module. Pure: fed with opened tables and parsed records."""

    def __init__(self) -> None:
        self.history = History()
        self.segments: dict[int, Segment] = {}
        self._maps: dict[int, TieredMap] = {}
        self._settled: dict[int, tuple[ExtentMap, ...]] = {}
        # Audits as extents whose "segment" is their time: a later one covers an earlier one.
        self._audits: dict[int, TieredMap] = {}
        self._settled_audits: dict[int, tuple[ExtentMap, ...]] = {}

    def apply(self, found: Segment, records: list[Record], until: int | None = None) -> None:
        """Take in a segment, or its part up to sequence `until` (inclusive, not before the segment's first).

        Raises:
            CorruptionError: its sequences don't go on where the last ones ended.
        """
        position = found.table.header.position
        end = len(found.table.descriptors)
        if until is not None:
            end = min(end, until - position.first_sequence + 1)
        steps = self.history.follow(found, records, until)
        self.segments[found.number] = slim(found)
        places = found.table.payload_places()
        done = 0
        for step in steps:
            self._paint(found, places, done, step.row)
            done = step.row
            self._take(step)
        self._paint(found, places, done, end)

    def lookup(self, disk: int, offset: int, length: int) -> ExtentMap:
        """A disk's extents within [offset, offset + length) as they are now, cut to it."""
        tiers = self._maps.get(disk)
        return tiers.lookup(offset, length) if tiers is not None else ExtentMap.empty()

    def state(self) -> State:
        """The machine after the last sequence that was applied.

        Raises:
            CorruptionError: nothing was applied yet.
        """
        if self.history.last is None:
            raise CorruptionError("nothing of the log was applied")
        return self._state(self.history.last, self.history.disks, self._maps, self._audits)

    def settled(self) -> State | None:
        """The machine just before the gap that is open; None where nothing was offered before it."""
        settled = self.history.settled
        if settled is None:
            return None
        return self._state(settled.place, settled.disks, _thawed(self._settled), _thawed(self._settled_audits))

    def _state(
        self, place: Place, disks: dict[int, Disk], maps: dict[int, TieredMap], audits: dict[int, TieredMap]
    ) -> State:
        flat = {}
        for index, disk in disks.items():
            whole = maps[index].flatten() if index in maps else ExtentMap.empty()
            flat[index] = whole.lookup(0, disk.size_bytes)
        ordered = tuple(disks[index] for index in sorted(disks))
        audited = {index: _audited(audits.get(index), disk) for index, disk in disks.items()}
        return State(place, ordered, flat, self.segments, audited)

    def _take(self, step: Step) -> None:
        match step.action:
            case Action.SETTLE:
                self._settled = {index: tiers.freeze() for index, tiers in self._maps.items()}
                self._settled_audits = {index: tiers.freeze() for index, tiers in self._audits.items()}
            case Action.FORGET:
                self._maps.pop(step.disk, None)
                self._audits.pop(step.disk, None)
            case Action.ZERO:
                self._map(step.disk).cover(ExtentMap.zeros(step.start, step.end))

    def _paint(self, found: Segment, places: Ints, start: int, end: int) -> None:
        for disk, columns in painted(found, places, start, end):
            self._map(disk).paint(*columns)
        table = found.table.descriptors[start:end]
        audits = table[table["kind"] == Kind.AUDIT]
        for disk in np.unique(audits["disk"]).tolist():
            mine = audits[audits["disk"] == disk]
            offset = mine["offset"].astype(np.int64)
            ends, times = offset + mine["length"].astype(np.int64), mine["time_ns"].astype(np.int64)
            self._audits.setdefault(disk, TieredMap()).paint(offset, ends, times, offset)

    def _map(self, disk: int) -> TieredMap:
        return self._maps.setdefault(disk, TieredMap())


def _thawed(frozen: dict[int, tuple[ExtentMap, ...]]) -> dict[int, TieredMap]:
    return {index: TieredMap(tiers) for index, tiers in frozen.items()}


def _audited(tiers: TieredMap | None, disk: Disk) -> Audited:
    extents = tiers.lookup(0, disk.size_bytes) if tiers is not None else ExtentMap.empty()
    if not len(extents):
        return Audited()
    return Audited(extents.data_bytes, int(extents.segment.min()))


def painted(found: Segment, places: Ints, start: int, end: int) -> Iterator[tuple[int, tuple[Ints, Ints, Ints, Ints]]]:
    """What the descriptors in rows [start, end) of a segment change, disk by disk: start, end, segment and place of
    each write in order, as `ExtentMap.from_table` takes them.

    Args:
        places: the table's `payload_places`.
    """
    table = found.table.descriptors[start:end]
    kind = table["kind"]
    rows = np.flatnonzero((kind == Kind.WRITE) | (kind == Kind.ZERO))
    if not len(rows):
        return
    disks = table["disk"][rows]
    for disk in np.unique(disks).tolist():
        mine = rows[disks == disk]
        offset = table["offset"][mine].astype(np.int64)
        is_write = kind[mine] == Kind.WRITE
        segment = np.where(is_write, np.int64(found.number), np.int64(ZEROS))
        place = np.where(is_write, places[start:end][mine], np.int64(0))
        yield disk, (offset, offset + table["length"][mine].astype(np.int64), segment, place)
