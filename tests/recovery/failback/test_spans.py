"""Stretches of a disk, held against sets of bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from recovery.extents import ZEROS, ExtentMap
from recovery.failback.spans import Spans, differing

SIZE = 64
pairs = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 16)).map(lambda p: (p[0], min(p[1], SIZE - p[0]))))


def _bytes(spans: Spans) -> set[int]:
    found = [set(range(start, end)) for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]
    return set().union(*found)


def _listed(given: list[tuple[int, int]]) -> set[int]:
    return {byte for offset, length in given for byte in range(offset, offset + length)}


@given(pairs)
def test_spans_hold_what_they_were_made_of_sorted_and_apart(given: list[tuple[int, int]]) -> None:
    spans = Spans.of(given)
    assert _bytes(spans) == _listed(given)
    assert spans.total_bytes == len(_listed(given))
    assert bool(np.all(spans.start[1:] > spans.end[:-1]))


@given(pairs, pairs)
def test_a_union_is_what_either_holds(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    assert _bytes(Spans.of(one).union(Spans.of(other))) == _listed(one) | _listed(other)


@given(pairs, st.integers(1, 9))
def test_pieces_are_the_same_bytes_and_none_crosses_a_multiple(given: list[tuple[int, int]], most: int) -> None:
    pieces = list(Spans.of(given).pieces(most))
    assert _listed(pieces) == _listed(given)
    assert pieces == sorted(pieces)
    assert all(offset // most == (offset + length - 1) // most for offset, length in pieces)


@given(pairs, st.integers(0, SIZE), st.integers(0, SIZE), st.integers(1, 8))
def test_clipping_and_aligning(given: list[tuple[int, int]], first: int, limit: int, granule: int) -> None:
    spans, held = Spans.of(given), _listed(given)
    assert _bytes(spans.clipped(first, limit)) == {byte for byte in held if first <= byte < limit}
    assert _bytes(spans.aligned(granule)) == {
        byte for each in held for byte in range(each // granule * granule, (each // granule + 1) * granule)
    }


extents = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 16), st.sampled_from([ZEROS, 1, 2, 3])))


def _map(given: list[tuple[int, int, int]]) -> tuple[ExtentMap, list[tuple[int, int]]]:
    """A map, and by byte what it says: segment and place."""
    model = [(ZEROS, 0)] * (SIZE + 16)
    columns: list[list[int]] = [[], [], [], []]
    for number, (offset, length, segment) in enumerate(given):
        place = 0 if segment == ZEROS else 1000 * number
        for column, value in zip(columns, (offset, offset + length, segment, place), strict=True):
            column.append(value)
        for byte in range(length):
            model[offset + byte] = (segment, 0 if segment == ZEROS else place + byte)
    arrays = [np.array(column, dtype=np.int64) for column in columns]
    return (ExtentMap.from_table(*arrays) if given else ExtentMap.empty()), model


@given(extents, extents, st.integers(0, 8))
def test_states_differ_where_their_bytes_lie_elsewhere(
    before: list[tuple[int, int, int]], more: list[tuple[int, int, int]], common: int
) -> None:
    one, model = _map(before)
    other, other_model = _map(before[:common] + more)
    assert _bytes(differing(one, other)) == {
        byte for byte, (ours, theirs) in enumerate(zip(model, other_model, strict=True)) if ours != theirs
    }
