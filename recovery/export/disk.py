"""A disk of a view as it is served: what the point holds, and over it what was written to the overlay.

Reads wait for storage, and many may be under way; everything that the overlay does is done at once. A read gives what
the disk held when it was asked for, or what was written since, as a real disk does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from recovery.export.overlay import Overlay
from recovery.export.readahead import ReadAhead
from recovery.view import View, first_error
from replicar.errors import ReplicarError
from replicar.formats.frame import Buffer
from replicar.formats.overlay import Base
from replicar.formats.record import Disk
from replicar.observe.logs import fields

#: Offset, length, and whether it is zeros that take no space.
Stretch = tuple[int, int, bool]

#: Read ahead at once for one disk; further ones are left out.
READ_AHEADS: Final = 2

_log = logging.getLogger(__name__)


class Point(Protocol):
    """What a disk held at a point: a view of the log, or files that were made of it."""

    async def read(self, disk: Disk, offset: int, length: int) -> bytes: ...

    async def stretches(self, disk: Disk, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """(start, end) of what is no zeros, ascending."""
        ...

    async def warm(self, disk: Disk, offset: int, length: int) -> None:
        """That range will be read soon."""
        ...


class ServedDisk:
    """One disk.

    Args:
        overlay: where writes go; None: there are none.
    """

    def __init__(self, view: Point, disk: Disk, overlay: Overlay | None = None) -> None:
        self.name, self.size_bytes = disk.name, disk.size_bytes
        self.overlay = overlay
        self._view, self._disk = view, disk
        self._ahead = ReadAhead(disk.size_bytes)
        self._fetching: set[asyncio.Task[None]] = set()
        self._flush: asyncio.Task[None] | None = None
        self._next_flush: asyncio.Task[None] | None = None

    @property
    def is_writable(self) -> bool:
        return self.overlay is not None

    async def read(self, offset: int, length: int) -> bytearray:
        """What the disk holds.

        Raises:
            CorruptionError: what the point holds there can't be opened.
            TransientError: storage is away.
            OSError: the overlay can't be read.
        """
        own = self._own(offset, length)
        self._look_ahead(offset, length)
        out = bytearray(length)
        gaps = list(_between(own, offset, length))
        if len(gaps) == 1 and not own:
            out[:] = await self._view.read(self._disk, offset, length)
        else:
            for (start, size), data in zip(gaps, await self._base(gaps), strict=True):
                out[start - offset : start - offset + size] = data
        for start, size in own:
            assert self.overlay is not None
            out[start - offset : start - offset + size] = self.overlay.read(start, size)
        return out

    async def stretches(self, offset: int, length: int) -> list[Stretch]:
        """A range in order, neighbours of the same kind as one. Raises as `read`."""
        own = self._own(offset, length)
        found: list[Stretch] = []
        at = offset
        for start, size in own:
            assert self.overlay is not None
            found += await self._point_stretches(at, start - at)
            found += self.overlay.stretches(start, size)
            at = start + size
        found += await self._point_stretches(at, offset + length - at)
        return list(_joined(found))

    def write(self, offset: int, data: Buffer) -> None:
        """Whole sectors, within the disk. Raises OSError when the overlay can't take them."""
        assert self.overlay is not None, "a disk without an overlay is not written to"
        self.overlay.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """As `write`, of zeros."""
        assert self.overlay is not None, "a disk without an overlay is not written to"
        self.overlay.zero(offset, length)

    async def flush(self) -> None:
        """What was written before is durable, if the overlay is one that is kept. Raises OSError.

        Flushes that wait together share one: all who come while one is under way wait for the one after it.
        """
        if self.overlay is None:
            return
        if self._next_flush is None:
            self._next_flush = asyncio.get_running_loop().create_task(self._flush_after(self._flush))
        await asyncio.shield(self._next_flush)

    async def aclose(self) -> None:
        """Let go of the overlay, durable if it is kept. Raises OSError when it may not be."""
        for task in self._fetching:
            task.cancel()
        flushes = [task for task in (self._flush, self._next_flush) if task is not None]
        await asyncio.gather(*self._fetching, *flushes, return_exceptions=True)  # what failed fails again in `close`
        if self.overlay is not None:
            overlay, self.overlay = self.overlay, None
            await asyncio.to_thread(overlay.close)

    async def _flush_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._flush, self._next_flush = self._next_flush, None
        assert self.overlay is not None
        await asyncio.to_thread(self.overlay.flush)

    async def _base(self, gaps: list[tuple[int, int]]) -> list[bytes]:
        if len(gaps) == 1:
            return [await self._view.read(self._disk, *gaps[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._view.read(self._disk, *gap)) for gap in gaps]
        except BaseExceptionGroup as failed:
            raise first_error(failed) from None
        return [task.result() for task in tasks]

    def _own(self, offset: int, length: int) -> list[tuple[int, int]]:
        return list(self.overlay.changed(offset, length)) if self.overlay is not None else []

    async def _point_stretches(self, offset: int, length: int) -> list[Stretch]:
        found: list[Stretch] = []
        at, end = offset, offset + length
        for start, stop in await self._view.stretches(self._disk, offset, length) if length else []:
            if start > at:
                found.append((at, start - at, True))
            found.append((start, stop - start, False))
            at = stop
        if at < end:
            found.append((at, end - at, True))
        return found

    def _look_ahead(self, offset: int, length: int) -> None:
        wanted = self._ahead.follow(offset, length)
        if wanted is not None and len(self._fetching) < READ_AHEADS:
            task = asyncio.get_running_loop().create_task(self._fetch(*wanted))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)

    async def _fetch(self, offset: int, length: int) -> None:
        try:
            await self._view.warm(self._disk, offset, length)
        except ReplicarError as error:
            # Nobody has asked for it yet; whoever does is told.
            _log.info(
                "disk %s can't be read ahead at %d: %s",
                self.name,
                offset,
                error.message,
                extra=fields(disk=self.name, offset=offset),
            )


def base_of(view: View, disk: Disk) -> Base:
    """What an overlay over that disk lies over."""
    place = view.state.place
    return Base(view.machine_id, place.sequence, place.time_ns, disk.index, disk.name, disk.size_bytes)


def _between(own: list[tuple[int, int]], offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) within a range that `own` leaves out."""
    at = offset
    for start, size in own:
        if start > at:
            yield at, start - at
        at = start + size
    if at < offset + length:
        yield at, offset + length - at


def _joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    last: Stretch | None = None
    for offset, length, is_hole in stretches:
        if last is not None and last[2] == is_hole:
            last = (last[0], last[1] + length, is_hole)
            continue
        if last is not None:
            yield last
        last = (offset, length, is_hole)
    if last is not None:
        yield last
