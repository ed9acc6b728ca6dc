"""A disk's extents at one point: the maps of some tiers, one over the other, and over them what is in memory.

A lookup asks every layer for its range alone and merges what they say, so neither time nor memory depends on how large
the disk is or how often it was written. Whoever wants all of a disk takes it in `slices`, each of which has at most so
many extents: that bounds the memory of whatever goes through a disk in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from recovery.directory import Located, Tables
from recovery.extents import ExtentMap, merge
from recovery.tiers import Pages, Tier, TierMap
from replicar.errors import CorruptionError
from replicar.log.reader import Segment

#: Extents of a slice, at most about so many; merging them takes some 300 bytes each for a moment.
SLICE_EXTENTS: Final = 1 << 19


@dataclass(frozen=True, slots=True)
class DiskMap:
    """One disk's extents; `layers` from the oldest to the newest, `top` over all of them."""

    pages: Pages | None
    layers: tuple[tuple[Tier, TierMap], ...]
    top: ExtentMap
    size_bytes: int

    @classmethod
    def of(cls, extents: ExtentMap, size_bytes: int) -> DiskMap:
        """A map that is in memory as a whole."""
        return cls(None, (), extents, size_bytes)

    async def lookup(self, offset: int, length: int) -> ExtentMap:
        """The extents within [offset, offset + length) and the disk, cut to that.

        Raises:
            CorruptionError: a page of the index is damaged.
        """
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return ExtentMap.empty()
        pages = self.pages
        parts = await asyncio.gather(
            *(pages.lookup(tier, part, offset, length) for tier, part in self.layers if pages is not None)
        )
        found = self.top.lookup(offset, length)
        for part in reversed(parts):
            found = merge(part, found)
        return found

    def ranges(self, most: int = SLICE_EXTENTS) -> list[tuple[int, int]]:
        """The disk cut into (offset, length), each with about `most` extents or fewer; where there are none it is left
        out."""
        starts = [part.start for _, part in self.layers] + [self.top.start]
        ends = [part.end for _, part in self.layers] + [self.top.end]
        rows = [part.rows for _, part in self.layers] + [np.ones(len(self.top), dtype=np.int64)]
        start, end, row = (np.concatenate(columns) for columns in (starts, ends, rows))
        if not len(start):
            return []
        order = np.argsort(start, kind="stable")
        start, row = start[order], row[order]
        limit = min(int(end.max()), self.size_bytes)
        found, begin = [], int(start[0])
        cuts = np.flatnonzero(np.diff(np.cumsum(row) // most)) + 1
        for cut in cuts.tolist():
            edge = int(start[cut])
            if begin < edge < limit:
                found.append((begin, edge - begin))
                begin = edge
        if begin < limit:
            found.append((begin, limit - begin))
        return found

    async def slices(self, most: int = SLICE_EXTENTS) -> AsyncIterator[ExtentMap]:
        """All of the disk, in order, slice by slice."""
        for offset, length in self.ranges(most):
            yield await self.lookup(offset, length)

    async def data_bytes(self) -> int:
        """Bytes of the disk that come from the log; the rest is zeros."""
        return sum([part.data_bytes async for part in self.slices()])


class Segments:
    """The segments that a state names, by number: those read lately are in memory, the others in the tiers'
    directories."""

    def __init__(self, fresh: dict[int, Segment], tiers: Sequence[Tier], pages: Pages, tables: Tables) -> None:
        self.fresh = fresh
        self._tiers, self._pages, self._tables = tuple(tiers), pages, tables

    async def get(self, number: int) -> Segment:
        """The segment of that number, ready for its chunks to be fetched.

        Raises:
            CorruptionError: the index does not know it, or it is not there any more as it was indexed.
        """
        found = self.fresh.get(number)
        if found is not None:
            return found
        item = await self.locate(number)
        if item is None:
            raise CorruptionError(
                f"the index names segment {number} and does not say where it is",
                hint="run `replicar verify`, and recover to a point before it",
                number=number,
            )
        return await self._tables.open(item)

    async def load(self, numbers: Iterable[int]) -> dict[int, Segment]:
        """Several segments at once; raises as `get`."""
        wanted = list(numbers)
        return dict(zip(wanted, await asyncio.gather(*(self.get(number) for number in wanted)), strict=True))

    async def chunk_sizes(self, numbers: Iterable[int]) -> dict[int, int]:
        """How much of its run of frames each chunk of a segment holds, by number; needs no tables."""
        sizes: dict[int, int] = {}
        for number in numbers:
            fresh = self.fresh.get(number)
            found = fresh.table if fresh is not None else await self.locate(number)
            if found is None:
                await self.get(number)  # which says what is wrong
                continue
            sizes[number] = found.header.chunk_bytes
        return sizes

    async def locate(self, number: int) -> Located | None:
        """What the tiers' directories say of a segment."""
        for tier in reversed(self._tiers):
            for section, first, last in tier.directory:
                if first <= number <= last:
                    item = (await self._pages.entries(tier, section)).get(number)
                    if item is not None:
                        return item
        return None

    def known(self) -> Segments:
        """The same, which further segments that are read do not change."""
        return Segments(dict(self.fresh), self._tiers, self._pages, self._tables)
