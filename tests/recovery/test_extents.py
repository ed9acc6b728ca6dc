"""Extent maps against the simplest model there is: an array with one entry per unit of the disk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, strategies as st

from recovery.extents import ZEROS, ExtentMap, TieredMap, merge

DISK = 64
Write = tuple[int, int, int, int]  # start, length, segment, place

writes = st.lists(
    st.tuples(
        st.integers(0, DISK - 1), st.integers(1, DISK), st.sampled_from([ZEROS, 1, 2, 3]), st.integers(0, 40)
    ).map(lambda w: (w[0], min(w[1], DISK - w[0]), w[2], w[3])),
    max_size=40,
)


def columns(rows: list[Write]) -> tuple[npt.NDArray[np.int64], ...]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return table[:, 0], table[:, 0] + table[:, 1], table[:, 2], table[:, 3]


def painted(rows: list[Write]) -> ExtentMap:
    start, end, segment, place = columns(rows)
    return ExtentMap.from_table(start, end, segment, place)


def model(rows: list[Write]) -> list[tuple[int, int] | None]:
    """Per byte: None where never written, else (segment, place of this very byte)."""
    cells: list[tuple[int, int] | None] = [None] * DISK
    for start, length, segment, place in rows:
        for at in range(start, start + length):
            cells[at] = (ZEROS, 0) if segment == ZEROS else (segment, place + at - start)
    return cells


def cells_of(extents: ExtentMap) -> list[tuple[int, int] | None]:
    cells: list[tuple[int, int] | None] = [None] * DISK
    rows = zip(
        *(column.tolist() for column in (extents.start, extents.end, extents.segment, extents.place)), strict=True
    )
    for start, end, segment, place in rows:
        for at in range(start, end):
            assert cells[at] is None, "extents overlap"
            cells[at] = (ZEROS, 0) if segment == ZEROS else (segment, place + at - start)
    return cells


def assert_canonical(extents: ExtentMap) -> None:
    assert bool(np.all(extents.start < extents.end))
    assert bool(np.all(extents.start[1:] >= extents.end[:-1]))
    assert all(column.dtype == np.int64 for column in (extents.start, extents.end, extents.segment, extents.place))
    touching = extents.start[1:] == extents.end[:-1]
    same = touching & (extents.segment[1:] == extents.segment[:-1])
    follows = extents.place[1:] == extents.place[:-1] + (extents.end - extents.start)[:-1]
    assert not bool(np.any(same & (follows | (extents.segment[1:] == ZEROS))))


@given(writes)
def test_overlapping_writes_leave_what_the_last_of_them_wrote(rows: list[Write]) -> None:
    extents = painted(rows)
    assert_canonical(extents)
    assert cells_of(extents) == model(rows)


@given(writes, writes)
def test_a_newer_map_covers_an_older_one(older: list[Write], newer: list[Write]) -> None:
    merged = merge(painted(older), painted(newer))
    assert_canonical(merged)
    assert cells_of(merged) == model(older + newer)


@given(writes, st.integers(0, DISK), st.integers(0, DISK))
def test_a_lookup_is_the_map_seen_through_a_window(rows: list[Write], offset: int, length: int) -> None:
    found = cells_of(painted(rows).lookup(offset, length))
    expected = [cell if offset <= at < offset + length else None for at, cell in enumerate(model(rows))]
    assert found == expected


@given(st.lists(writes, max_size=12), st.integers(0, DISK), st.integers(1, DISK))
def test_tiers_hold_the_same_as_one_map(batches: list[list[Write]], offset: int, length: int) -> None:
    tiers, rows = TieredMap(), list[Write]()
    for batch in batches:
        tiers.paint(*columns(batch))
        tiers.freeze()  # settles what is pending, so that there are several tiers
        rows += batch
    window = cells_of(tiers.lookup(offset, length))
    assert window == [cell if offset <= at < offset + length else None for at, cell in enumerate(model(rows))]
    assert cells_of(tiers.flatten()) == model(rows)
    assert cells_of(tiers.flatten()) == model(rows)


@given(writes, writes)
def test_a_frozen_state_is_not_changed_by_later_writes(before: list[Write], after: list[Write]) -> None:
    tiers = TieredMap()
    tiers.paint(*columns(before))
    frozen = tiers.freeze()
    tiers.paint(*columns(after))
    tiers.flatten()
    assert cells_of(TieredMap(frozen).flatten()) == model(before)


def test_tiers_stay_few_however_many_writes_there_are() -> None:
    random = np.random.default_rng(7)
    tiers = TieredMap()
    for number in range(1, 200):
        start = random.integers(0, 1 << 20, 500) * 4096
        tiers.paint(start, start + 4096, np.full(500, number), np.arange(500) * 4096)
        tiers.freeze()
    assert len(tiers.freeze()) < 20


def test_the_bytes_that_come_from_the_log_are_counted_without_zeros() -> None:
    extents = painted([(0, 10, 1, 0), (4, 2, ZEROS, 0), (20, 5, 2, 0)])
    assert extents.data_bytes == 13
    assert extents.data().data_bytes == 13
    assert len(ExtentMap.zeros(5, 5)) == 0
