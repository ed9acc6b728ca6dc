"""Which bytes of the log blobs are still needed: what to clear, and what to delete, planned as data.

Needed is what a kept state reads (of each segment its header, its table and the chunks that hold bytes of the state's
disks) and everything behind the floor. All else that was written is cleared *where it lies*: a page blob gives back the
pages that are cleared, the chunks that stay keep their seals and places, and nothing has to be copied, named anew or
switched over. What is cleared is found by looking at what was written, so a sweep that died is simply done again.

A blob of which nothing is needed is deleted, if its whole run is needed no more and is not the newest one (which says
how the next is to be numbered). Blobs that a writer holds are left alone: what is dead in them is freed when it goes on
to its next run.

Weak: a chunk (128 KiB of the stream) is kept as a whole if one byte of it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from recovery.chunks import MachineLog
from recovery.directory import Located, read_segment
from recovery.extents import ZEROS
from recovery.index import State
from recovery.layers import Segments
from replicar.errors import CorruptionError
from replicar.formats import logblob, segment
from replicar.formats.logblob import BlobName
from replicar.log.reader import Start
from replicar.storage.store import PAGE_BYTES, BlobInfo, PageBlobStore, Ranges, merge_ranges

#: One Clear Pages takes at most so much, though Azure has no limit: a sweep is to be seen to go on.
CLEAR_BYTES: Final = 1 << 30
#: A segment has at most 1,024 chunks.
_CHUNK_BITS: Final = 12
_CHUNK_MASK: Final = (1 << _CHUNK_BITS) - 1


@dataclass(slots=True)
class Live:
    """The chunks that are needed, by segment number; grows with every state that is `add`ed."""

    chunks: dict[int, set[int]] = field(default_factory=dict)
    places: dict[int, Located] = field(default_factory=dict)

    async def add(self, state: State) -> None:
        """All that a state reads.

        Raises:
            CorruptionError: its index is damaged; then nothing may be cleared.
        """
        for disk in state.disks:
            async for part in state.maps[disk.index].slices():
                data = part.data()
                numbers, which = np.unique(data.segment, return_inverse=True)
                sizes = await state.segments.chunk_sizes(numbers.tolist())
                await self._place(state.segments, numbers.tolist())
                size = np.array([sizes[number] for number in numbers.tolist()], dtype=np.int64)[which]
                first = data.place // size
                count = (data.place + (data.end - data.start) - 1) // size - first + 1
                nth = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
                keys = np.unique((np.repeat(data.segment, count) << _CHUNK_BITS) | (np.repeat(first, count) + nth))
                for number, chunk in zip((keys >> _CHUNK_BITS).tolist(), (keys & _CHUNK_MASK).tolist(), strict=True):
                    self.chunks.setdefault(number, set()).add(chunk)

    async def _place(self, segments: Segments, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number == ZEROS or number in self.places:
                continue
            fresh = segments.fresh.get(number)
            item = await segments.locate(number) if fresh is None else None
            if fresh is not None:
                item = Located(fresh.table.header, fresh.table.digest, fresh.blob, fresh.offset)
            if item is None:
                raise CorruptionError(
                    f"the index names segment {number} and does not say where it is",
                    hint="run `replicar verify`; nothing is given up meanwhile",
                    number=number,
                )
            self.places[number] = item

    async def ranges(self, log: MachineLog) -> dict[str, Ranges]:
        """What has to stay of each blob, as (offset, length) in whole pages, ascending."""
        found: dict[str, list[tuple[int, int]]] = {}
        for number, item in self.places.items():
            header, chunks = item.header, self.chunks[number]
            if len(chunks) == header.chunk_count:
                parts = [(0, header.table_offset + header.table_bytes)]
            else:
                edges = (await read_segment(log, item)).table.chunk_offsets
                parts = [(0, segment.HEADER_BYTES), (header.table_offset, header.table_bytes)]
                parts += [(int(edges[chunk]), int(edges[chunk + 1] - edges[chunk])) for chunk in chunks]
            found.setdefault(item.blob, []).extend(_pages(item.offset + offset, length) for offset, length in parts)
        return {blob: merge_ranges(parts) for blob, parts in found.items()}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to clear of which blob, and which blobs to delete, in this order. `held_bytes` can't be freed yet."""

    clear: tuple[tuple[str, int, int], ...]
    delete: tuple[str, ...]
    held_bytes: int


def plan_sweep(
    blobs: Iterable[BlobInfo], written: Mapping[str, Ranges], live: Mapping[str, Ranges], floor: Start
) -> Sweep:
    """What is not needed any more. Pure.

    Args:
        blobs: the machine's log blobs.
        written: what was written of those that lie in front of the floor at all.
        live: what has to stay of them, from `Live.ranges`.
        floor: where the log goes on.
    """
    named = {name: info for info in blobs if (name := logblob.read_name(info.name)) is not None}
    newest = max(((name.epoch, name.run) for name in named), default=(0, 0))
    clear: list[tuple[str, int, int]] = []
    delete: list[str] = []
    held = 0
    for run in sorted({(name.epoch, name.run) for name in named if (name.epoch, name.run) <= floor.run}):
        stripes = sorted((name for name in named if (name.epoch, name.run) == run), reverse=True)
        dead = [(name, _dead(str(name), written, live, _limit(name, named[name], floor))) for name in stripes]
        is_old = run < floor.run and run < newest
        if is_old and not any(live.get(str(name)) or named[name].leased for name in stripes):
            delete += [str(name) for name in stripes]  # stripe 0, without which readers take no run, goes last
            continue
        for name, ranges in dead:
            if named[name].leased:
                held += sum(length for _, length in ranges)
            else:
                clear += [(str(name), offset, length) for offset, length in ranges]
    return Sweep(tuple(clear), tuple(delete), held)


def reaches_before(name: BlobName, floor: Start) -> bool:
    """Whether a blob has anything in front of the floor."""
    return (name.epoch, name.run) < floor.run or str(name) in floor.offsets


async def written_ranges(store: PageBlobStore, blobs: Iterable[BlobInfo], floor: Start) -> dict[str, Ranges]:
    """What was written of the blobs that lie in front of the floor."""
    names = [name for info in blobs if (name := logblob.read_name(info.name)) is not None]
    return {str(name): await store.page_ranges(str(name)) for name in names if reaches_before(name, floor)}


def _limit(name: BlobName, info: BlobInfo, floor: Start) -> int:
    """Up to where a blob lies in front of the floor."""
    if (name.epoch, name.run) < floor.run:
        return info.size_bytes
    return floor.offsets.get(str(name), 0)


def _dead(blob: str, written: Mapping[str, Ranges], live: Mapping[str, Ranges], limit: int) -> Ranges:
    """Written, not live, behind the blob's header and before `limit`."""
    found: Ranges = []
    kept = live.get(blob, [])
    for offset, length in written.get(blob, []):
        at, end = max(offset, logblob.HEADER_BYTES), min(offset + length, limit)
        for start, size in kept:
            if start >= end:
                break
            if start + size <= at:
                continue
            found += _cut(at, min(start, end))
            at = start + size
        found += _cut(at, end)
    return found


def _cut(start: int, end: int) -> Ranges:
    return [(at, min(CLEAR_BYTES, end - at)) for at in range(start, end, CLEAR_BYTES)]


def _pages(offset: int, length: int) -> tuple[int, int]:
    """A range, widened to whole pages."""
    start, end = offset // PAGE_BYTES * PAGE_BYTES, -(-(offset + length) // PAGE_BYTES) * PAGE_BYTES
    return start, end - start
