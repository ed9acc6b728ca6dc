"""Writes a tier: the newest extents, and those of the tiers that lie right under them, merged into one.

A tier is merged with the ones on it unless it is TIER_RATIO times as large as they are together, so there are few tiers
however long the log is, and an extent is written again a few times in its life. Merging goes through each disk slice by
slice; memory is bounded by a slice, whatever the tiers hold.

Segments that no extent of the new tier names any more are not in its directory: what was overwritten is forgotten here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from recovery.blobwriter import Author, BlobWriter
from recovery.directory import Located, located, pack_entries, pages_of
from recovery.extents import ZEROS, ExtentMap, Ints
from recovery.layers import DiskMap, Segments
from recovery.tiers import Pages, Tier, TierMap, joined, pack_extents
from replicar.errors import CorruptionError
from replicar.formats.columns import MAX_ROWS
from replicar.formats.frame import MAX_DISK_BYTES
from replicar.formats.indexblob import BlobKind, IndexHeader

#: A tier is merged with those on it unless it is at least so many times their size.
TIER_RATIO: Final = 4


@dataclass(frozen=True, slots=True)
class Fresh:
    """What was painted since the newest tier, by disk; `cut` are the disks that older tiers say nothing of any more."""

    extents: dict[int, ExtentMap]
    audits: dict[int, ExtentMap]
    cut: frozenset[int]

    @property
    def rows(self) -> int:
        return sum(len(part) for maps in (self.extents, self.audits) for part in maps.values())


def to_merge(tiers: Sequence[Tier], fresh: Fresh) -> int:
    """How many of the tiers, from the oldest, stay as they are; the others are merged with what is fresh."""
    stay, rows = len(tiers), fresh.rows
    while stay and tiers[stay - 1].rows < TIER_RATIO * rows:
        stay -= 1
        rows += tiers[stay].rows
    return stay


async def write_tier(
    author: Author,
    pages: Pages,
    segments: Segments,
    under: Sequence[Tier],
    fresh: Fresh,
    numbers: tuple[int, int],
    disks: frozenset[int],
) -> tuple[IndexHeader, int]:
    """Merge `under` (from the oldest) with what is fresh; the new tier's header, and the bytes written.

    Args:
        segments: knows every segment that any of them names.
        numbers: the first and last segment that the new tier covers.
        disks: those that the machine has; of others nothing is written.
    """
    writer = BlobWriter(author, author.name(BlobKind.TIER, *numbers))
    maps: list[dict[str, Any]] = []
    named: list[Ints] = []
    for what in ("extents", "audits"):
        top: dict[int, ExtentMap] = getattr(fresh, what)
        for disk in sorted(disks):
            layers, opaque = layers_of(under, what, disk, fresh.cut)
            whole = DiskMap(pages, layers, top.get(disk, ExtentMap.empty()), MAX_DISK_BYTES)
            rows: list[list[int]] = []
            async for page in _pages(whole):
                section = await writer.add(pack_extents(page))
                rows.append([section, int(page.start[0]), int(page.end[-1]), len(page)])
                if what == "extents":
                    named.append(np.unique(page.segment))
            maps.append({"disk": disk, "what": what, "opaque": opaque, "pages": rows})
    numbers_named = np.unique(np.concatenate(named)) if named else np.zeros(0, dtype=np.int64)
    items = [await _locate(segments, number) for number in numbers_named.tolist() if number != ZEROS]
    blobs = {name: index for index, name in enumerate(sorted({item.blob for item in items}))}
    directory = []
    for entries in pages_of(items):
        section = await writer.add(pack_entries(entries, blobs))
        directory.append([section, entries[0].number, entries[-1].number])
    header = await writer.finish({"maps": maps, "directory": directory, "blobs": list(blobs)})
    return header, writer.written_bytes


def layers_of(
    tiers: Sequence[Tier], what: str, disk: int, cut: frozenset[int] = frozenset()
) -> tuple[tuple[tuple[Tier, TierMap], ...], bool]:
    """The tiers' maps of one disk that count, from the oldest; and whether they hide what lies under them."""
    if disk in cut:
        return (), True
    found: list[tuple[Tier, TierMap]] = []
    for tier in reversed(tiers):
        part: TierMap | None = getattr(tier, what).get(disk)
        if part is not None:
            found.append((tier, part))
            if part.opaque:
                return tuple(reversed(found)), True
    return tuple(reversed(found)), False


async def _locate(segments: Segments, number: int) -> Located:
    fresh = segments.fresh.get(number)
    item = located(fresh) if fresh is not None else await segments.locate(number)
    if item is None:
        raise CorruptionError(
            f"the index names segment {number} and does not say where it is",
            hint="run `replicar verify`",
            number=number,
        )
    return item


async def _pages(whole: DiskMap) -> AsyncIterator[ExtentMap]:
    """All of a disk's extents, in pages that are full but for the last."""
    held = ExtentMap.empty()
    async for part in whole.slices():
        held = joined([held, part])
        full = len(held) // MAX_ROWS * MAX_ROWS
        for start in range(0, full, MAX_ROWS):
            yield _rows(held, start, start + MAX_ROWS)
        held = _rows(held, full, len(held))
    if len(held):
        yield held


def _rows(extents: ExtentMap, start: int, end: int) -> ExtentMap:
    return ExtentMap(*(column[start:end] for column in (extents.start, extents.end, extents.segment, extents.place)))
