"""Background copying of dirty regions into the change log: initial replication, and resynchronisation after a gap.

A region is read on another thread while the disk is in use. The disk watches the range meanwhile; if it was written,
the read is done again, and what goes into the log is therefore the content at that place in the stream. Holes and zeros
become ZERO records, so a disk costs what is on it, not what it could hold. A region is clean once its copy is in the
log; the map survives the process, so copying resumes where it was.

Of what is read only that is sent which the replica is not known to have (`digests`); what was written while the log
was full comes first, extent by extent. Free space that is left out goes as zeros, and is not read where a whole region
is such.

Copying yields to what is captured in order: it waits while the log is more than half full.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from typing import Final

from mobility_agent.capture.disk import Disk
from mobility_agent.digests import CHUNK_BYTES, Rows
from mobility_agent.ladder import Ladder
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
        #: What was sent of what was read, and what was equal to the replica.
        self.copied_bytes = self.equal_bytes = 0

    async def run(self) -> None:
        """Copy for ever; cancel to stop."""
        while True:
            worked = False
            if self._ladder.climb():
                worked = await self._copy_extents()
                for disk in list(self._ladder.disks.values()):
                    worked = await self._copy_disk(disk) or worked
                self._ladder.close_gap()
            if not worked:
                await self._clock.sleep(IDLE_SECONDS)

    async def _copy_extents(self) -> bool:
        """Copy what was written while the log was full; whether anything was."""
        extents, worked = self._ladder.extents, False
        while extents is not None and (found := extents.first()) is not None:
            (index, offset, length), merges = found, extents.merges
            disk, end = self._ladder.disks.get(index), offset + length
            while disk is not None and offset < end:
                piece = min(COPY_BYTES, end - offset)
                await self._wait_for_room()
                if not await self._may_touch(disk, offset, piece):
                    return worked
                if not await self._copy(disk, offset, piece):
                    await self._clock.sleep(IDLE_SECONDS)
                    continue
                offset += piece
                if offset == end:
                    extents.copied(merges)  # in the step of the copy, as regions are cleared
                await self._pace(piece)
            if disk is None:
                extents.copied(merges)
            worked = True
        return worked

    async def _copy_disk(self, disk: Disk) -> bool:
        """One pass over a disk's dirty regions; whether anything was copied."""
        regions, at, worked = self._ladder.regions[disk.index], 0, False
        while (found := regions.next_dirty(at)) is not None:
            start, end = found
            await self._wait_for_room()
            end = min(end, start + REGION_BYTES)
            if not await self._may_touch(disk, start, end - start):
                return worked
            free_end, end = self._left_out(disk, start, end)
            if free_end > start:
                if not self._zero(disk, start, free_end - start):
                    await self._clock.sleep(IDLE_SECONDS)
                    at = start
                    continue
                regions.clear(start, free_end - start)
                at, worked = free_end, True
                continue
            alike_end, is_data = disk.data_end(start)
            end = min(end, max(alike_end // regions.region_bytes * regions.region_bytes, start + regions.region_bytes))
            is_hole = not is_data and alike_end >= min(start + regions.region_bytes, disk.size_bytes)
            if is_hole:
                end = min(end, disk.size_bytes)
                copied = self._zero(disk, start, end - start)
            else:
                end = min(end, start + COPY_BYTES, disk.size_bytes)
                copied = await self._copy(disk, start, end - start)
            if copied:
                regions.clear(start, end - start)  # in the step of the copy: what is marked from here on stays marked
            if not is_hole:
                await self._pace(end - start)
            if not copied:
                await self._clock.sleep(IDLE_SECONDS)
            worked = worked or copied
            at = end if copied else start
        return worked

    def _left_out(self, disk: Disk, start: int, end: int) -> tuple[int, int]:
        """How far the range begins with free space that is left out, and where it ends before the next of that."""
        skipped = self._ladder.skipped.get(disk.index)
        if skipped is None:
            return start, end
        self._ladder.log.seal()  # a write into such space shows with its frame
        return skipped.divide(start, end)

    async def _may_touch(self, disk: Disk, start: int, length: int) -> bool:
        """Have a range recorded as touched; whether it can be copied in order then.

        What is clean once its copy is in the log may be made dirty by a power cut until that is durable.
        """
        touched = self._ladder.touched[disk.index]
        if not touched.covers(start, length):
            await touched.record(start, length)
        return self._ladder.log.ordered

    def _zero(self, disk: Disk, start: int, length: int) -> bool:
        # Nothing runs between looking for holes and this, so they are still holes.
        log, digests = self._ladder.log, self._ladder.digests[disk.index]
        if not self._ladder.touched[disk.index].covers(start, length):
            return False
        log.seal()
        if digests.has_zeros(start, length):
            self.equal_bytes += length
            return True
        if not log.append_copy(Kind.ZERO, disk.index, start, length):
            return False
        digests.put_zeros(start, length)
        self.copied_bytes += length
        return True

    async def _copy(self, disk: Disk, start: int, length: int) -> bool:
        """Put what differs from the replica, or may differ, into the log. False: not now."""
        target = self._buffer[:length]
        with disk.watch(start, start + length) as watch:
            for _ in range(_TRIES):
                watch.hit = False
                rows = await asyncio.to_thread(self._read, disk, start, target)
                if not watch.hit:
                    break
            else:
                return False
            # From here to the end of the appends nothing else runs: the copy is the content at its place in the stream.
            if not self._ladder.touched[disk.index].covers(start, length):
                return False
            return self._append(disk, start, target, rows)

    def _read(self, disk: Disk, start: int, target: memoryview) -> Rows:
        disk.read_into(start, target)
        return self._ladder.digests[disk.index].rows(start, target)

    def _append(self, disk: Disk, start: int, content: memoryview, rows: Rows) -> bool:
        log, digests = self._ladder.log, self._ladder.digests[disk.index]
        log.seal()  # what was captured and not finished has to be forgotten before anything is compared
        skipped = self._ladder.skipped.get(disk.index)
        is_blanked = skipped is not None and skipped.blank(start, content)
        if is_blanked:
            rows = digests.rows(start, content)
        begin, _ = digests.whole(start, len(content))
        sent = 0
        for offset, length in list(digests.differing(start, len(content), rows, zeros_apart=is_blanked)):
            part = content[offset - start : offset - start + length]
            zeros = not any(part[:512]) and bytes(part) == bytes(length)
            kind = Kind.ZERO if zeros else Kind.WRITE
            if not log.append_copy(kind, disk.index, offset, length, b"" if zeros else part):
                return False
            first, end = digests.whole(offset, length)
            digests.put(first * CHUNK_BYTES, rows[first - begin : end - begin])
            sent += length
        self.copied_bytes += sent
        self.equal_bytes += len(content) - sent
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
