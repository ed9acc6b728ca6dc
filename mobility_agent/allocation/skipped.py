"""Which regions of a disk are left out because its file system had nothing there: the replica has zeros for them.

    asked, once       the regions that are wholly free are put here, durably, before the disk is first served
    copied            as a ZERO; whatever the disk has there is not sent
    written to        the region leaves the map and is dirty: it is copied whole, and equal from then on

So the replica is what the file system can read, and every region is either equal to the disk or in this map. A region
leaves when the frame with the write is finished, which is before it can be sent, or when a write that is not in the log
is about to be done. Until its whole copy is in the stream a point has zeros beside what was written there; a file
system does not read those, since it never wrote them. Nothing ever comes back into the map: of what was freed later
nobody is asked.

Why it can be trusted after a death:

- Killed process: the mapping survives, a region is dirty before it has left, and for the log's last frame the ladder
  calls `observe` again.
- Power cut: whatever was written to, or copied, since the last checkpoint lies in the touched record, and all regions
  of that leave. A checkpoint makes dirty regions and this map durable behind the log, before anything is retired.
- A past that is not known: all leave.

Weak: one write copies a region of 1 MiB once.
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
from replicar.formats.frame import Flag, Kind

_MAGIC: Final = b"RPSKIPD\x01"
_PAGE: Final = 4096
_HEADER = struct.Struct("<8sQQ")


class SkippedRegions:
    """The map of one disk: one byte for each of its dirty regions.

    `is_new` says that there was none of this disk before.

    Args:
        path: its file; made, with nothing left out, if it is missing or describes a disk that was larger. Of one that
            was smaller, nothing of what was added is left out.
        regions: of the same disk; the caller's to close, after this.
    """

    def __init__(self, path: Path, regions: DirtyRegions) -> None:
        self._regions, self._size = regions, regions.region_bytes
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        head = grown.header(_HEADER, _MAGIC, regions.disk_bytes, self._size)
        found = os.pread(fd, len(head), 0)
        before = grown.size_before(_HEADER, _MAGIC, found, regions.disk_bytes, self._size)
        self.is_new = found != head and before is None
        if self.is_new:
            os.ftruncate(fd, 0)
        os.ftruncate(fd, _PAGE + regions.regions)
        self.file = MappedFile(fd, _PAGE + regions.regions)
        self._map = np.frombuffer(self.file.mapping, np.uint8, regions.regions, _PAGE)
        if found != head:
            self.file.mapping[: len(head)] = head
            self.file.sync()
        self.file.store_again()  # a former process may have been killed over a sync that failed

    @property
    def count(self) -> int:
        """How many regions are left out."""
        return int(np.count_nonzero(self._map))

    @property
    def byte_count(self) -> int:
        return min(self.count * self._size, self._regions.disk_bytes)

    def put(self, free: Ranges) -> None:
        """Leave out the regions that lie wholly within free ranges, durably. All of them have to be dirty.

        Args:
            free: bytes, sorted, neighbours joined; see `allocation.source`.
        """
        first = -(-free[:, 0] // self._size)
        end = np.where(free[:, 1] >= self._regions.disk_bytes, self._regions.regions, free[:, 1] // self._size)
        for begin, stop in zip(first[end > first].tolist(), end[end > first].tolist(), strict=True):
            self._map[begin:stop] = 1
        self.file.sync()

    # --- what was written to ---

    def observe(self, table: npt.NDArray[np.void], disk: int) -> None:
        """Regions that a frame's writes touch leave; background copies are no writes."""
        changes = table[
            (table["disk"] == disk)
            & ((table["kind"] == Kind.WRITE) | (table["kind"] == Kind.ZERO))
            & (table["flags"] & Flag.SEED == 0)
        ]
        first = changes["offset"].astype(np.int64) // self._size
        last = (changes["offset"].astype(np.int64) + changes["length"].astype(np.int64) - 1) // self._size
        short = last - first < 2
        self._leave(np.concatenate((first[short], last[short])))
        for begin, end in zip(first[~short].tolist(), last[~short].tolist(), strict=True):
            self._leave(np.arange(begin, end + 1))

    def leave(self, offset: int, length: int) -> None:
        """Something is about to be written there that is in no frame, or was."""
        self._leave(np.arange(offset // self._size, -(-(offset + length) // self._size)))

    def leave_all(self) -> None:
        self._leave(np.arange(len(self._map)))

    def _leave(self, numbers: npt.NDArray[np.int64]) -> None:
        for number in numbers[self._map[numbers] != 0].tolist():
            self._regions.mark(number * self._size, 1)  # first: killed between the two, it is copied
            self._map[number] = 0

    # --- what is left out ---

    def divide(self, start: int, end: int) -> tuple[int, int]:
        """How far a range of regions begins with such that are left out, and where it ends before the next of them."""
        first, stop = start // self._size, -(-end // self._size)
        edges = np.flatnonzero(self._map[first:stop] != self._map[first])
        change = min((first + int(edges[0])) * self._size, end) if edges.size else end
        return (change, end) if self._map[first] else (start, change)

    def differs(self, offset: int, length: int) -> bool:
        """Whether any of it is left out, or dirty."""
        first, end = offset // self._size, -(-(offset + length) // self._size)
        return bool(self._map[first:end].any()) or self._regions.is_dirty(first, end)

    def close(self) -> None:
        """Durably; before its regions are closed."""
        del self._map
        self.file.close()
