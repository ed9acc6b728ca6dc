"""The extents that were written while order could not be kept: the rung between the ordered log and dirty regions.

A bounded row of (disk, offset, length) in a mapped file, so that noting one is a store and survives the process. An
entry is stored before the count that makes it valid; killed in between, the write was not done yet. They are copied
from the front, in order, each copied one being stepped over; when the row is full, neighbours and repetitions are
merged; when that does not help either, whoever notes is told so, and marks regions from then on.

Merging writes the other one of two rows and then switches to it by one store, so that it may be killed at any instant.

The file is not durable at every moment; after a power cut the touched record names the regions instead, and what is
here is forgotten.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from mobility_agent.mapped import MappedFile

#: Extents held; at 16 bytes each the file has 2 MiB.
CAPACITY: Final = 1 << 16
#: A merging that leaves the row fuller than this was no help.
_HELPFUL_SHARE: Final = 0.75
_MAGIC: Final = b"RPEXTNT\x01"
_PAGE: Final = 4096
_HEAD = struct.Struct("<8sQ")
#: Of the place, one word: which row counts (1 bit), its first entry that is not copied (20), the entries it has (20).
_PLACE: Final = 64
_WORD = struct.Struct("<Q")
_BITS: Final = 20
_PACK = struct.Struct("<QIHxx")
_ENTRY: Final = np.dtype([("offset", "<u8"), ("length", "<u4"), ("disk", "<u2"), ("unused", "<u2")])
_MASK: Final = (1 << _BITS) - 1
#: What an entry can say; longer ones have to be marked as regions.
MAX_LENGTH: Final = (1 << 32) - 1


class DirtyExtents:
    """The row of one machine. All methods run on one thread.

    Args:
        path: its file; made empty if it is missing or damaged (`is_new` says so).
        capacity: extents; below 65,536 for tests.
    """

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        assert capacity < 1 << _BITS, "the place has 20 bits for a number of entries"
        self.capacity = capacity
        #: How often the row was merged since it is open: an extent that was the first need not be so any more.
        self.merges = 0
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = _PAGE + 2 * capacity * _PACK.size
        body = _HEAD.pack(_MAGIC, capacity)
        head = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
        self.is_new = os.pread(fd, len(head), 0) != head
        if self.is_new:
            os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        self._mapped = MappedFile(fd, size)
        self._file = self._mapped.mapping
        if self.is_new:
            self._file[: len(head)] = head
        (word,) = _WORD.unpack_from(self._file, _PLACE)
        self._row, self._first, self._count = word >> 2 * _BITS, word >> _BITS & _MASK, word & _MASK
        if self._row > 1 or not self._first <= self._count <= capacity:
            self._row = self._first = self._count = 0
            self.is_new = True
        # A former process may have been killed over a sync that failed.
        self._mapped.store_again(0, _PAGE)
        place = _PAGE + self._row * capacity * _PACK.size
        self._mapped.store_again(place, place + self._count * _PACK.size)

    def __len__(self) -> int:
        """How many extents are to be copied."""
        return int(self._count - self._first)

    @property
    def dirty_bytes(self) -> int:
        """Of them all; what was written twice counts twice until it is merged."""
        return int(self._held()["length"].sum())

    def bytes_of(self, disk: int) -> int:
        held = self._held()
        return int(held["length"][held["disk"] == disk].sum())

    def ranges_of(self, disk: int) -> npt.NDArray[np.int64]:
        """Those of a disk, start and end in bytes (shape (n, 2)), as they lie in the row."""
        held = self._held()
        held = held[held["disk"] == disk]
        starts = held["offset"].astype(np.int64)
        return np.stack((starts, starts + held["length"]), axis=1)

    def touch(self, disk: int, offset: int, length: int) -> bool:
        """Whether any of them lies there, in part at least."""
        held = self._held()
        starts = held["offset"].astype(np.int64)
        ends = starts + held["length"]
        return bool(np.any((held["disk"] == disk) & (starts < offset + length) & (ends > offset)))

    def note(self, disk: int, offset: int, length: int) -> bool:
        """Take note of a write of at most `MAX_LENGTH`. False: there is no room, and merging didn't make any."""
        if self._count == self.capacity and not self._merge():
            return False
        place = _PAGE + (self._row * self.capacity + self._count) * _PACK.size
        self._file[place : place + _PACK.size] = _PACK.pack(offset, length, disk)
        self._count += 1
        self._save()
        return True

    def first(self) -> tuple[int, int, int] | None:
        """The first that is not copied, as (disk, offset, length)."""
        if self._first == self._count:
            return None
        place = _PAGE + (self._row * self.capacity + self._first) * _PACK.size
        offset, length, disk = _PACK.unpack_from(self._file, place)
        return disk, offset, length

    def copied(self, merges: int) -> None:
        """The content is in the log of what was the first when the row had been merged so often.

        If it was merged since, nobody knows which that is, or whether it was written again: it is copied once more.
        """
        if merges != self.merges:
            return
        assert self._first < self._count, "there is a first extent while it is copied"
        self._first += 1
        if self._first == self._count:
            self._first = self._count = 0
        self._save()

    def merge(self) -> None:
        """Bring them into the order of the disk, each piece once: before they are copied."""
        self._merge()

    def clear(self) -> None:
        self._first = self._count = 0
        self._save()

    def close(self) -> None:
        """Durably: after a clean stop the extents are believed."""
        self._mapped.close()

    def _held(self) -> npt.NDArray[np.void]:
        place = _PAGE + (self._row * self.capacity + self._first) * _PACK.size
        # A copy: a view would keep the mapping from being closed.
        return np.frombuffer(self._file, _ENTRY, self._count - self._first, place).copy()

    def _merge(self) -> bool:
        merged = merge(self._held())
        other = 1 - self._row
        place = _PAGE + other * self.capacity * _PACK.size
        self._file[place : place + merged.nbytes] = merged.tobytes()
        self._row, self._first, self._count = other, 0, len(merged)
        self._save()
        self.merges += 1
        return len(merged) <= self.capacity * _HELPFUL_SHARE

    def _save(self) -> None:
        word = self._row << 2 * _BITS | self._first << _BITS | self._count
        self._file[_PLACE : _PLACE + _WORD.size] = _WORD.pack(word)


def merge(extents: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """The same bytes as extents that neither touch nor overlap, by disk and offset; no longer than an entry can say."""
    if not len(extents):
        return extents
    ordered = extents[np.lexsort((extents["offset"], extents["disk"]))]
    disks = ordered["disk"].astype(np.int64)
    starts = ordered["offset"].astype(np.int64)
    ends = starts + ordered["length"].astype(np.int64)
    # Disks laid end to end, so that one running maximum serves all of them.
    span = int(ends.max()) + 1
    reach = np.maximum.accumulate(ends + disks * span)
    begins = np.concatenate(([True], (starts + disks * span)[1:] > reach[:-1]))
    rows = np.flatnonzero(begins)
    lasts = np.concatenate((rows[1:], [len(ordered)])) - 1
    lengths = reach[lasts] - disks[rows] * span - starts[rows]
    if int(lengths.max()) > MAX_LENGTH:
        return ordered  # petabytes of disk aside, this is rare, and repetitions are only work
    merged = np.zeros(len(rows), _ENTRY)
    merged["offset"], merged["length"], merged["disk"] = starts[rows], lengths, disks[rows]
    return merged
