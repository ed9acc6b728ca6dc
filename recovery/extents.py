"""The extent map of one disk: which bytes of the disk lie where in the log.

A map is immutable: sorted, disjoint extents as four numpy arrays. Bytes that no extent covers were never written, and a
disk starts as zeros. Two pure operations build every map there is:

- `from_table` paints the writes of a table over each other in their order;
- `merge` lays a newer map over an older one.

Both cut the disk at every edge of an extent into *elementary intervals*, decide all of them at once, and join
neighbours that go on where the last one ended. No write is ever looked at by itself in Python.

`TieredMap` keeps a growing map as a few maps of falling size (as a log-structured merge tree does): N writes cost
O(N log N) altogether, and a frozen state of it is a few references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

#: The segment of an extent that was zeroed on purpose (trim, write-zeroes) rather than never written.
ZEROS: Final = -1
#: Writes that a TieredMap gathers before it paints them; 8,192 x 32 bytes.
PENDING_WRITES: Final = 8192
#: A tier is merged with the next larger one unless that is at least so many times its size.
TIER_RATIO: Final = 2


@dataclass(frozen=True, slots=True, eq=False)
class ExtentMap:
    """Sorted, disjoint extents of a disk; all arrays int64, shape (extents,).

    `start` and `end` are bytes of the disk. `segment` is the number of the segment that holds them, or ZEROS; `place`
    is where they begin in that segment's run of frames (0 for zeros).
    """

    start: Ints
    end: Ints
    segment: Ints
    place: Ints

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def empty(cls) -> ExtentMap:
        return cls(*(np.zeros(0, dtype=np.int64) for _ in range(4)))

    @classmethod
    def zeros(cls, start: int, end: int) -> ExtentMap:
        """One extent of zeros."""
        if end <= start:
            return cls.empty()
        return cls(*(np.array([value], dtype=np.int64) for value in (start, end, ZEROS, 0)))

    @classmethod
    def from_table(cls, start: Ints, end: Ints, segment: Ints, place: Ints) -> ExtentMap:
        """The map after writes in the order given; a later one covers an earlier one.

        Args:
            start, end: bytes of the disk, start < end; shape (writes,).
            segment: the segment each write's bytes are in, or ZEROS.
            place: where they begin in that segment's run of frames.
        """
        order = np.argsort(start, kind="stable")
        sorted_start, sorted_end = start[order], end[order]
        if bool(np.all(sorted_start[1:] >= sorted_end[:-1])):
            return _joined(sorted_start, sorted_end, segment[order], place[order])
        edges = _distinct(np.concatenate((start, end)))
        winner = _last_painter(np.searchsorted(edges, start), np.searchsorted(edges, end), len(edges) - 1)
        covered = np.flatnonzero(winner >= 0)
        by = winner[covered]
        left = edges[covered]
        return _joined(left, edges[covered + 1], segment[by], place[by] + (left - start[by]))

    def lookup(self, offset: int, length: int) -> ExtentMap:
        """The extents within [offset, offset + length), cut to it."""
        limit = offset + length
        first = int(np.searchsorted(self.end, offset, side="right"))
        last = int(np.searchsorted(self.start, limit, side="left"))
        if first >= last:
            return ExtentMap.empty()
        start = np.maximum(self.start[first:last], offset)
        segment = self.segment[first:last]
        place = np.where(segment == ZEROS, 0, self.place[first:last] + (start - self.start[first:last]))
        return ExtentMap(start, np.minimum(self.end[first:last], limit), segment, place)

    def data(self) -> ExtentMap:
        """The extents that hold bytes, without those that are zeros."""
        return self._rows(self.segment != ZEROS)

    def of_segment(self, number: int) -> ExtentMap:
        """The extents whose bytes lie in that segment."""
        return self._rows(self.segment == number)

    @property
    def data_bytes(self) -> int:
        """Bytes of the disk that come from the log."""
        return int(np.sum((self.end - self.start)[self.segment != ZEROS]))

    def _rows(self, rows: npt.NDArray[np.bool_]) -> ExtentMap:
        return ExtentMap(self.start[rows], self.end[rows], self.segment[rows], self.place[rows])


def merge(older: ExtentMap, newer: ExtentMap) -> ExtentMap:
    """`newer` laid over `older`."""
    if not len(older):
        return newer
    if not len(newer):
        return older
    edges = _distinct(np.concatenate((older.start, older.end, newer.start, newer.end)))
    left, right = edges[:-1], edges[1:]
    top, bottom = _covering(newer, left), _covering(older, left)
    covered = np.flatnonzero((top >= 0) | (bottom >= 0))
    top, bottom, left, right = top[covered], bottom[covered], left[covered], right[covered]
    is_new = top >= 0
    segment = np.where(is_new, newer.segment[top], older.segment[bottom])
    base = np.where(is_new, newer.place[top] - newer.start[top], older.place[bottom] - older.start[bottom])
    return _joined(left, right, segment, base + left)


class TieredMap:
    """A disk's map while it grows. Not for several tasks at once."""

    __slots__ = ("_pending", "_pending_writes", "_tiers")

    def __init__(self, tiers: Sequence[ExtentMap] = ()) -> None:
        self._tiers = list(tiers)
        self._pending: list[tuple[Ints, Ints, Ints, Ints]] = []
        self._pending_writes = 0

    def paint(self, start: Ints, end: Ints, segment: Ints, place: Ints) -> None:
        """More writes, in their order; see `ExtentMap.from_table`."""
        self._pending.append((start, end, segment, place))
        self._pending_writes += len(start)
        if self._pending_writes >= PENDING_WRITES:
            self._settle()

    def cover(self, newer: ExtentMap) -> None:
        """Lay a whole map over what is there."""
        self._settle()
        self._push(newer)

    def freeze(self) -> tuple[ExtentMap, ...]:
        """The state so far, oldest tier first; later writes don't change it."""
        self._settle()
        return tuple(self._tiers)

    def flatten(self) -> ExtentMap:
        """The state so far as one map; the tiers become that map, too."""
        self._settle()
        flat = ExtentMap.empty()
        for tier in reversed(self._tiers):
            flat = merge(tier, flat)
        self._tiers = [flat] if len(flat) else []
        return flat

    def lookup(self, offset: int, length: int) -> ExtentMap:
        """The extents within [offset, offset + length), cut to it, without flattening the rest."""
        self._settle()
        found = ExtentMap.empty()
        for tier in reversed(self._tiers):
            found = merge(tier.lookup(offset, length), found)
        return found

    def _settle(self) -> None:
        if self._pending:
            columns = [np.concatenate(parts) for parts in zip(*self._pending, strict=True)]
            self._pending, self._pending_writes = [], 0
            self._push(ExtentMap.from_table(*columns))

    def _push(self, newer: ExtentMap) -> None:
        if len(newer):
            self._tiers.append(newer)
        while len(self._tiers) > 1 and len(self._tiers[-2]) < TIER_RATIO * len(self._tiers[-1]):
            top = self._tiers.pop()
            self._tiers[-1] = merge(self._tiers[-1], top)


