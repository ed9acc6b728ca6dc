"""The touched record: which coarse regions of a disk a power cut can have left different from what the log says.

A region is recorded, durably, before the first write to it; it is retired once log and disk are both durable, nothing
was written there since, and nothing of it waits to be copied as an extent (the row of extents does not survive a power
cut). So after a power cut, whatever of the last writes reached the disk and not the log, or the log and not the disk,
lies in recorded regions, and only those have to be read and sent again.

The price is one fdatasync for the first write to a region of 16 MiB in a while; the write waits for it, the loop does
not. Writes to recorded regions cost two looks into a byte string.

    recorded   durable in the file: writes may go on
    active     written since the last retiring round began, or waiting as an extent when it did

Weak: a whole region is compared for one sector of doubt.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent import grown

_MAGIC: Final = b"RPTOUCH\x01"
_PAGE: Final = 4096
#: Where in the first page it says whether the disk has to be mended.
_DROPPED: Final = 64
_HEADER = struct.Struct("<8sQQ")
REGION_SHIFT: Final = 24
REGION_BYTES: Final = 1 << REGION_SHIFT
#: No ranges.
NO_RANGES: Final = np.zeros((0, 2), np.int64)


class TouchedRegions:
    """The record of one disk.

    `known` is False if there was no record of this disk to begin with: then nothing can be said about its past.

    Args:
        path: the record's file; made if it is missing or describes a disk that was larger. One that grew was not
            written where it is new.
    """

    def __init__(self, path: Path, disk_bytes: int) -> None:
        self.disk_bytes = disk_bytes
        regions = -(-disk_bytes // REGION_BYTES)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, _PAGE + regions)
        self._file = mmap.mmap(self._fd, _PAGE + regions)
        head = grown.header(_HEADER, _MAGIC, disk_bytes, REGION_BYTES)
        found = self._file[: len(head)]
        before = grown.size_before(_HEADER, _MAGIC, found, disk_bytes, REGION_BYTES)
        self.known = found == head or before is not None
        self._recorded = bytearray(self._file[_PAGE:]) if self.known else bytearray(regions)
        # All of it is written again, even what reads so already: a sync that failed for a former process has left bytes
        # in the page cache that the kernel holds to be clean, and that a power cut takes.
        self._file[_PAGE:] = bytes(self._recorded)
        self._file[: len(head)] = head
        os.fsync(self._fd)
        self._active = bytearray(self._recorded)
        self._lock = asyncio.Lock()

    def covers(self, offset: int, length: int) -> bool:
        """Whether [offset, offset + length) may be written now. Notes that it is."""
        first, last = offset >> REGION_SHIFT, (offset + length - 1) >> REGION_SHIFT
        recorded, active = self._recorded, self._active
        if last - first < 2:
            if not (recorded[first] and recorded[last]):
                return False
            active[first] = active[last] = 1
            return True
        if not all(recorded[first : last + 1]):
            return False
        active[first : last + 1] = b"\1" * (last + 1 - first)
        return True

    async def record(self, offset: int, length: int) -> None:
        """Return when the regions of the range are recorded durably.

        Raises:
            OSError: they can't be; nothing may be written there.
        """
        await self.record_all([(offset, length)])

    async def record_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The same for many ranges (offset, length) at once.

        Raises:
            OSError: they can't be; nothing may be written there.
        """
        found = [(offset >> REGION_SHIFT, ((offset + length - 1) >> REGION_SHIFT) + 1) for offset, length in ranges]
        async with self._lock:
            for first, end in found:
                self._file[_PAGE + first : _PAGE + end] = b"\1" * (end - first)
            await asyncio.to_thread(os.fdatasync, self._fd)
            for first, end in found:
                self._recorded[first:end] = self._active[first:end] = b"\1" * (end - first)

    @property
    def dropped(self) -> bool:
        """Whether a flush of the disk failed and what was dropped was not written again; see `mending`.

        In the page, and not made durable: it is for the next process, and means nothing after a power cut.
        """
        return bool(self._file[_DROPPED])

    def note_dropped(self, dropped: bool = True) -> None:
        """Say so. May be called on another thread, the one that was told of it."""
        self._file[_DROPPED] = dropped

    @property
    def count(self) -> int:
        """How many regions are recorded."""
        return self._recorded.count(1)

    def begin_round(self, waiting: npt.NDArray[np.int64] = NO_RANGES) -> None:
        """From here on only what is written again is active. Make log and disk durable next, then `retire`.

        Args:
            waiting: what stays active because nothing but this record would name it after a power cut (shape (n, 2),
                start and end in bytes).
        """
        edges = np.zeros(len(self._active) + 2, np.int64)
        starts, ends = waiting[:, 0], np.minimum(waiting[:, 1], self.disk_bytes)
        np.add.at(edges, starts[starts < ends] >> REGION_SHIFT, 1)
        np.add.at(edges, (ends[starts < ends] - 1 >> REGION_SHIFT) + 1, -1)
        self._active = bytearray((np.cumsum(edges)[: len(self._active)] > 0).tobytes())

    async def retire(self) -> None:
        """Log and disk are durable as of `begin_round`: forget what was not written since.

        Nothing rests on the forgetting being durable, but what a power cut costs does: a region too many is sent again.

        Raises:
            OSError: it could not be made durable.
        """
        async with self._lock:
            recorded, active = np.frombuffer(self._recorded, np.uint8), np.frombuffer(self._active, np.uint8)
            settled = np.flatnonzero((recorded != 0) & (active == 0)).tolist()
            for index in settled:
                self._recorded[index] = 0
                self._file[_PAGE + index] = 0
            if settled:
                await asyncio.to_thread(os.fdatasync, self._fd)

    def ranges(self) -> list[tuple[int, int]]:
        """The recorded regions as (offset, length), neighbours joined."""
        found = np.flatnonzero(np.frombuffer(bytes(self._recorded), np.uint8))
        joined: list[tuple[int, int]] = []
        for index in found.tolist():
            start, end = index * REGION_BYTES, min((index + 1) * REGION_BYTES, self.disk_bytes)
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end - joined[-1][0])
            else:
                joined.append((start, end - start))
        return joined

    def close(self) -> None:
        try:
            os.fdatasync(self._fd)
        finally:
            self._file.close()
            os.close(self._fd)
