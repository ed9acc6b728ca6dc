"""Copies of dirty extents into the change log: read by O_DIRECT on another thread, logged on the event loop's.

What is copied is clean before it is read (see `extents`), and dirty again if it could not be logged. Zeros become ZERO
records. Copying yields to what has to go out: it waits while the log is more than half full.

Of whole chunks only those go into the log that the stream is not known to have (`digests`), so that a disk of which
nothing is known any more is read and hashed in full, and not sent in full.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Awaitable, Iterable, Sequence
from typing import Final, TypeVar

import numpy as np

from mobility_agent.capture.trace.extents import Taken
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.digests import CHUNK_BYTES, Rows
from mobility_agent.ladder import Ladder
from replicar.clock import Clock
from replicar.formats.frame import Kind
from replicar.observe.logs import fields

#: One batch: read on another thread, then logged.
BATCH_BYTES: Final = 4 << 20
#: Copies wait while the log holds more than this share of its limit.
_BUSY_SHARE: Final = 0.5
#: Waiting for room, which comes in milliseconds.
MOMENT_SECONDS: Final = 0.01
#: A disk that can't be read is not tried again before.
_FAILURE_SECONDS: Final = 1.0
#: Reading this fast is assumed until it was measured.
_FIRST_RATE: Final = 100e6
_RATE_WEIGHT: Final = 0.3

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Copier:
    """Copies extents of these disks.

    Args:
        bytes_per_second: limit of what is not urgent; 0 for none.
    """

    def __init__(
        self, disks: Sequence[TrackedDisk], ladder: Ladder, clock: Clock, *, bytes_per_second: int = 0
    ) -> None:
        self._disks, self._ladder, self._changes, self._clock = disks, ladder, ladder.log, clock
        self._rate = bytes_per_second
        self._due = 0.0
        # Page-aligned, owned, reused. A batch may be a region more than its limit, and is read into whole pages.
        more = max(disk.regions.region_bytes for disk in disks) + mmap.PAGESIZE
        self._batch = memoryview(mmap.mmap(-1, BATCH_BYTES + more))
        self.copied_bytes = self.equal_bytes = 0
        #: Bytes a second that reading extents gave lately.
        self.read_rate = _FIRST_RATE

    async def copy_round(self, limit_bytes: int, *, urgent: bool = False) -> int:
        """Copy what is dirty and not under way, about once, and about `limit_bytes` at most; the bytes copied."""
        copied = 0
        for disk in self._disks:
            while copied < limit_bytes and disk.completeness.is_begun:
                await self._wait_for_room()
                if not self._may_take(disk):
                    break
                taken = disk.extents.take(BATCH_BYTES)
                if not taken.offsets.size or not await self._copy(disk, taken):
                    break
                copied += taken.byte_count
                if not urgent:
                    await self._pace(taken.byte_count)
        return copied

    @staticmethod
    def _may_take(disk: TrackedDisk) -> bool:
        """Asked in the step that takes: once a loss has come to light, nobody knows what is under way."""
        return disk.completeness.is_begun

    async def touch(self, disk: TrackedDisk, taken: Iterable[tuple[int, int]]) -> None:
        """Have these ranges recorded as touched, as whatever changes a digest has to be."""
        touched = self._ladder.touched[disk.index]
        while missing := [extent for extent in taken if not touched.covers(*extent)]:
            await touched.record_all(missing)

    def append(self, disk: TrackedDisk, offset: int, view: memoryview) -> bool:
        """Put this content into the log, of which its range is recorded as touched; False: no room now."""
        if np.frombuffer(view, np.uint64).any():
            done = self._changes.append_copy(Kind.WRITE, disk.index, offset, len(view), view)
        else:
            done = self._changes.append_copy(Kind.ZERO, disk.index, offset, len(view))
        if done:
            self.copied_bytes += len(view)
        return done

    async def _copy(self, disk: TrackedDisk, taken: Taken) -> bool:
        done = False
        try:
            seconds, rows = await to_the_end(asyncio.to_thread(self._read, disk, taken))
            rate = taken.byte_count / max(seconds, 1e-6)
            self.read_rate = (1 - _RATE_WEIGHT) * self.read_rate + _RATE_WEIGHT * rate
            await self.touch(disk, list(taken))
            pieces = zip(self._pieces(taken), rows, strict=True)
            done = all(self._append_differing(disk, *piece, of) for piece, of in pieces)
        except OSError as error:
            _log.error("disk %s can't be read: %s", disk.name, error, extra=fields(disk=disk.name))
            await self._clock.sleep(_FAILURE_SECONDS)
        finally:
            if done:
                disk.extents.copied(taken)
            else:
                disk.extents.put_back(taken)
        return done

    def _read(self, disk: TrackedDisk, taken: Taken) -> tuple[float, list[Rows | None]]:
        """Read the batch; how long it took, and the digests of those extents that hold whole chunks."""
        began, digests = self._clock.monotonic(), self._ladder.digests.get(disk.index)
        for offset, view in self._pieces(taken):
            disk.read_into(offset, view)
        seconds = self._clock.monotonic() - began
        whole = (len(view) >= CHUNK_BYTES and digests is not None for _, view in self._pieces(taken))
        pieces = zip(self._pieces(taken), whole, strict=True)
        return seconds, [digests.rows(*piece) if has and digests is not None else None for piece, has in pieces]

    def _append_differing(self, disk: TrackedDisk, offset: int, view: memoryview, rows: Rows | None) -> bool:
        digests = self._ladder.digests.get(disk.index)
        if rows is None or digests is None:
            return self.append(disk, offset, view)
        self._changes.seal()
        begin, _ = digests.whole(offset, len(view))
        sent = 0
        for start, length in list(digests.differing(offset, len(view), rows)):
            if not self.append(disk, start, view[start - offset : start - offset + length]):
                return False
            first, end = digests.whole(start, length)
            digests.put(first * CHUNK_BYTES, rows[first - begin : end - begin])
            sent += length
        self.equal_bytes += len(view) - sent
        return True

    def _pieces(self, taken: Taken) -> list[tuple[int, memoryview]]:
        places = np.cumsum(taken.lengths) - taken.lengths  # granules are pages, but for the disk's last
        aligned = -(-places // mmap.PAGESIZE) * mmap.PAGESIZE
        return [
            (offset, self._batch[place : place + length])
            for (offset, length), place in zip(taken, aligned.tolist(), strict=True)
        ]

    async def _wait_for_room(self) -> None:
        while self._changes.used_bytes > self._changes.limit_bytes * _BUSY_SHARE:
            await self._clock.sleep(MOMENT_SECONDS)

    async def _pace(self, length: int) -> None:
        if not self._rate:
            return
        now = self._clock.monotonic()
        self._due = max(self._due, now - 1.0) + length / self._rate
        if self._due > now:
            await self._clock.sleep(self._due - now)


async def to_the_end(work: Awaitable[_Result]) -> _Result:
    """Await a thread's work; if cancelled, not before it has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
