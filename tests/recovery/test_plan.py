"""The plan of a materialisation: everything once, nothing beyond its block, no more memory than there is."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import given, strategies as st

from recovery.extents import ZEROS, ExtentMap
from recovery.plan import MIN_WINDOW_BYTES, Fetch, choose_window, scattered, windows

BLOCK = 64
HOLE = 8


def segments(*chunk_bytes: int) -> dict[int, int]:
    """The chunk sizes of segments 0, 1, ..."""
    return dict(enumerate(chunk_bytes))


def painted(rows: list[tuple[int, int, int, int]]) -> ExtentMap:
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return ExtentMap.from_table(table[:, 0], table[:, 0] + table[:, 1], table[:, 2], table[:, 3])


writes = st.lists(
    st.tuples(st.integers(0, 500), st.integers(1, 150), st.sampled_from([ZEROS, 0, 1, 2]), st.integers(0, 300)),
    max_size=30,
)


def placed(fetches: Sequence[Fetch], known: dict[int, int]) -> dict[int, tuple[int, int]]:
    """The segment and place that some fetches take every byte from, by where it goes; no chunk is opened twice."""
    found: dict[int, tuple[int, int]] = {}
    opened = [(fetch.segment, copies.chunk) for fetch in fetches for copies in fetch.copies]
    assert opened == sorted(set(opened))
    for fetch in fetches:
        size = known[fetch.segment]
        for copies in fetch.copies:
            for source, target, length in zip(copies.source, copies.target, copies.length, strict=True):
                assert source + length <= size
                for at in range(length):
                    assert target + at not in found
                    found[target + at] = (fetch.segment, copies.chunk * size + source + at)
    return found


def wanted(extents: ExtentMap) -> dict[int, tuple[int, int]]:
    """The segment and place of every byte of data."""
    columns = (column.tolist() for column in (extents.start, extents.end, extents.segment, extents.place))
    found: dict[int, tuple[int, int]] = {}
    for start, end, segment, place in zip(*columns, strict=True):
        found |= {at: (segment, place + at - start) for at in range(start, end) if segment != ZEROS}
    return found


@given(writes, st.integers(BLOCK, 400))
def test_every_byte_of_data_is_copied_once_from_where_it_lies(
    rows: list[tuple[int, int, int, int]], window_bytes: int
) -> None:
    extents, known = painted(rows), segments(16, 7, 64)
    planned: dict[int, tuple[int, int]] = {}
    ends: list[int] = []
    for window in windows(extents, known, window_bytes=window_bytes, block_bytes=BLOCK, hole_bytes=HOLE):
        assert window.buffer_bytes == sum(span.length for span in window.spans) <= window_bytes
        disk = {span.place + at: span.offset + at for span in window.spans for at in range(span.length)}
        for span in window.spans:
            assert span.offset // BLOCK == (span.offset + span.length - 1) // BLOCK
            ends += [span.offset, span.offset + span.length]
        for to, place in placed(window.fetches, known).items():
            assert disk[to] not in planned
            planned[disk[to]] = place
    assert planned == wanted(extents)
    assert ends == sorted(ends)


@given(writes, st.integers(BLOCK, 400))
def test_without_a_buffer_every_byte_goes_to_the_disk_once_and_windows_follow_each_other(
    rows: list[tuple[int, int, int, int]], window_bytes: int
) -> None:
    extents, known = painted(rows), segments(16, 7, 64)
    planned: dict[int, tuple[int, int]] = {}
    for fetches in scattered(extents, known, window_bytes=window_bytes, block_bytes=BLOCK):
        window = placed(list(fetches), known)
        assert 0 < len(window) <= window_bytes
        assert not planned or max(planned) < min(window)
        planned |= window
    assert planned == wanted(extents)


def test_a_disk_written_in_order_needs_small_windows_and_one_written_at_random_large_ones() -> None:
    count, size, most = 64 * 256, 16 << 10, 1 << 30  # 256 MiB
    known = segments(*([128 << 10] * 64))
    places = list(range(count))
    in_order = painted([(at * size, size, at // 256, at % 256 * size) for at in places])
    random.Random(1).shuffle(places)
    at_random = painted([(to * size, size, at // 256, at % 256 * size) for at, to in enumerate(places)])
    assert choose_window(in_order, known, most) == MIN_WINDOW_BYTES
    assert choose_window(at_random, known, most) >= 256 << 20
    assert choose_window(at_random, known, 64 << 20) == 64 << 20
    assert choose_window(ExtentMap.empty(), known, most) == most
