"""Content read at a frozen point, kept in memory until it is in the change log.

So the freeze lasts as long as the reading, not as long as the log takes; and the log may lie on a frozen file system.
The memory is page-aligned, as O_DIRECT wants it, allocated once and bounded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

from mobility_agent.capture.trace.extents import Taken
from mobility_agent.capture.trace.freeze import Freeze
from mobility_agent.capture.trace.tracked import TrackedDisk

#: What may be left to copy when the file systems are frozen, over all disks.
STAGE_BYTES: Final = 32 << 20


class Stage:
    """Taken extents of several disks, and their content once read."""

    def __init__(self, size_bytes: int = STAGE_BYTES) -> None:
        self.size_bytes = size_bytes
        self._memory = memoryview(mmap.mmap(-1, size_bytes))
        self._taken: list[tuple[TrackedDisk, Taken]] = []

    @property
    def byte_count(self) -> int:
        return sum(taken.byte_count for _, taken in self._taken)

    def add(self, disk: TrackedDisk, taken: Taken) -> bool:
        """Take it in; False when all of it together has no room (it is to be put back then)."""
        self._taken.append((disk, taken))
        return sum(int((-taken.lengths // mmap.PAGESIZE * -mmap.PAGESIZE).sum()) for _, taken in self._taken) <= (
            self.size_bytes
        )

    def read(self, freeze: Freeze) -> bool:
        """Read everything that was added; False when the freeze's time is over before.

        Raises:
            OSError: a disk can't be read.
        """
        for disk, offset, view in self.pieces():
            if freeze.remaining_seconds <= 0:
                return False
            disk.read_into(offset, view)
        return True

    def pieces(self) -> Iterator[tuple[TrackedDisk, int, memoryview]]:
        """Disk, offset there, and the content."""
        place = 0
        for disk, taken in self._taken:
            for offset, length in taken:
                yield disk, offset, self._memory[place : place + length]
                place += -(-length // mmap.PAGESIZE) * mmap.PAGESIZE

    def copied(self) -> None:
        """Everything is in the change log; the stage is empty again."""
        for disk, taken in self._taken:
            disk.extents.copied(taken)
        self._taken.clear()

    def put_back(self) -> None:
        """It is not; the stage is empty, and the extents are dirty again."""
        for disk, taken in self._taken:
            disk.extents.put_back(taken)
        self._taken.clear()
