"""A tier: the extents that a stretch of the log changed, sealed in an index blob, read page by page.

Tiers are what an index consists of. They are laid over each other, the newest on top, and each says for every disk
what its stretch of the log painted; an *opaque* map hides what older tiers say of that disk, which was another one
then. Beside the extents a tier has those of audits (see `audits`), and the directory of the segments that it names.

A page holds up to MAX_ROWS extents, sorted; a lookup loads the pages that its range touches and no others, so it costs
the same however large the disk and its history are. Pages that were used last are kept: PAGES_KEPT of them, 64 MiB.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from recovery.chunks import FETCHES, MachineLog
from recovery.directory import Located, unpack_entries
from recovery.extents import ExtentMap, Ints
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import columns, indexblob
from replicar.formats.fields import Fields
from replicar.formats.indexblob import Root
from replicar.log.index import key_of
from replicar.storage.store import is_gone

PAGES_KEPT: Final = 256
_COLUMNS: Final = 4

Page = ExtentMap | dict[int, Located]


@dataclass(frozen=True, slots=True)
class TierMap:
    """One disk's pages: which section of the blob each is, the bytes of the disk it reaches from and to, its rows."""

    opaque: bool
    section: Ints
    start: Ints
    end: Ints
    rows: Ints

    def touched(self, offset: int, limit: int) -> list[int]:
        """The pages that may hold something of [offset, limit)."""
        first = int(np.searchsorted(self.end, offset, side="right"))
        last = int(np.searchsorted(self.start, limit, side="left"))
        return list(range(first, last))


@dataclass(frozen=True, slots=True)
class Tier:
    """An opened tier. `extents` and `audits` are by disk; `directory` has (section, first number, last number)."""

    root: Root
    extents: dict[int, TierMap]
    audits: dict[int, TierMap]
    directory: tuple[tuple[int, int, int], ...]
    blobs: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.root.header.name)

    @property
    def rows(self) -> int:
        """Extents altogether: its size, when tiers are compared."""
        return sum(int(part.rows.sum()) for maps in (self.extents, self.audits) for part in maps.values())


def read_tier(root: Root) -> Tier:
    """What a tier's root says.

    Raises:
        CorruptionError: it says something that can't be.
    """
    fields, count = root.fields, len(root.sections)
    directory = fields.rows("directory", 3)
    maps: dict[str, dict[int, TierMap]] = {"extents": {}, "audits": {}}
    for item in fields.each("maps"):
        what, disk = item.text("what"), item.integer("disk", most=0xFFFF)
        if what not in maps:
            raise CorruptionError(f"tier {root.header.name} has a map of {what!r}, which is not known here")
        maps[what][disk] = _read_map(item, count)
    if any(section >= count for section, _, _ in directory):
        raise CorruptionError(f"tier {root.header.name} names sections that it has not")
    pages = tuple((section, first, last) for section, first, last in directory)
    return Tier(root, maps["extents"], maps["audits"], pages, tuple(fields.texts("blobs")))


def _read_map(item: Fields, sections: int) -> TierMap:
    rows = np.array(item.rows("pages", 4), dtype=np.int64).reshape(-1, 4)
    section, start, end, count = (np.ascontiguousarray(column) for column in rows.T)
    sound = bool(np.all(section < sections) and np.all(start < end) and np.all(start[1:] >= end[:-1]))
    if not sound or bool(np.any((count < 1) | (count > columns.MAX_ROWS))):
        raise CorruptionError("a tier lists pages that cannot be")
    return TierMap(item.flag("opaque"), section, start, end, count)


class Pages:
    """Pages of a machine's tiers, opened; at most FETCHES requests are under way at once."""

    def __init__(self, log: MachineLog, *, kept: int = PAGES_KEPT) -> None:
        self._log = log
        self._limit = kept
        self._kept: OrderedDict[tuple[str, int], Page] = OrderedDict()
        self._slots = asyncio.Semaphore(FETCHES)

    async def lookup(self, tier: Tier, part: TierMap, offset: int, length: int) -> ExtentMap:
        """What a tier says of [offset, offset + length) of a disk, cut to it.

        Raises:
            CorruptionError: a page is damaged.
        """
        touched = part.touched(offset, offset + length)
        found = await asyncio.gather(*(self._extents(tier, int(part.section[index])) for index in touched))
        pieces = [page.lookup(offset, length) for page in found]
        if len(pieces) == 1:
            return pieces[0]
        return joined(pieces)

    async def entries(self, tier: Tier, section: int) -> dict[int, Located]:
        """A page of a tier's directory."""
        what = f"section {section} of {tier.name}"
        page = await self._get(tier, section, partial(unpack_entries, blobs=tier.blobs, what=what))
        assert isinstance(page, dict)
        return page

    async def _extents(self, tier: Tier, section: int) -> ExtentMap:
        page = await self._get(tier, section, partial(_unpack_extents, what=f"section {section} of {tier.name}"))
        assert isinstance(page, ExtentMap)
        return page

    async def _get(self, tier: Tier, section: int, unpack: Callable[[bytes], Page]) -> Page:
        key = (tier.name, section)
        page = self._kept.get(key)
        if page is not None:
            self._kept.move_to_end(key)
            return page
        async with self._slots:
            page = unpack(await self.read(tier.root, section))
        self._kept[key] = page
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return page

    async def read(self, root: Root, section: int) -> bytes:
        """A section of an index blob, opened.

        Raises:
            CorruptionError: it is damaged, or its blob is gone.
        """
        entry = root.sections[section]
        name = str(root.header.name)
        try:
            sealed = await self._log.store.read(name, int(entry["offset"]), int(entry["sealed_bytes"]))
        except PermanentError as error:
            if not is_gone(error):
                raise
            raise CorruptionError(
                f"index blob {name} is not there any more",
                hint="choose the point again: retention may have given it up meanwhile",
                blob=name,
            ) from error
        return indexblob.open_section(root, section, sealed, key_of(self._log.keys, root.header))


def _unpack_extents(data: bytes, what: str) -> ExtentMap:
    start, length, number, place = columns.unpack_columns(data, _COLUMNS, what)
    end = start + length
    if bool(np.any(length <= 0) or np.any(start < 0) or np.any(start[1:] < end[:-1])):
        raise CorruptionError(f"{what} has extents that cannot be")
    return ExtentMap(start, end, number, place)


def pack_extents(part: ExtentMap) -> bytes:
    """A page of up to MAX_ROWS extents."""
    return columns.pack_columns((part.start, part.end - part.start, part.segment, part.place))


def joined(pieces: list[ExtentMap]) -> ExtentMap:
    """Maps that follow each other on the disk, as one."""
    if not pieces:
        return ExtentMap.empty()
    return ExtentMap(*(np.concatenate([getattr(p, c) for p in pieces]) for c in ("start", "end", "segment", "place")))
