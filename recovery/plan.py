"""How to materialise a disk: which chunks to fetch together and where their bytes go, planned as data.

The plan is in the disk's order, so that whoever writes it out writes in order. A *span* is a stretch of the disk that
is written in one go: it lies within one aligned block (what one Put Page may hold) and bridges small holes. A *window*
is as many spans as fit into the memory at hand; within a window every chunk is fetched and opened once, so with more
memory fewer chunks are opened twice, and a disk that was written in order costs each chunk about once however little
memory there is. Where pieces need not be put together before they are written there is no buffer (`scattered`); a
window then only keeps what is written near each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise, starmap
from operator import itemgetter
from typing import Final

import numpy as np

from recovery.extents import ExtentMap, Ints

#: What one Put Page holds at most; blocks are aligned to it.
BLOCK_BYTES: Final = 4 << 20
#: A hole in a span up to this size is written as zeros rather than left out: at 500 requests/s and 60 MiB/s a blob, a
#: request weighs as much as 123 KiB.
HOLE_BYTES: Final = 128 << 10
#: Windows are not made smaller than this; one is filled while the one before is written out.
MIN_WINDOW_BYTES: Final = 32 << 20
#: Opening so many times the chunks that there are is taken for smaller windows, which overlap better with the writing.
WORTHWHILE_OPENS: Final = 1.2


@dataclass(frozen=True, slots=True)
class Copies:
    """Pieces of one chunk: `length` bytes from `source` in the opened chunk go to `target` in the window's buffer, or
    on the disk if there is none."""

    chunk: int
    source: list[int]
    target: list[int]
    length: list[int]


@dataclass(frozen=True, slots=True)
class Fetch:
    """The chunks that a window needs of one segment, ascending."""

    segment: int
    copies: tuple[Copies, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes of the disk at `offset`, which lie at `place` in the window's buffer."""

    offset: int
    length: int
    place: int


@dataclass(frozen=True, slots=True)
class Window:
    """Some spans, the bytes they take together, and what fills them."""

    spans: tuple[Span, ...]
    buffer_bytes: int
    data_bytes: int
    fetches: tuple[Fetch, ...]


