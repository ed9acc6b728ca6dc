"""The dirty regions of a disk: which coarse pieces of it have to be read and sent, whatever their content is now.

One byte a region in a mapped file, so that marking is a store and survives the process. Marked are: everything, when
protection begins or after a power cut; what was written while order could not be kept; what a failed write left in
doubt. A region is cleared when its content has gone into the change log.

The map (`file`) alone is not durable at every moment; after a power cut `touched` says which regions it can't be
believed for.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent import grown
from mobility_agent.mapped import MappedFile

_MAGIC: Final = b"RPREGNS\x01"
_PAGE: Final = 4096
_HEADER = struct.Struct("<8sQQ")
DEFAULT_REGION_BYTES: Final = 1 << 20


class DirtyRegions:
    """The map of one disk.

    Args:
        path: its file; made, with everything dirty, if it is missing or describes a disk that was larger. Of one that
            was smaller, what was added is dirty.
    """

    def __init__(self, path: Path, disk_bytes: int, region_bytes: int = DEFAULT_REGION_BYTES) -> None:
        self.disk_bytes = disk_bytes
        self.region_bytes = region_bytes
        self.regions = -(-disk_bytes // region_bytes)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, _PAGE + self.regions)
        self.file = MappedFile(fd, _PAGE + self.regions)
        mapping = self.file.mapping
        self._map = np.frombuffer(mapping, np.uint8, self.regions, _PAGE)
        head = grown.header(_HEADER, _MAGIC, disk_bytes, region_bytes)
        if mapping[: len(head)] != head:
            before = grown.size_before(_HEADER, _MAGIC, mapping[: len(head)], disk_bytes, region_bytes)
            if before is None:
                self.mark_all()
            else:
                self.mark(before, disk_bytes - before)
            self.file.sync()  # before there is a header that vouches for them
            mapping[: len(head)] = head
            self.file.sync()
        self.file.store_again()  # a former process may have been killed over a sync that failed

    @property
    def count(self) -> int:
        """How many regions are dirty."""
        return int(np.count_nonzero(self._map))

    @property
    def dirty_bytes(self) -> int:
        return min(self.count * self.region_bytes, self.disk_bytes)

    def mark(self, offset: int, length: int) -> None:
        """Everything that [offset, offset + length) touches is dirty."""
        self._map[offset // self.region_bytes : -(-(offset + length) // self.region_bytes)] = 1

    def mark_all(self) -> None:
        self._map[:] = 1

    def is_dirty(self, first: int, end: int) -> bool:
        """Whether any of the regions with these numbers is dirty."""
        return bool(self._map[first:end].any())

    def dirty(self) -> npt.NDArray[np.int64]:
        """The numbers of the dirty regions, rising (shape (count,))."""
        return np.flatnonzero(self._map)

    def next_dirty(self, offset: int) -> tuple[int, int] | None:
        """The first run of dirty regions that begins at or behind `offset`, as (start, end) in bytes."""
        first = -(-offset // self.region_bytes)
        found = np.flatnonzero(self._map[first:])
        if not found.size:
            return None
        begin = first + int(found[0])
        clean = np.flatnonzero(self._map[begin:] == 0)
        end = begin + int(clean[0]) if clean.size else self.regions
        return begin * self.region_bytes, min(end * self.region_bytes, self.disk_bytes)

    def clear(self, offset: int, length: int) -> None:
        """The regions that lie wholly within [offset, offset + length) are clean (the disk's last may be short)."""
        first = -(-offset // self.region_bytes)
        end = offset + length
        last = self.regions if end >= self.disk_bytes else end // self.region_bytes
        self._map[first:last] = 0

    def close(self) -> None:
        """Durably: after a clean stop the map is believed, even if the machine restarts before the kernel wrote it."""
        del self._map
        self.file.close()
