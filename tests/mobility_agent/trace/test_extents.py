"""Dirty extents against a model of sets, and the rule for what may leave them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings, strategies as st

from mobility_agent.capture.trace.extents import GRANULE_BYTES, MAX_HOLE, DirtyExtents, Taken
from mobility_agent.regions import DirtyRegions

REGION = 64 << 10
DISK = 37 * REGION + 3 * GRANULE_BYTES + 512  # the last region and the last granule are short


@contextmanager
def extents(region_bytes: int = REGION, disk_bytes: int = DISK) -> Iterator[DirtyExtents]:
    with tempfile.TemporaryDirectory() as directory:
        regions = DirtyRegions(Path(directory) / "regions", disk_bytes, region_bytes)
        regions.clear(0, disk_bytes)
        yield DirtyExtents(regions)
        regions.close()


def ranges(*pairs: tuple[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64)


def granules(taken: Taken) -> set[int]:
    return {
        at for offset, length in taken for at in range(offset // GRANULE_BYTES, -(-(offset + length) // GRANULE_BYTES))
    }


RANGE = st.tuples(st.integers(0, DISK // 512 - 1), st.integers(1, 6 * REGION // 512)).map(
    lambda pair: (pair[0] * 512, min(pair[1] * 512, DISK - pair[0] * 512))
)


@given(marks=st.lists(st.lists(RANGE, min_size=1, max_size=6), max_size=4), limit=st.integers(1, DISK))
@settings(deadline=None, max_examples=80)
def test_everything_marked_is_taken_and_little_else(marks: list[list[tuple[int, int]]], limit: int) -> None:
    with extents() as dirty:
        expected: set[int] = set()
        for batch in marks:
            dirty.mark(*ranges(*batch))
            for offset, length in batch:
                expected |= set(range(offset // GRANULE_BYTES, (offset + length - 1) // GRANULE_BYTES + 1))
        assert dirty.dirty_bytes == len(expected) * GRANULE_BYTES
        taken: set[int] = set()
        while (part := dirty.take(limit)).offsets.size:
            assert part.byte_count <= limit + REGION
            assert all(length <= REGION and offset + length <= DISK for offset, length in part)
            taken |= granules(part)
        assert expected <= taken
        near = {at + by for at in expected for by in range(-MAX_HOLE, MAX_HOLE + 1)}
        assert taken <= near
        assert dirty.dirty_bytes == 0


@given(batch=st.lists(RANGE, min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_what_is_finished_as_often_as_begun_is_not_under_way(batch: list[tuple[int, int]]) -> None:
    with extents() as dirty:
        dirty.begin(*ranges(*batch))
        assert dirty.under_way
        for one in reversed(batch):  # partial completions: each in two parts
            offset, length = one
            middle = max(length // 1024 * 512, 0)
            parts = [(offset, middle), (offset + middle, length - middle)]
            dirty.finish(*ranges(*[part for part in parts if part[1]]))
        assert not dirty.under_way


def test_what_is_under_way_stays_until_it_is_complete_or_all_is_at_rest() -> None:
    with extents() as dirty:
        one, two = ranges((0, 4096)), ranges((5 * REGION, 4096))
        for pair in (one, two):
            dirty.mark(*pair)
            dirty.begin(*pair)
        assert not dirty.take(DISK).offsets.size
        dirty.finish(*two)
        assert [*dirty.take(DISK)] == [(5 * REGION, 4096)]
        assert [*dirty.take(DISK, at_rest=True)] == [(0, 4096)]
        dirty.mark(*one)
        dirty.at_rest()
        assert [*dirty.take(DISK)] == [(0, 4096)]


def test_what_is_written_while_it_is_copied_is_dirty_again() -> None:
    with extents() as dirty:
        dirty.mark_all()
        taken = dirty.take(DISK)
        dirty.mark(*ranges((REGION + 5, 10)))
        dirty.copied(taken)
        assert [*dirty.take(DISK)] == [(REGION, 4096)]


def test_a_doubt_during_a_copy_is_not_cleared_by_it() -> None:
    with extents() as dirty:
        dirty.mark_all()
        taken = dirty.take(DISK)
        dirty.mark_all()
        dirty.copied(taken)
        assert dirty.dirty_bytes == DISK


def test_a_trim_of_a_whole_large_disk_is_marked_at_once() -> None:
    with extents(1 << 20, 1 << 40) as dirty:
        dirty.mark(*ranges((4096, (1 << 40) - 8192)))
        dirty.begin(*ranges((4096, (1 << 40) - 8192)))
        dirty.finish(*ranges((4096, (1 << 40) - 8192)))
        assert not dirty.under_way
        assert dirty.dirty_bytes == (1 << 40) - 8192
        assert [*dirty.take(1)] == [(4096, (1 << 20) - 4096)]
