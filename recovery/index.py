"""The index of a log up to one sequence: for every disk, which of its bytes lie where.

It is built from the sealed tables alone, in the log's order; payload is fetched only for the records. It stands on a
checkpoint (or on nothing, at the log's beginning): the checkpoint's tiers stay in storage and are read where they are
asked for; in memory is what came since, 32 bytes for each extent that still counts and a small entry for each segment.
Whoever follows a log for long makes checkpoints on the way (`indexing`), which keeps that small.

Beside the extents stand the audits, see `audits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recovery.audits import Audited, audited, positions
from recovery.checkpoint import Checkpoint
from recovery.chunks import MachineLog, slim
from recovery.directory import Tables
from recovery.extents import ZEROS, ExtentMap, Ints, TieredMap
from recovery.history import Action, History, Place, Step
from recovery.layers import DiskMap, Segments
from recovery.records import Record
from recovery.tiers import Pages, Tier, read_tier
from recovery.tierwriter import Fresh, layers_of
from replicar.errors import CorruptionError
from replicar.formats.frame import Kind
from replicar.formats.record import Disk
from replicar.log.index import open_root
from replicar.log.reader import Segment


@dataclass(frozen=True, slots=True)
class State:
    """A machine at one point: its disks, their extents, the segments that these name, and the audits.

    `checkpoint`: the name of the checkpoint that it stands on; empty where there is none.
    """

    place: Place
    disks: tuple[Disk, ...]
    maps: dict[int, DiskMap]
    segments: Segments
    audits: dict[int, DiskMap]
    checkpoint: str = ""

    async def audited(self, disk: Disk) -> Audited:
        """How much of a disk is proven, and how fresh that is.

        Raises:
            CorruptionError: a page of the index is damaged.
        """
        return await audited(self.maps[disk.index], self.audits[disk.index])


class Index:
    """Grows segment by segment; see the module. Pure but for lookups: fed with opened tables and parsed records."""

    def __init__(self, log: MachineLog, *, pages: Pages | None = None, tables: Tables | None = None) -> None:
        self.history = History()
        self.tiers: tuple[Tier, ...] = ()
        self.pages = pages or Pages(log)
        self.checkpoint = ""
        self._tables = tables or Tables(log)
        self._fresh: dict[int, Segment] = {}
        self._maps: dict[int, TieredMap] = {}
        # Audits as extents whose "segment" is their time: a later one covers an earlier one.
        self._audits: dict[int, TieredMap] = {}
        self._cut: set[int] = set()  # disks of which older tiers tell nothing any more

    @classmethod
    async def on(cls, log: MachineLog, checkpoint: Checkpoint, *, pages: Pages | None = None) -> Index:
        """An index that stands on a checkpoint.

        Raises:
            CorruptionError: one of its tiers is damaged or not there.
        """
        index = cls(log, pages=pages)
        tiers = [await open_root(log.store, log.keys, header) for header in checkpoint.tiers]
        index.settle(checkpoint.history, tuple(read_tier(root) for root in tiers), str(checkpoint.name))
        return index

    def settle(self, history: History, tiers: tuple[Tier, ...], checkpoint: str) -> None:
        """Everything so far is in these tiers: keep it in memory no longer."""
        self.history, self.tiers, self.checkpoint = history, tiers, checkpoint
        self._fresh, self._maps, self._audits, self._cut = {}, {}, {}, set()

    @property
    def segments(self) -> Segments:
        """The segments that the index names."""
        return Segments(self._fresh, self.tiers, self.pages, self._tables)

    @property
    def fresh_segments(self) -> int:
        """How many segments are in memory, since the last checkpoint."""
        return len(self._fresh)

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
        self._fresh[found.number] = slim(found)
        places = found.table.payload_places()
        done = 0
        for step in steps:
            self._paint(found, places, done, step.row)
            done = step.row
            self._take(step)
        self._paint(found, places, done, end)

    async def lookup(self, disk: int, offset: int, length: int) -> ExtentMap:
        """A disk's extents within [offset, offset + length) as they are now, cut to it."""
        tiers = self._maps.get(disk)
        top = tiers.lookup(offset, length) if tiers is not None else ExtentMap.empty()
        layers, _ = layers_of(self.tiers, "extents", disk, frozenset(self._cut))
        return await DiskMap(self.pages, layers, top, offset + length).lookup(offset, length)

    def fresh(self) -> Fresh:
        """What is in memory, as a tier takes it."""
        extents = {disk: tiers.flatten() for disk, tiers in self._maps.items()}
        audits = {disk: tiers.flatten() for disk, tiers in self._audits.items()}
        return Fresh(extents, audits, frozenset(self._cut))

    def state(self) -> State:
        """The machine after the last sequence that was applied.

        Raises:
            CorruptionError: nothing was applied yet.
        """
        history = self.history
        if history.last is None:
            raise CorruptionError("nothing of the log was applied")
        disks = tuple(disk for _, disk in sorted(history.disks.items()))
        maps = {disk.index: self._disk_map("extents", disk.index, disk.size_bytes) for disk in disks}
        audits = {disk.index: self._disk_map("audits", disk.index, disk.size_bytes) for disk in disks}
        return State(history.last, disks, maps, self.segments.known(), audits, self.checkpoint)

    def _disk_map(self, what: str, disk: int, size_bytes: int) -> DiskMap:
        tiers = (self._maps if what == "extents" else self._audits).get(disk)
        top = tiers.flatten() if tiers is not None else ExtentMap.empty()
        layers, _ = layers_of(self.tiers, what, disk, frozenset(self._cut))
        return DiskMap(self.pages, layers, top, size_bytes)

    def _take(self, step: Step) -> None:
        match step.action:
            case Action.FORGET:
                self._maps.pop(step.disk, None)
                self._audits.pop(step.disk, None)
                self._cut.add(step.disk)
            case Action.ZERO:
                self._map(step.disk).cover(ExtentMap.zeros(step.start, step.end))

    def _paint(self, found: Segment, places: Ints, start: int, end: int) -> None:
        for disk, columns in painted(found, places, start, end):
            self._map(disk).paint(*columns)
        table = found.table.descriptors[start:end]
        rows = np.flatnonzero(table["kind"] == Kind.AUDIT)
        for disk in np.unique(table["disk"][rows]).tolist():
            mine = rows[table["disk"][rows] == disk]
            offset, times = table["offset"][mine].astype(np.int64), table["time_ns"][mine].astype(np.int64)
            ends = offset + table["length"][mine].astype(np.int64)
            place = positions(found.number, offset, places[start:end][mine])
            self._audits.setdefault(disk, TieredMap()).paint(offset, ends, times, place)

    def _map(self, disk: int) -> TieredMap:
        return self._maps.setdefault(disk, TieredMap())


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