def _distinct(edges: Ints) -> Ints:
    """Sorted, each once. A stable sort is the fast one here: the input is a few ascending runs."""
    edges = np.sort(edges, kind="stable")
    return edges[np.concatenate(([True], edges[1:] != edges[:-1]))]


def _covering(extents: ExtentMap, left: Ints) -> Ints:
    """For each elementary interval beginning at `left`, the extent that covers it, or -1."""
    index = np.searchsorted(extents.start, left, side="right") - 1
    covers = (index >= 0) & (extents.end[index] > left)
    return np.where(covers, index, -1)


def _last_painter(left: npt.NDArray[Any], right: npt.NDArray[Any], cells: int) -> Ints:
    """For each of `cells` cells, the largest i with left[i] <= cell < right[i], or -1.

    A range is the union of two blocks whose size is a power of two (as in a sparse table), so each i is noted at two
    places of its level only; then every level hands what it holds down to the next smaller one.
    """
    writes = np.arange(len(left), dtype=np.int64)
    level = np.frexp((right - left).astype(np.float64))[1] - 1
    best = np.full(cells, -1, dtype=np.int64)
    for power in range(int(level.max()), -1, -1):
        half = 1 << power
        # best[c] vouches for 2 * half cells from c on; its second half is the block that begins at c + half.
        if half < cells:
            best[half:] = np.maximum(best[half:], best[:-half])
        rows = level == power
        np.maximum.at(best, left[rows], writes[rows])
        np.maximum.at(best, right[rows] - half, writes[rows])
    return best


def _joined(start: Ints, end: Ints, segment: Ints, place: Ints) -> ExtentMap:
    """A map of sorted, disjoint extents, neighbours that continue each other made one."""
    if not len(start):
        return ExtentMap.empty()
    place = np.where(segment == ZEROS, 0, place)
    goes_on = (start[1:] == end[:-1]) & (segment[1:] == segment[:-1])
    goes_on &= (segment[1:] == ZEROS) | (place[1:] == place[:-1] + (end - start)[:-1])
    first = np.concatenate(([True], ~goes_on))
    last = np.concatenate((~goes_on, [True]))
    return ExtentMap(start[first], end[last], segment[first], place[first])
