"""Background copying of dirty regions into the change log: initial replication, and resynchronisation after a gap.

A region is read on another thread while the disk is in use. The disk watches the range meanwhile; if it was written,
the read is done again, and what goes into the log is therefore the content at that place in the stream. Holes and zeros
become ZERO records, so a disk costs what is on it, not what it could hold. A region is clean once its copy is in the
log; the map survives the process, so copying resumes where it was.

Copying yields to what is captured in order: it waits while the log is more than half full.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from typing import Final

from mobility_agent.capture.disk import Disk
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import REGION_BYTES
from replicar.clock import Clock
from replicar.formats.frame import Kind

#: One read, one frame.
COPY_BYTES: Final = 1 << 20
#: How often a region that is written while it is read is tried again before the copy waits a moment.
_TRIES: Final = 8
#: How often to look whether there is something to do when there was nothing.
IDLE_SECONDS: Final = 0.1
#: Copies wait while the log holds more than this share of its limit.
_BUSY_SHARE: Final = 0.5

_log = logging.getLogger(__name__)


class Seeder:
    """Copies whatever the ladder's regions say is dirty, and closes the gap when nothing is.

    Args:
        bytes_per_second: limit of the copying; 0 for none.
    """

    def __init__(self, ladder: Ladder, clock: Clock, *, bytes_per_second: int = 0) -> None:
        self._ladder = ladder
        self._clock = clock
        self._rate = bytes_per_second
        # Page-aligned, owned, reused: reading into it faults no fresh memory.
        self._buffer = memoryview(mmap.mmap(-1, COPY_BYTES))
        self._due = 0.0
        self.copied_bytes = 0

    async def run(self) -> None:
        """Copy for ever; cancel to stop."""
        while True:
            worked = False
            if self._ladder.climb():
                for disk in list(self._ladder.disks.values()):
                    worked = await self._copy_disk(disk) or worked
                self._ladder.close_gap()
            if not worked:
                await self._clock.sleep(IDLE_SECONDS)

    async def _copy_disk(self, disk: Disk) -> bool:
        """One pass over a disk; whether anything was copied."""
        regions, at, worked = self._ladder.regions[disk.index], 0, False
        while (found := regions.next_dirty(at)) is not None:
            start, end = found
            await self._wait_for_room()
            # A region is clean once its copy is in the log; until that is durable, a power cut may undo it.
            touched, length = self._ladder.touched[disk.index], min(end, start + REGION_BYTES) - start
            end = start + length
            if not touched.covers(start, length):
                await touched.record(start, length)
            if not self._ladder.log.ordered:
                return worked
            alike_end, is_data = disk.data_end(start)
            end = min(end, max(alike_end // regions.region_bytes * regions.region_bytes, start + regions.region_bytes))
            if not is_data and alike_end >= min(start + regions.region_bytes, disk.size_bytes):
                end = min(end, disk.size_bytes)
                copied = self._zero(disk, regions, start, end - start)
            else:
                end = min(end, start + COPY_BYTES, disk.size_bytes)
                copied = await self._copy(disk, regions, start, end - start)
                await self._pace(end - start)
            worked = worked or copied
            at = end if copied else start
            if not copied:
                await self._clock.sleep(IDLE_SECONDS)
        return worked

    def _zero(self, disk: Disk, regions: DirtyRegions, start: int, length: int) -> bool:
        # Nothing runs between looking for holes and this, so they are still holes.
        if not self._ladder.touched[disk.index].covers(start, length):
            return False
        if not self._ladder.log.append_copy(Kind.ZERO, disk.index, start, length):
            return False
        regions.clear(start, length)
        self.copied_bytes += length
        return True

    async def _copy(self, disk: Disk, regions: DirtyRegions, start: int, length: int) -> bool:
        target = self._buffer[:length]
        with disk.watch(start, start + length) as watch:
            for _ in range(_TRIES):
                watch.hit = False
                await asyncio.to_thread(disk.read_into, start, target)
                if not watch.hit:
                    break
            else:
                return False
            # From here to the end of the append nothing else runs: the copy is the content at its place in the stream.
            if not self._ladder.touched[disk.index].covers(start, length):
                return False
            zeros = not any(target[:512]) and bytes(target) == bytes(length)
            kind = Kind.ZERO if zeros else Kind.WRITE
            if not self._ladder.log.append_copy(kind, disk.index, start, length, b"" if zeros else target):
                return False
        regions.clear(start, length)
        self.copied_bytes += length
        return True

    async def _wait_for_room(self) -> None:
        log = self._ladder.log
        while log.ordered and log.used_bytes > log.limit_bytes * _BUSY_SHARE:
            await self._clock.sleep(IDLE_SECONDS)

    async def _pace(self, length: int) -> None:
        if not self._rate:
            return
        now = self._clock.monotonic()
        self._due = max(self._due, now - 1.0) + length / self._rate
        if self._due > now:
            await self._clock.sleep(self._due - now)
