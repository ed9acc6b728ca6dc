"""Which pages of a disk are left out because its file system had nothing there: the replica has zeros for them.

    asked, once         the regions that are wholly free are put here, durably, before their disk is first served
    copied              as zeros; whatever the disk has there is not sent
    written, whole      the page leaves the map: the write in the stream is all that it holds
    written, in part    the page leaves the map, and its region is dirty: what was left out of the page is in no frame

So the replica is what the file system can read, and every page is equal to the disk, in this map, or in a dirty region.
A page leaves when the frame with the write is finished, which is before it can be sent, or when a write that is not in
the log is about to be done. Of a page written in part a point has zeros beside what was written, until the region's
copy is in the stream; a file system does not read those, since it never wrote them. Nothing ever comes back into the
map: of what was freed later nobody is asked.

Why it can be trusted after a death:

- Killed process: the mapping survives. A page leaves only after it is dirty, or wholly written by a frame that is in
  the log; and for the log's last frame the ladder calls `observe` again.
- Power cut: whatever was written to, or copied, since the last checkpoint lies in the touched record; all of that
  leaves, and is dirty. A checkpoint makes dirty regions and this map durable behind the log, before anything is
  retired.
- A past that is not known: all leave.

Weak: 32 MiB of file for each TiB of disk. Of a disk whose size is no multiple of its regions', the last one is copied.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent import grown
from mobility_agent.allocation.source import Ranges
from mobility_agent.mapped import MappedFile
from mobility_agent.regions import DirtyRegions
from replicar.control.files import write_file
from replicar.formats.frame import Flag, Kind

#: What file systems write whole; smaller pages would make the map larger, larger ones have more copied.
PAGE_BYTES: Final = 4096
_MAGIC: Final = b"RPSKIPD\x02"
_FORMER_MAGIC: Final = b"RPSKIPD\x01"  # one byte a region
_HEADER_BYTES: Final = 4096
_HEADER = struct.Struct("<8sQQ")
_ALL: Final = 0xFF
#: How many bits are set in a byte.
_ONES: Final = np.unpackbits(np.arange(256, dtype=np.uint8).reshape(-1, 1), axis=1).sum(axis=1, dtype=np.uint8)


class SkippedPages:
    """The map of one disk: a bit for each page, the lowest bit of a byte first; all of a region lies side by side.

    `is_new` says that there was none of this disk before.

    Args:
        path: its file; made, with nothing left out, if it is missing or describes a disk that was larger. Of one that
            was smaller, nothing of what was added is left out. A map of whole regions, as agents kept it before, is
            rewritten first.
        regions: of the same disk, whole bytes of the map each; the caller's to close, after this.
    """

    def __init__(self, path: Path, regions: DirtyRegions) -> None:
        self._regions = regions
        self._stride, rest = divmod(regions.region_bytes, 8 * PAGE_BYTES)
        assert not rest, "a region is whole bytes of the map"
        size = _HEADER_BYTES + regions.regions * self._stride
        _rewrite_former(path, regions, self._stride)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        head = grown.header(_HEADER, _MAGIC, regions.disk_bytes, PAGE_BYTES)
        found = os.pread(fd, len(head), 0)
        before = grown.size_before(_HEADER, _MAGIC, found, regions.disk_bytes, PAGE_BYTES)
        self.is_new = found != head and before is None
        if self.is_new:
            os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        self.file = MappedFile(fd, size)
        self._map = np.frombuffer(self.file.mapping, np.uint8, size - _HEADER_BYTES, _HEADER_BYTES)
        self._pages = int(_ONES[self._map].sum())
        if found != head:
            self.file.mapping[: len(head)] = head
            self.file.sync()
        self.file.store_again()  # a former process may have been killed over a sync that failed

    @property
    def byte_count(self) -> int:
        """How much is left out."""
        return self._pages * PAGE_BYTES

    def put(self, free: Ranges) -> None:
        """Leave out the regions that lie wholly within free ranges, durably. All of them have to be dirty.

        Smaller free ranges are copied: measured, to tell them apart costs more than it saves.

        Args:
            free: bytes, sorted, neighbours joined; see `allocation.source`.
        """
        size = self._regions.region_bytes
        last = self._regions.disk_bytes // size * size  # nothing of a last region that is short
        first, end = -(-free[:, 0] // size), np.minimum(free[:, 1], last) // size
        for begin, stop in zip(first[end > first].tolist(), end[end > first].tolist(), strict=True):
            self._map[begin * self._stride : stop * self._stride] = _ALL
        self._pages = int(_ONES[self._map].sum())
        self.file.sync()

    # --- what was written to ---

    def observe(self, table: npt.NDArray[np.void], disk: int) -> None:
        """Pages that a frame's writes touch leave; background copies are no writes. The frame is in the log."""
        changes = table[
            (table["disk"] == disk)
            & ((table["kind"] == Kind.WRITE) | (table["kind"] == Kind.ZERO))
            & (table["flags"] & Flag.SEED == 0)
        ]
        offsets, lengths = changes["offset"].astype(np.int64), changes["length"].astype(np.int64)
        first, last = offsets // (8 * PAGE_BYTES), (offsets + lengths - 1) // (8 * PAGE_BYTES)
        # Seldom any: what is written once has left. Between the first and the last byte only long writes have more.
        found = (self._map[first] | self._map[last] != 0) | (last - first > 1)
        for offset, length in zip(offsets[found].tolist(), lengths[found].tolist(), strict=True):
            self.leave(offset, length)

    def leave(self, offset: int, length: int) -> None:
        """All of it is written by a frame that is in the log, or noted as dirty: its pages leave. What they hold beside
        it is dirty."""
        end = offset + length
        first, last = offset // PAGE_BYTES, (end - 1) // PAGE_BYTES
        part = self._map[first // 8 : last // 8 + 1]
        if not part.any():
            return
        if offset % PAGE_BYTES and part[0] >> first % 8 & 1:  # marked first: killed between the two, it is copied
            self._regions.mark(offset, 1)
        if end % PAGE_BYTES and part[-1] >> last % 8 & 1:
            self._regions.mark(end, 1)
        # A range may be a whole disk, so it is gone through by bytes: only at its ends may some of one stay.
        before = int(_ONES[part].sum())
        below, above = (1 << first % 8) - 1, _ALL << last % 8 + 1 & _ALL
        if len(part) == 1:
            part[0] &= below | above
        else:
            part[1:-1] = 0
            part[0] &= below
            part[-1] &= above
        self._pages -= before - int(_ONES[part].sum())

    def leave_all(self) -> None:
        """Nothing is left out any more; what was is dirty."""
        for number in np.flatnonzero(self._map.reshape(-1, self._stride).any(axis=1)).tolist():
            self._regions.mark(number * self._regions.region_bytes, 1)
        self._regions.file.sync()  # first: no touched record has these, and the map may be on the disk sooner
        self._map[:] = 0
        self._pages = 0

    # --- what is left out ---

    def divide(self, start: int, end: int) -> tuple[int, int]:
        """How far a range of regions begins with such that are left out whole, and where it ends before the next of
        them."""
        size = self._regions.region_bytes
        first, stop = start // size, -(-end // size)
        whole = (self._map[first * self._stride : stop * self._stride].reshape(-1, self._stride) == _ALL).all(axis=1)
        edges = np.flatnonzero(whole != whole[0])
        change = min((first + int(edges[0])) * size, end) if edges.size else end
        return (change, end) if whole[0] else (start, change)

    def blank(self, offset: int, content: memoryview) -> bool:
        """Put zeros where `content`, the disk's from `offset` on, is left out; whether anything is.

        Call in the step that puts the content into the log, behind `log.seal`: a write shows with its frame.
        """
        pages = np.pad(self._bits(offset, len(content)), 1)
        edges = np.flatnonzero(pages[1:] != pages[:-1])
        target, before = np.frombuffer(content, np.uint8), offset % PAGE_BYTES
        for start, stop in (edges.reshape(-1, 2) * PAGE_BYTES).tolist():
            target[max(start - before, 0) : stop - before] = 0
        return bool(edges.size)

    def has_all(self, offset: int, length: int) -> bool:
        """Whether the whole of a range is left out."""
        return bool(self._bits(offset, length).all())

    def differs(self, offset: int, length: int) -> bool:
        """Whether any of a range is left out, or dirty."""
        size = self._regions.region_bytes
        return bool(self._bits(offset, length).any()) or self._regions.is_dirty(
            offset // size, -(-(offset + length) // size)
        )

    def _bits(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """Whether each page that a range touches is left out: 1 or 0 (shape (pages,))."""
        first, end = offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)
        at = first // 8
        return np.unpackbits(self._map[at : -(-end // 8)], bitorder="little")[first - 8 * at : end - 8 * at]

    def close(self) -> None:
        """Durably; before its regions are closed."""
        del self._map
        self.file.close()


def _rewrite_former(path: Path, regions: DirtyRegions, stride: int) -> None:
    """Have a map of the former version, one byte a region, as one of pages, or leave the file as it is."""
    try:
        with path.open("rb") as file:
            found = file.read(_HEADER.size + 8)
            size = regions.disk_bytes
            if found != grown.header(_HEADER, _FORMER_MAGIC, size, regions.region_bytes):
                before = grown.size_before(_HEADER, _FORMER_MAGIC, found, size, regions.region_bytes)
                if before is None:
                    return
                size = before
            file.seek(_HEADER_BYTES)
            flags = np.frombuffer(file.read(-(-size // regions.region_bytes)), np.uint8) != 0
    except FileNotFoundError:
        return
    if size % regions.region_bytes and flags[-1]:  # a last region that is short is not left out any more
        regions.mark(size - 1, 1)
        regions.file.sync()
        flags[-1] = False
    head = grown.header(_HEADER, _MAGIC, size, PAGE_BYTES).ljust(_HEADER_BYTES, b"\0")
    write_file(path, head + np.repeat(flags.astype(np.uint8) * _ALL, stride).tobytes(), mode=0o600)
