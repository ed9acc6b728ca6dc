"""Carries stretches of a disk from one place to another, and shows that both sides are equal.

It may be killed anywhere and run again: writing the same bytes twice does no harm, and `checkpoint` says, after a
flush of the destination, up to which offset nothing is left to do. Pieces are handled side by side, so that one side's
latency hides the other's; memory is `TASKS` pieces.

Where the histories leave nothing open (`compare=False`) a piece is read once and written. Where they do, both sides are
read and only the sectors that differ are written, so what is written stays small, at the price of reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from recovery.failback.spans import Spans
from recovery.view import first_error
from replicar.errors import CorruptionError, PermanentError

#: Read and written in one go.
PIECE_BYTES: Final = 1 << 20
#: Pieces under way at once.
TASKS: Final = 6
#: Between two checkpoints, each of which flushes the destination.
CHECKPOINT_BYTES: Final = 64 << 20
#: What a comparison tells apart: the sector that every disk here has.
SECTOR_BYTES: Final = 512
#: Equal sectors up to this many are written again rather than splitting a write.
_BRIDGE_SECTORS: Final = 8

Checkpoint = Callable[[int], Awaitable[None]]
Progress = Callable[[int, int], None]


class Origin(Protocol):
    """A disk that is read."""

    @property
    def size_bytes(self) -> int: ...

    async def read(self, offset: int, length: int) -> bytes | bytearray: ...


class Destination(Origin, Protocol):
    """A disk that is written to."""

    async def write(self, offset: int, data: bytes | memoryview) -> object: ...

    async def write_zeroes(self, offset: int, length: int) -> object: ...

    async def flush(self) -> object:
        """All that was written before is durable when this returns."""
        ...


@dataclass(slots=True)
class Moved:
    """What was done, in bytes: looked at, written as data, made zeros."""

    looked_at: int = 0
    written: int = 0
    zeroed: int = 0


def check_fits(origin: Origin, destination: Origin, disk: str) -> None:
    """Raises PermanentError: the destination is smaller."""
    if destination.size_bytes < origin.size_bytes:
        raise PermanentError(
            f"disk {disk} has {origin.size_bytes} bytes, where it is to go there are {destination.size_bytes}",
            hint="make the disk at home at least as large, and ask again; nothing was written",
            disk=disk,
        )


async def carry(
    spans: Spans,
    origin: Origin,
    destination: Destination,
    *,
    compare: bool = False,
    start_at: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Moved:
    """Have the destination hold what the origin holds, in these stretches.

    Args:
        start_at: an offset that an earlier `checkpoint` was told; everything before it is there.
        progress: told bytes done, and all there are.

    Whatever either side raises ends it and is raised here.
    """
    moved, total = Moved(), spans.total_bytes
    todo = spans.clipped(start_at, origin.size_bytes)
    already = total - todo.total_bytes

    async def one(offset: int, length: int) -> None:
        data = memoryview(await origin.read(offset, length))
        for start, end in _unequal(data, await destination.read(offset, length)) if compare else [(0, length)]:
            if data[start:end] == bytes(end - start):
                await destination.write_zeroes(offset + start, end - start)
                moved.zeroed += end - start
            else:
                await destination.write(offset + start, data[start:end])
                moved.written += end - start
        moved.looked_at += length
        if progress is not None:
            progress(already + moved.looked_at, total)

    for batch in _batches(todo.pieces(PIECE_BYTES), CHECKPOINT_BYTES):
        await _side_by_side(one, batch)
        await destination.flush()
        if checkpoint is not None:
            await checkpoint(sum(batch[-1]))
    return moved


async def verify(
    spans: Spans, origin: Origin, destination: Origin, *, disk: str, progress: Progress | None = None
) -> None:
    """Show that both sides hold the same in these stretches.

    Raises:
        CorruptionError: they don't; says where first.
    """
    done, total = 0, spans.total_bytes
    wrong: list[int] = []

    async def one(offset: int, length: int) -> None:
        nonlocal done
        ours, theirs = await asyncio.gather(origin.read(offset, length), destination.read(offset, length))
        if ours != theirs:
            wrong.append(offset + next(_unequal(memoryview(ours), theirs))[0])
        done += length
        if progress is not None:
            progress(done, total)

    for batch in _batches(spans.pieces(PIECE_BYTES), CHECKPOINT_BYTES):
        await _side_by_side(one, batch)
        if wrong:
            raise CorruptionError(
                f"disk {disk} is not the same on both sides, first at byte {min(wrong)}",
                hint="something else writes to it, or one side's disk is faulty; copy again once that is settled",
                disk=disk,
                offset=min(wrong),
            )


async def unequal(spans: Spans, one: Origin, other: Origin, *, progress: Progress | None = None) -> Spans:
    """Where two disks differ within these stretches, to the sector: both are read."""
    done, total = 0, spans.total_bytes
    found: list[tuple[int, int]] = []

    async def compare(offset: int, length: int) -> None:
        nonlocal done
        ours, theirs = await asyncio.gather(one.read(offset, length), other.read(offset, length))
        found.extend((offset + start, end - start) for start, end in _unequal(memoryview(ours), theirs))
        done += length
        if progress is not None:
            progress(done, total)

    unlike = Spans.of(())
    for batch in _batches(spans.pieces(PIECE_BYTES), CHECKPOINT_BYTES):
        await _side_by_side(compare, batch)
        unlike, found = unlike.union(Spans.of(found)), []
    return unlike


async def _side_by_side(work: Callable[[int, int], Awaitable[None]], pieces: Iterable[tuple[int, int]]) -> None:
    left = iter(pieces)

    async def some() -> None:
        for offset, length in left:  # shared: each takes the next one
            await work(offset, length)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(some())
    except BaseExceptionGroup as failed:
        raise first_error(failed) from None


def _batches(pieces: Iterable[tuple[int, int]], most_bytes: int) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += piece[1]
        if held >= most_bytes:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _unequal(ours: memoryview, theirs: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Stretches in which two pieces differ, to the sector, as (start, end)."""
    length = len(ours)
    whole = length // SECTOR_BYTES * SECTOR_BYTES
    one = np.frombuffer(ours, dtype=np.uint64, count=whole // 8).reshape(-1, SECTOR_BYTES // 8)
    other = np.frombuffer(theirs, dtype=np.uint64, count=whole // 8).reshape(-1, SECTOR_BYTES // 8)
    rows = np.flatnonzero(np.any(one != other, axis=1))
    if len(rows):
        cuts = np.flatnonzero(np.diff(rows) > _BRIDGE_SECTORS)
        firsts, lasts = np.concatenate(([0], cuts + 1)), np.concatenate((cuts, [len(rows) - 1]))
        for first, last in zip(rows[firsts].tolist(), rows[lasts].tolist(), strict=True):
            yield first * SECTOR_BYTES, (last + 1) * SECTOR_BYTES
    if bytes(ours[whole:]) != theirs[whole:]:
        yield whole, length