def choose_window(extents: ExtentMap, sizes: Mapping[int, int], most_bytes: int) -> int:
    """The smallest window, in bytes and at most `most_bytes`, with which hardly a chunk is opened twice.

    A disk written in order does with little; one written at random takes all there is.
    """
    data = _split_blocks(extents.data(), BLOCK_BYTES)
    if not len(data):
        return most_bytes
    numbers, which = np.unique(data.segment, return_inverse=True)
    # Chunks are counted by where pieces begin, which is near enough for choosing.
    chunk = data.place // _chunk_sizes(numbers, sizes)[which] + data.segment * (1 << 12)
    block = data.start // BLOCK_BYTES
    order = np.argsort(chunk, kind="stable")
    chunk, block = chunk[order], block[order]
    fewest = int(np.sum(np.diff(chunk) != 0)) + 1
    window_bytes = MIN_WINDOW_BYTES
    while window_bytes < most_bytes:
        # Within a chunk blocks ascend (the sort is stable), so a change of either is one more chunk to open.
        opens = int(np.sum((np.diff(chunk) != 0) | (np.diff(block // (window_bytes // BLOCK_BYTES)) != 0))) + 1
        if opens <= WORTHWHILE_OPENS * fewest:
            return window_bytes
        window_bytes *= 2
    return most_bytes


def windows(
    extents: ExtentMap,
    sizes: Mapping[int, int],
    *,
    window_bytes: int,
    block_bytes: int = BLOCK_BYTES,
    hole_bytes: int = HOLE_BYTES,
) -> Iterator[Window]:
    """The plan for a disk's extents (zeros are left out), one window at a time.

    Args:
        sizes: the chunk size of every segment that the extents name, by number.
        window_bytes: what the buffer of a window may take; at least one block.
    """
    data = _split_blocks(extents.data(), block_bytes)
    if not len(data):
        return
    block = data.start // block_bytes
    begins = np.concatenate(([True], (block[1:] != block[:-1]) | (data.start[1:] - data.end[:-1] > hole_bytes)))
    ends = np.concatenate((begins[1:], [True]))
    span_start, span_end = data.start[begins], data.end[ends]
    span_of = np.cumsum(begins) - 1
    filled = np.concatenate(([0], np.cumsum(span_end - span_start)))
    first, count = 0, len(span_start)
    while first < count:
        last = int(np.searchsorted(filled, filled[first] + window_bytes, side="right")) - 1
        last = min(max(last, first + 1), count)
        left, right = (int(edge) for edge in np.searchsorted(span_of, (first, last)))
        part = ExtentMap(data.start[left:right], data.end[left:right], data.segment[left:right], data.place[left:right])
        base = filled[first:last] - filled[first]
        target = part.start - span_start[span_of[left:right]] + base[span_of[left:right] - first]
        columns = (span_start[first:last], (span_end - span_start)[first:last], base)
        spans = tuple(Span(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
        buffer_bytes = int(filled[last] - filled[first])
        yield Window(spans, buffer_bytes, part.data_bytes, tuple(_fetches(part, target, sizes)))
        first = last


def scattered(
    extents: ExtentMap, sizes: Mapping[int, int], *, window_bytes: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[Iterator[Fetch]]:
    """The plan for a disk's extents without a buffer between: `target` is where bytes go on the disk.

    Args:
        sizes: the chunk size of every segment that the extents name, by number.
        window_bytes: so much data is fetched before what follows it on the disk; at least one block.

    Yields:
        What belongs together, planned while it is taken.
    """
    data = _split_blocks(extents.data(), block_bytes)
    held = np.concatenate(([0], np.cumsum(data.end - data.start)))
    left = 0
    while left < len(data):
        right = max(int(np.searchsorted(held, held[left] + window_bytes, side="right")) - 1, left + 1)
        part = ExtentMap(data.start[left:right], data.end[left:right], data.segment[left:right], data.place[left:right])
        yield _fetches(part, part.start, sizes)
        left = right


def _split_blocks(data: ExtentMap, block_bytes: int) -> ExtentMap:
    rows, _, start, end = _split(data.start, data.end, np.int64(block_bytes))
    return ExtentMap(start, end, data.segment[rows], data.place[rows] + (start - data.start[rows]))


def _fetches(part: ExtentMap, target: Ints, sizes: Mapping[int, int]) -> Iterator[Fetch]:
    numbers, which = np.unique(part.segment, return_inverse=True)
    size = _chunk_sizes(numbers, sizes)[which]
    rows, chunk, start, end = _split(part.place, part.place + (part.end - part.start), size)
    number = part.segment[rows]
    source = start - chunk * size[rows]
    placed = target[rows] + (start - part.place[rows])
    order = np.lexsort((source, chunk, number))
    number, chunk, source, placed, length = (column[order] for column in (number, chunk, source, placed, end - start))
    fresh = np.flatnonzero(np.concatenate(([True], (number[1:] != number[:-1]) | (chunk[1:] != chunk[:-1]))))
    # Lists from here on: numpy is slow where rows are taken one by one.
    source_, placed_, length_ = source.tolist(), placed.tolist(), length.tolist()
    cuts = starmap(slice, pairwise([*fresh.tolist(), len(number)]))
    chunks = zip(number[fresh].tolist(), chunk[fresh].tolist(), cuts, strict=True)
    for segment, rows_ in groupby(chunks, key=itemgetter(0)):
        copies = (Copies(index, source_[cut], placed_[cut], length_[cut]) for _, index, cut in rows_)
        yield Fetch(segment, tuple(copies))


def _chunk_sizes(numbers: Ints, sizes: Mapping[int, int]) -> Ints:
    return np.array([sizes[number] for number in numbers.tolist()], dtype=np.int64)


def _split(start: Ints, end: Ints, unit: Ints | np.int64) -> tuple[Ints, Ints, Ints, Ints]:
    """Cut ranges at multiples of `unit` (one for all, or one each).

    Returns:
        For every part: the row of its range, which multiple it lies in, its start and end.
    """
    unit = np.broadcast_to(unit, start.shape)
    first = start // unit
    parts = (end - 1) // unit - first + 1
    rows = np.repeat(np.arange(len(start)), parts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)
    cell = first[rows] + nth
    size = unit[rows]
    return rows, cell, np.maximum(start[rows], cell * size), np.minimum(end[rows], (cell + 1) * size)
