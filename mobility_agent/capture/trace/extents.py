"""Which parts of a tracked disk have changed and are not copied yet, and which are being written at this moment.

Two scales. A bit for every granule of 4 KiB says that an event touched it: a random 4 KiB write costs a copy of 4 KiB.
The `DirtyRegions` above them say "all of this", which is what initial replication and a lost event need.

A granule leaves by `take`, which clears it *before* it is read: whatever is issued after that marks it again. So what
`take` gives must not be under way: where sectors were issued whose completion was not seen, it gives nothing, unless
the disk is at rest. Sectors under way are counted per region; a completion that never comes keeps its region here
until the next moment at rest, which is right.

Whoever has read a part of the disk may want to know whether it is as it was: `expect`, and later `is_as_expected`. A
byte for every 64 KiB says whether an event touched it since.

Memory per TiB of disk: 32 MiB of bits and, where something is expected (audits do), 16 MiB of bytes, both resident only
where something was marked since the start; and 6 MiB of regions.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mobility_agent.regions import DirtyRegions

GRANULE_BYTES: Final = 4096
#: Clean granules between two dirty ones that are read with them: cheaper than a read of its own.
MAX_HOLE: Final = 3
#: What is expected, and found changed, as a whole.
EXPECTED_BYTES: Final = 64 << 10
_GRANULES_EXPECTED: Final = EXPECTED_BYTES // GRANULE_BYTES
#: Ranges of more granules or regions than this are marked one by one, as slices.
_LARGE: Final = 512
#: Regions looked at together, so that temporary arrays stay small.
_STRIDE: Final = 2048

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Taken:
    """Extents to copy: offsets and lengths in bytes, none longer than a region (shape (n,) each)."""

    offsets: Numbers
    lengths: Numbers
    generation: int

    @property
    def byte_count(self) -> int:
        return int(self.lengths.sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)


class DirtyExtents:
    """The changed parts of one disk. Ranges are bytes from its start.

    Args:
        regions: the coarse record, which outlives the process; its regions are multiples of eight granules.
    """

    def __init__(self, regions: DirtyRegions) -> None:
        per_region, rest = divmod(regions.region_bytes, GRANULE_BYTES)
        if rest or per_region % 8:
            raise ValueError(f"regions of {regions.region_bytes} bytes are no multiple of 8 granules")
        self.regions = regions
        self._per_region = per_region
        # Anonymous pages, so that what was never marked takes no memory.
        pages = mmap.mmap(-1, regions.regions * (per_region // 8))
        self._bits: npt.NDArray[np.uint8] = np.frombuffer(pages, np.uint8)
        self._touched = np.zeros(regions.regions, np.bool_)
        self._under_way = np.zeros(regions.regions, np.int32)  # sectors; below 0 where a completion came first
        self._next = 0  # the region that `take` goes on with
        self._generation = 0
        self._changed: npt.NDArray[np.bool_] | None = None  # by EXPECTED_BYTES; made when something is expected

    @property
    def dirty_bytes(self) -> int:
        """Bytes to copy (a short granule at the disk's end counts in full)."""
        apart = self._touched.copy()
        apart[self.regions.dirty()] = False
        rows = self._rows(np.flatnonzero(apart))
        return int(np.bitwise_count(rows).sum()) * GRANULE_BYTES + self.regions.dirty_bytes

    @property
    def under_way(self) -> bool:
        """Whether a write was issued of whose completion nothing is known."""
        return bool(self._under_way.any())

    def mark_all(self) -> None:
        """Everything is dirty, also what is being copied now."""
        self._generation += 1
        self.regions.mark_all()

    def mark(self, offsets: Numbers, lengths: Numbers) -> None:
        """These ranges are dirty (shape (n,) each, lengths above 0)."""
        first = offsets // GRANULE_BYTES
        counts = (offsets + lengths - 1) // GRANULE_BYTES - first + 1
        small = counts <= _LARGE
        granules = first if (counts == 1).all() else _spread(first[small], counts[small])
        bits = np.left_shift(1, granules & 7).astype(np.uint8)
        np.bitwise_or.at(self._bits, granules >> 3, bits)
        self._touched[granules // self._per_region] = True
        if self._changed is not None:
            self._changed[granules // _GRANULES_EXPECTED] = True
        for start, count in zip(first[~small].tolist(), counts[~small].tolist(), strict=True):
            self._mark_large(start, start + count)

    def begin(self, offsets: Numbers, lengths: Numbers) -> None:
        """These ranges are being written; `finish` when they have been."""
        self.count(offsets, lengths, np.ones(len(offsets), np.int32))

    def finish(self, offsets: Numbers, lengths: Numbers) -> None:
        self.count(offsets, lengths, np.full(len(offsets), -1, np.int32))

    def count(self, offsets: Numbers, lengths: Numbers, signs: npt.NDArray[np.int32]) -> None:
        """The same for many at once: 1 where a range begins to be written, -1 where it has been."""
        size = self.regions.region_bytes
        first = offsets // size
        counts = (offsets + lengths - 1) // size - first + 1
        if (counts == 1).all():
            np.add.at(self._under_way, first, (lengths >> 9).astype(np.int32) * signs)
            return
        small = counts <= _LARGE
        numbers = _spread(first[small], counts[small])
        owner = np.repeat(np.flatnonzero(small), counts[small])
        start = np.maximum(offsets[owner], numbers * size)
        end = np.minimum(offsets[owner] + lengths[owner], (numbers + 1) * size)
        np.add.at(self._under_way, numbers, ((end - start) >> 9).astype(np.int32) * signs[owner])
        large = zip(offsets[~small].tolist(), lengths[~small].tolist(), signs[~small].tolist(), strict=True)
        for offset, length, sign in large:
            one, last, end_ = offset // size, (offset + length - 1) // size, offset + length
            self._under_way[one] += sign * (((one + 1) * size - offset) >> 9)
            self._under_way[one + 1 : last] += sign * (size >> 9)
            self._under_way[last] += sign * ((end_ - last * size) >> 9)

    def at_rest(self) -> None:
        """Nothing is being written, whatever the events said."""
        self._under_way[:] = 0

    def expect(self, offset: int, length: int) -> int | None:
        """Say that this range is about to be read; what to ask `is_as_expected` with. None: a write there may be under
        way, so that what is read now proves nothing. Whole pieces of EXPECTED_BYTES, but for the disk's last one; every
        event so far is drained."""
        size = self.regions.region_bytes
        if self._under_way[offset // size : (offset + length - 1) // size + 1].any():
            return None
        if self._changed is None:
            pages = mmap.mmap(-1, -(-self.regions.disk_bytes // EXPECTED_BYTES))
            self._changed = np.frombuffer(pages, np.bool_)
        self._changed[self._pieces(offset, length)] = False
        return self._generation

    def is_as_expected(self, offset: int, length: int, expected: int) -> bool:
        """Whether no event touched this range, and none was lost, since `expect` gave `expected`."""
        changed = self._changed
        return changed is not None and expected == self._generation and not changed[self._pieces(offset, length)].any()

    def take(self, limit_bytes: int, *, at_rest: bool = False) -> Taken:
        """Extents to copy now, at most one region more than `limit_bytes`; they are clean from here on.

        After copying, call `copied`; when that failed, `put_back`.

        Args:
            at_rest: nothing is being written, so everything may be taken.
        """
        whole = np.zeros(self.regions.regions, np.bool_)
        whole[self.regions.dirty()] = True
        wanted = np.flatnonzero(self._touched | whole)
        if not at_rest:
            wanted = wanted[self._under_way[wanted] == 0]
        wanted = np.roll(wanted, -int(np.searchsorted(wanted, self._next)))
        offsets, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        taken_bytes = 0
        for start in range(0, len(wanted), _STRIDE):
            chosen = wanted[start : start + _STRIDE]
            rows = self._rows(chosen)
            rows[whole[chosen]] = 0xFF
            owner, offset, length = self._extents(chosen, rows)
            sums = taken_bytes + np.cumsum(np.bincount(owner, length, len(chosen)).astype(np.int64))
            count = min(int(np.searchsorted(sums, limit_bytes)) + 1, len(chosen))
            kept = int(np.searchsorted(owner, count))
            offsets.append(offset[:kept])
            lengths.append(length[:kept])
            self._bits.reshape(-1, self._per_region // 8)[chosen[:count]] = 0
            self._touched[chosen[:count]] = False
            self._next = int(chosen[count - 1]) + 1
            taken_bytes = int(sums[count - 1])
            if taken_bytes >= limit_bytes:
                break
        return Taken(np.concatenate(offsets), np.concatenate(lengths), self._generation)

    def copied(self, taken: Taken) -> None:
        """What was taken is in the change log."""
        if taken.generation == self._generation:
            for offset, length in taken:
                self.regions.clear(offset, length)

    def put_back(self, taken: Taken) -> None:
        """What was taken was not copied."""
        if taken.offsets.size:
            self.mark(taken.offsets, taken.lengths)

    def _mark_large(self, start: int, end: int) -> None:
        begin, stop = -(-start // 8), end // 8
        self._bits[begin:stop] = 0xFF
        for granule in (*range(start, min(begin * 8, end)), *range(max(stop * 8, start), end)):
            self._bits[granule >> 3] |= np.uint8(1 << (granule & 7))
        self._touched[start // self._per_region : (end - 1) // self._per_region + 1] = True
        if self._changed is not None:
            self._changed[start // _GRANULES_EXPECTED : (end - 1) // _GRANULES_EXPECTED + 1] = True

    @staticmethod
    def _pieces(offset: int, length: int) -> slice:
        return slice(offset // EXPECTED_BYTES, (offset + length - 1) // EXPECTED_BYTES + 1)

    def _rows(self, regions: Numbers) -> npt.NDArray[np.uint8]:
        rows: npt.NDArray[np.uint8] = self._bits.reshape(-1, self._per_region // 8)[regions]
        return rows

    def _extents(self, regions: Numbers, rows: npt.NDArray[np.uint8]) -> tuple[Numbers, Numbers, Numbers]:
        """The extents of these rows: which row (rising), offset, length."""
        places = np.flatnonzero(np.unpackbits(rows, axis=1, bitorder="little"))
        row = places // self._per_region
        granules = regions[row] * self._per_region + places % self._per_region
        inside = granules * GRANULE_BYTES < self.regions.disk_bytes
        row, granules = row[inside], granules[inside]
        if not granules.size:
            return granules, granules, granules
        apart = (np.diff(granules) > MAX_HOLE + 1) | (np.diff(row) != 0)
        begins = np.concatenate(([0], np.flatnonzero(apart) + 1))
        ends = np.concatenate((begins[1:] - 1, [granules.size - 1]))
        offsets = granules[begins] * GRANULE_BYTES
        stops = np.minimum((granules[ends] + 1) * GRANULE_BYTES, self.regions.disk_bytes)
        return row[begins], offsets, stops - offsets


def _spread(first: Numbers, counts: Numbers) -> Numbers:
    """first, first + 1, ... (counts of them) for every pair, one after the other."""
    begins = np.cumsum(counts) - counts
    spread: Numbers = np.repeat(first - begins, counts) + np.arange(int(counts.sum()), dtype=np.int64)
    return spread


def sectors_to_bytes(values: npt.NDArray[Any]) -> Numbers:
    """Sectors as bytes, signed."""
    return values.astype(np.int64) << 9
