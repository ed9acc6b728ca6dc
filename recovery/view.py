"""A view: a machine's disks at one point, readable straight from the sealed log.

`read` is for readers at random and keeps the chunks it opened last. `pieces` and `copy` go through a disk in order and
skip what is zeros; they hold at most `memory_bytes` of its data at a time (see `plan`) and open chunks in threads,
some fetches under way at once. `copy` also overlaps filling the next window with writing the last one out, and uses
its two buffers again and again: fresh memory costs as much in page faults as opening the chunks does. `scatter` has no
buffers at all: opened chunks go where they belong at once, in pieces as small as the writes once were. That is for
files, whose page cache puts them together; storage wants few large requests, and a device would read the rest of a
page that a piece does not fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from recovery.chunks import CACHE_BYTES, ChunkCache, ChunkSource, MachineLog, close_together
from recovery.extents import ExtentMap
from recovery.index import State
from recovery.layers import DiskMap
from recovery.plan import BLOCK_BYTES, HOLE_BYTES, Copies, Fetch, Window, choose_window, scattered, windows
from recovery.records import bytes_from, chunks_of
from replicar.errors import PermanentError
from replicar.formats.record import Disk
from replicar.log.reader import Segment

#: A disk's data in memory while it is materialised (two windows of half of it) is a quarter of what is free, but:
MIN_MEMORY_BYTES: Final = 128 << 20
MAX_MEMORY_BYTES: Final = 2 << 30
#: Batches handed out at once by `copy`; Azure's 60 MiB/s a blob is reached with four requests of 4 MiB.
SINKS: Final = 4
#: Chunks are opened together up to so many bytes: the interpreter's part is paid once for them, and what was opened is
#: still in the processor's cache when it is written.
TOGETHER_BYTES: Final = 4 << 20
#: An offset on the disk and the bytes there.
Piece = tuple[int, memoryview]
#: Called with some pieces of together at most 4 MiB; the bytes are the callee's until it returns.
Sink = Callable[[Sequence[Piece]], Awaitable[None]]
#: Called with the bytes of data that are done, and all there are.
Progress = Callable[[int, int], None]
#: Called in threads, several at once, with some opened chunks and what is wanted of each. The chunks may be kept.
Scatter = Callable[[Sequence[memoryview], Sequence[Copies]], None]
#: Called in threads, several at once, with the bytes that chunks from the given one on are sealed in.
_Use = Callable[[Segment, int, Sequence[Copies], memoryview], None]


class View:
    """A machine's disks at one point.

    Args:
        log: where the machine's log is.
        state: what `points.locate` found.
        memory_bytes: bound of what `pieces` and `copy` hold at a time, at least two blocks of 4 MiB; None: as this
            machine allows, see `memory_at_hand`.
    """

    def __init__(
        self,
        log: MachineLog,
        state: State,
        *,
        source: ChunkSource | None = None,
        cache_bytes: int = CACHE_BYTES,
        memory_bytes: int | None = None,
    ) -> None:
        self.state = state
        self.log, self.machine_id = log, log.machine_id
        self._source = source or ChunkSource(log)
        self._cache = ChunkCache(self._source, cache_bytes)
        self._window_bytes = (memory_bytes or memory_at_hand()) // 2

    @property
    def disks(self) -> tuple[Disk, ...]:
        return self.state.disks

    def disk(self, name: str) -> Disk:
        """The disk of that name.

        Raises:
            PermanentError: there is none at this point.
        """
        for disk in self.state.disks:
            if disk.name == name:
                return disk
        names = ", ".join(disk.name for disk in self.state.disks) or "none"
        raise PermanentError(f"the machine has no disk {name!r} at this point", hint=f"its disks: {names}", disk=name)

    async def data_bytes(self, disk: Disk) -> int:
        """Bytes of the disk that come from the log; the rest is zeros."""
        return await self._extents(disk).data_bytes()

    async def read(self, disk: Disk, offset: int, length: int) -> bytes:
        """`length` bytes of the disk at `offset`, both in bytes and within the disk.

        Raises:
            CorruptionError: a chunk that holds some of them fails its seal.
        """
        if offset < 0 or length < 0 or offset + length > disk.size_bytes:
            raise ValueError(f"{length} bytes at {offset} of a disk of {disk.size_bytes}")
        out = bytearray(length)
        extents, segments = await self._named(disk, offset, length)
        await fill(self._cache, segments, extents, offset, out)
        return bytes(out)

    async def stretches(self, disk: Disk, offset: int, length: int) -> list[tuple[int, int]]:
        """(start, end) of what comes from the log within a range, ascending and not touching; the rest is zeros."""
        data = (await self._extents(disk).lookup(offset, length)).data()
        if not len(data):
            return []
        apart = np.flatnonzero(data.start[1:] > data.end[:-1])
        first = data.start[np.concatenate(([0], apart + 1))]
        last = data.end[np.concatenate((apart, [len(data) - 1]))]
        return list(zip(first.tolist(), last.tolist(), strict=True))

    async def warm(self, disk: Disk, offset: int, length: int) -> None:
        """Open the chunks that a read of that range would need, into the cache. Raises as `read`."""
        extents, segments = await self._named(disk, offset, length)
        await warm(self._cache, segments, extents)

    async def pieces(self, disk: Disk) -> AsyncIterator[Piece]:
        """The disk's data in its order, as (offset, bytes); what is left out is zeros.

        A piece is at most 4 MiB and crosses no multiple of 4 MiB of the disk; its bytes are the caller's to keep.
        """
        async for window in self._windows(disk, HOLE_BYTES):
            buffer = memoryview(bytearray(window.buffer_bytes))
            await self._fill(window, buffer, _ignore)
            for span in window.spans:
                yield span.offset, buffer[span.place : span.place + span.length]

    async def copy(
        self,
        disk: Disk,
        sink: Sink,
        *,
        sinks: int = SINKS,
        hole_bytes: int = HOLE_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """Hand every piece of the disk to `sink`, some batches at once, in no particular order; see `pieces`.

        Args:
            hole_bytes: holes up to this size come as zeros instead of dividing a piece.
            progress: half of it is for bytes that were opened, half for those that the sink has taken.

        Whatever a sink raises ends the copy and is raised here.
        """
        total = await self.data_bytes(disk) if progress is not None else 0
        slots, done = asyncio.Semaphore(sinks), _Done(total, progress)
        free: asyncio.Queue[mmap.mmap | None] = asyncio.Queue()
        for _ in range(2):
            free.put_nowait(None)

        async def put(batch: list[Piece], share: int) -> None:
            try:
                await sink(batch)
                done.add(share)
            finally:
                slots.release()

        async def carry(window: Window, buffer: mmap.mmap) -> None:
            with memoryview(buffer) as view:
                await self._fill(window, view, done.add)
                async with asyncio.TaskGroup() as puts:
                    for batch in _batches(window, view):
                        share = sum(len(data) for _, data in batch) * window.data_bytes // window.buffer_bytes
                        await slots.acquire()
                        puts.create_task(put(batch, share))
            free.put_nowait(buffer)

        try:
            async with asyncio.TaskGroup() as group:
                async for window in self._windows(disk, hole_bytes):
                    is_whole = window.data_bytes == window.buffer_bytes  # then all of it is written over
                    buffer = _sized(await free.get(), window.buffer_bytes, clear=not is_whole)
                    group.create_task(carry(window, buffer))
        except BaseExceptionGroup as failed:
            raise first_error(failed) from None
        done.finish()

    async def scatter(self, disk: Disk, write: Scatter, *, progress: Progress | None = None) -> None:
        """Hand all of the disk's data to `write` as its chunks are opened, TOGETHER_BYTES of them at once, in no order.

        No byte of the disk comes twice. What comes lies within two windows at a time, together as large as `copy` has
        buffers: so much stays in the page cache, which puts it in order, and a chunk is opened once for each window
        that it has bytes in. `write` may keep chunks, and what it keeps counts as used: the progress and the windows
        may be ahead of it by that. When this returns or raises, no thread is in `write` any more; whatever that raises
        is raised here.
        """
        done = _Done(await self.data_bytes(disk) if progress is not None else 0, progress, counts=1)
        slots = asyncio.Semaphore(2)  # the next window begins while the last fetches of one are under way

        def use(found: Segment, first: int, wanted: Sequence[Copies], sealed: memoryview) -> None:
            key = self._source.key(found)
            together = max(TOGETHER_BYTES // found.table.header.chunk_bytes, 1)
            for start in range(0, len(wanted), together):
                some = wanted[start : start + together]
                write(self._source.open_together(found, [each.chunk for each in some], sealed, first, key), some)

        async def carry(fetches: Iterable[Fetch]) -> None:
            await self._open(fetches, use, done.add)
            slots.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for extents in self._extents(disk).slices():
                    sizes = await self.state.segments.chunk_sizes(np.unique(extents.data().segment).tolist())
                    for fetches in scattered(extents, sizes, window_bytes=self._window_bytes):
                        await slots.acquire()
                        group.create_task(carry(fetches))
        except BaseExceptionGroup as failed:
            raise first_error(failed) from None
        done.finish()

    def _extents(self, disk: Disk) -> DiskMap:
        return self.state.maps[disk.index]

    async def lookup(self, disk: Disk, offset: int, length: int) -> ExtentMap:
        """Where the log has the bytes of a range; raises as `read`."""
        return await self._extents(disk).lookup(offset, length)

    async def _named(self, disk: Disk, offset: int, length: int) -> tuple[ExtentMap, dict[int, Segment]]:
        """The extents of a range, and the segments that they name."""
        extents = await self._extents(disk).lookup(offset, length)
        return extents, await self.state.segments.load(np.unique(extents.data().segment).tolist())

    async def _windows(self, disk: Disk, hole_bytes: int) -> AsyncIterator[Window]:
        """The plan, slice by slice of the disk: the index of a large disk is never in memory as a whole."""
        async for extents in self._extents(disk).slices():
            sizes = await self.state.segments.chunk_sizes(np.unique(extents.data().segment).tolist())
            window_bytes = choose_window(extents, sizes, self._window_bytes)
            for window in windows(extents, sizes, window_bytes=window_bytes, hole_bytes=hole_bytes):
                yield window

    async def _fill(self, window: Window, out: memoryview, opened: Callable[[int], None]) -> None:
        def copy_out(found: Segment, first: int, wanted: Sequence[Copies], sealed: memoryview) -> None:
            key = self._source.key(found)
            for copies in wanted:
                data = memoryview(self._source.open_one(found, copies.chunk, sealed, first, key))
                for source, target, length in zip(copies.source, copies.target, copies.length, strict=True):
                    out[target : target + length] = data[source : source + length]

        await self._open(window.fetches, copy_out, opened)

    async def _open(self, fetches: Iterable[Fetch], use: _Use, used: Callable[[int], None]) -> None:
        """Have `use` open and use all chunks of some fetches, in threads; `used` is told how many bytes were."""
        try:
            async with asyncio.TaskGroup() as group:
                for fetch in fetches:
                    group.create_task(self._bring(fetch, use, used))
                    await asyncio.sleep(0)  # the first chunks are opened while the rest is planned
        except BaseExceptionGroup as failed:
            raise first_error(failed) from None

    async def _bring(self, fetch: Fetch, use: _Use, used: Callable[[int], None]) -> None:
        found = await self.state.segments.get(fetch.segment)
        by_chunk = {copies.chunk: copies for copies in fetch.copies}
        async with asyncio.TaskGroup() as group:
            for first, last in close_together(found, list(by_chunk)):
                wanted = [copies for index, copies in by_chunk.items() if first <= index <= last]
                group.create_task(self._visit(found, first, last, wanted, use, used))

    async def _visit(
        self,
        found: Segment,
        first: int,
        last: int,
        wanted: Sequence[Copies],
        use: _Use,
        used: Callable[[int], None],
    ) -> None:
        await self._source.visit(found, first, last, partial(use, found, first, wanted))
        used(sum(sum(copies.length) for copies in wanted))


class _Done:
    """Counts up to `total` bytes for a progress callback; with `counts` of 2 every byte is counted so often."""

    def __init__(self, total: int, progress: Progress | None, *, counts: int = 2) -> None:
        self._done, self._total, self._counts, self._progress = 0, total * counts, counts, progress
        self.add(0)

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._progress is not None:
            self._progress(self._done // self._counts, self._total // self._counts)

    def finish(self) -> None:
        self.add(self._total)


async def fill(
    cache: ChunkCache, segments: Mapping[int, Segment], extents: ExtentMap, offset: int, out: bytearray
) -> None:
    """Copy the bytes of some extents, all of them within `out`, which begins at `offset` of the disk.

    Raises:
        CorruptionError: a chunk that holds some of them fails its seal.
    """

    async def one_segment(number: int, part: ExtentMap) -> None:
        table = segments[number].table
        rows = list(zip(part.start.tolist(), part.end.tolist(), part.place.tolist(), strict=True))
        needed = sorted({i for start, end, place in rows for i in chunks_of(table, place, end - start)})
        chunks = await cache.get(segments[number], needed)
        for start, end, place in rows:
            out[start - offset : end - offset] = bytes_from(table, chunks, place, end - start)

    data = extents.data()
    try:
        async with asyncio.TaskGroup() as group:
            for number in np.unique(data.segment).tolist():
                group.create_task(one_segment(number, data.of_segment(number)))
    except BaseExceptionGroup as failed:
        raise first_error(failed) from None


async def warm(cache: ChunkCache, segments: Mapping[int, Segment], extents: ExtentMap) -> None:
    """Have the cache hold the chunks of some extents.

    Raises:
        CorruptionError: one of them fails its seal.
    """
    data = extents.data()
    try:
        async with asyncio.TaskGroup() as group:
            for number in np.unique(data.segment).tolist():
                part, table = data.of_segment(number), segments[number].table
                rows = zip(part.place.tolist(), (part.end - part.start).tolist(), strict=True)
                needed = sorted({i for place, length in rows for i in chunks_of(table, place, length)})
                group.create_task(cache.get(segments[number], needed))
    except BaseExceptionGroup as failed:
        raise first_error(failed) from None


def _batches(window: Window, buffer: memoryview) -> Iterator[list[Piece]]:
    """The window's spans as pieces, so many together as make up one block."""
    batch: list[Piece] = []
    held = 0
    for span in window.spans:
        if batch and held + span.length > BLOCK_BYTES:
            yield batch
            batch, held = [], 0
        batch.append((span.offset, buffer[span.place : span.place + span.length]))
        held += span.length
    if batch:
        yield batch


def _sized(buffer: mmap.mmap | None, length: int, *, clear: bool) -> mmap.mmap:
    """A buffer of at least that length, of zeros if asked to: the given one, if it is large enough. A new one is in
    huge pages where the kernel has them, which costs a fifth of the page faults' time."""
    if buffer is None or len(buffer) < length:
        made = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            made.madvise(mmap.MADV_HUGEPAGE)
        return made
    if clear:
        np.frombuffer(buffer, dtype=np.uint8, count=length).fill(0)
    return buffer


def _ignore(_: int) -> None:
    return None


def memory_at_hand() -> int:
    """A quarter of the memory that is available here, within MIN_MEMORY_BYTES and MAX_MEMORY_BYTES."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        available = 0  # no such file outside of Linux
    return min(max(available // 4, MIN_MEMORY_BYTES), MAX_MEMORY_BYTES)


def first_error(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group, out of whatever groups it is wrapped in: the others follow from it."""
    error: BaseException = failed
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
