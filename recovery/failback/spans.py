"""Stretches of a disk: sorted, disjoint, as two numpy arrays.

What a failback has to carry is made of these by pure functions. Two copies of a disk agreed at a point; since then each
went its own way:

    what the log says was written at home behind the point   `differing` of two states' maps
    what was written on the other side                       the overlay's sectors, or page ranges of a blob

Their union is all that can differ; every byte outside of it is the point's on both sides. Where a history is missing,
its part is the whole disk, and bytes themselves are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from recovery.extents import ZEROS, ExtentMap, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Bytes [start, end) of a disk, ascending, apart from each other; int64 arrays of shape (stretches,)."""

    start: Ints
    end: Ints

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Spans:
        """From (offset, length) pairs in any order, overlapping or not."""
        rows = np.array([pair for pair in pairs if pair[1] > 0], dtype=np.int64).reshape(-1, 2)
        return _joined(rows[:, 0], rows[:, 0] + rows[:, 1])

    @classmethod
    def whole(cls, size_bytes: int) -> Spans:
        """All of a disk."""
        return cls.of([(0, size_bytes)])

    @property
    def total_bytes(self) -> int:
        return int(np.sum(self.end - self.start))

    def union(self, other: Spans) -> Spans:
        """What is in either."""
        return _joined(np.concatenate((self.start, other.start)), np.concatenate((self.end, other.end)))

    def aligned(self, granule_bytes: int) -> Spans:
        """Made larger to whole granules."""
        return _joined(self.start // granule_bytes * granule_bytes, -(-self.end // granule_bytes) * granule_bytes)

    def clipped(self, first: int, limit: int) -> Spans:
        """What of it lies within [first, limit)."""
        start, end = np.maximum(self.start, first), np.minimum(self.end, limit)
        rows = start < end
        return Spans(start[rows], end[rows])

    def pieces(self, most_bytes: int) -> Iterator[tuple[int, int]]:
        """As (offset, length), ascending; none is longer than `most_bytes` or crosses a multiple of it."""
        for start, end in zip(self.start.tolist(), self.end.tolist(), strict=True):
            at = start
            while at < end:
                until = min(end, (at // most_bytes + 1) * most_bytes)
                yield at, until - at
                at = until


def differing(one: ExtentMap, other: ExtentMap) -> Spans:
    """Where two states of one disk take their bytes from different places of the log.

    Bytes that were written again are taken for different though they may be equal, so it errs towards more. Bytes that
    no extent covers are zeros.
    """
    edges = np.unique(np.concatenate((one.start, one.end, other.start, other.end)))
    left, right = edges[:-1], edges[1:]
    (segment, place), (other_segment, other_place) = _sources(one, left), _sources(other, left)
    rows = (segment != other_segment) | ((segment != ZEROS) & (place != other_place))
    return _joined(left[rows], right[rows])


def _sources(extents: ExtentMap, at: Ints) -> tuple[Ints, Ints]:
    """Segment and place that hold the byte at each offset; ZEROS where none does."""
    if not len(extents):
        return np.full(len(at), ZEROS), np.zeros(len(at), dtype=np.int64)
    row = np.maximum(np.searchsorted(extents.start, at, side="right") - 1, 0)
    held = (extents.start[row] <= at) & (at < extents.end[row]) & (extents.segment[row] != ZEROS)
    segment = np.where(held, extents.segment[row], ZEROS)
    return segment, np.where(held, extents.place[row] + at - extents.start[row], 0)


def _joined(start: Ints, end: Ints) -> Spans:
    """Sorted, and those that touch or overlap made one."""
    if not len(start):
        return Spans(start, end)
    order = np.argsort(start, kind="stable")
    start, furthest = start[order], np.maximum.accumulate(end[order])
    first = np.concatenate(([True], start[1:] > furthest[:-1]))
    last = np.concatenate((np.flatnonzero(first)[1:] - 1, [len(start) - 1]))
    return Spans(start[first], furthest[last])
