"""Workloads are pure: seeded, endless, inside their space, and shaped as they say."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, strategies as st

from simulator.workload import (
    Action,
    Extent,
    Operation,
    Space,
    log_append,
    oltp,
    paced,
    sequential,
    uniform,
    whole_disk,
    zipf,
)

SCATTERED = Space([Extent(1 << 20, 3 << 20), Extent(16 << 20, 512), Extent(8 << 20, 2 << 20)])
LOG = Space([Extent(32 << 20, 1 << 20)])

Make = Callable[[random.Random], Iterator[Operation]]
WORKLOADS: dict[str, Make] = {
    "uniform": lambda r: uniform(SCATTERED, r, (4096, 65536)),
    "zipf": lambda r: zipf(SCATTERED, r),
    "sequential": lambda r: sequential(SCATTERED),
    "log": lambda r: log_append(LOG, r),
    "oltp": lambda r: oltp(SCATTERED, LOG, r),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_operations_inside_the_space(name: str) -> None:
    make = WORKLOADS[name]
    first = list(itertools.islice(make(random.Random(5)), 5000))
    assert first == list(itertools.islice(make(random.Random(5)), 5000))
    extents = [*SCATTERED.extents, *LOG.extents]
    for operation in first:
        if operation.action is Action.FLUSH:
            continue
        assert operation.length > 0
        assert operation.offset % 512 == operation.length % 512 == 0
        assert any(
            e.offset <= operation.offset and operation.offset + operation.length <= e.offset + e.length for e in extents
        )


@pytest.mark.parametrize("name", ["uniform", "zipf", "oltp"])
def test_another_seed_gives_others(name: str) -> None:
    make = WORKLOADS[name]
    assert list(itertools.islice(make(random.Random(5)), 100)) != list(itertools.islice(make(random.Random(6)), 100))


def test_a_few_blocks_take_most_of_zipf_and_none_is_left_out() -> None:
    operations = itertools.islice(zipf(whole_disk(64 * 8192), random.Random(1)), 20_000)
    hits = Counter(operation.offset for operation in operations)
    counts = sorted(hits.values(), reverse=True)
    assert len(counts) == 64
    assert sum(counts[:6]) > 0.45 * sum(counts)


def test_zipf_on_many_blocks_reaches_beyond_its_table_of_ranks() -> None:
    space = whole_disk(100_000 * 8192)
    offsets = {operation.offset for operation in itertools.islice(zipf(space, random.Random(2)), 20_000)}
    assert max(offsets) > 0.9 * space.length
    assert all(offset + 8192 <= space.length for offset in offsets)


def test_a_log_is_appended_without_holes_and_every_append_is_made_durable() -> None:
    operations = list(itertools.islice(log_append(LOG, random.Random(3)), 2000))
    head = LOG.extents[0].offset
    for operation, following in itertools.pairwise(operations):
        if operation.action is Action.WRITE:
            assert operation.offset in (head, LOG.extents[0].offset)
            head = operation.offset + operation.length
            wrapped = following.action is Action.WRITE and following.offset == LOG.extents[0].offset
            assert operation.fua or following.action is Action.FLUSH or wrapped


def test_oltp_does_everything_that_a_disk_can_be_asked_for() -> None:
    actions = Counter(operation.action for operation in itertools.islice(WORKLOADS["oltp"](random.Random(4)), 20_000))
    assert set(actions) == set(Action)
    assert actions[Action.WRITE] > 10 * actions[Action.TRIM]


def test_the_slower_of_two_rates_says_when_an_operation_is_due() -> None:
    writes = [Operation(Action.WRITE, 0, 1000), Operation(Action.WRITE, 0, 10), Operation(Action.FLUSH)]
    assert [due for due, _ in paced(writes, bytes_per_second=1000, operations_per_second=10)] == pytest.approx(
        [0.0, 1.0, 1.1]
    )
    assert [due for due, _ in paced(writes)] == [0.0, 0.0, 0.0]


@given(st.integers(0, 2**40), st.integers(1, 20 << 20))
def test_places_cover_just_as_much_as_was_asked_for(start: int, length: int) -> None:
    assert sum(place.length for place in SCATTERED.places(start, length)) == length


@pytest.mark.parametrize("extents", [[], [Extent(0, 100)], [Extent(1, 512)], [Extent(0, 0)]])
def test_a_space_of_anything_but_whole_sectors_is_refused(extents: list[Extent]) -> None:
    with pytest.raises(ValueError, match="whole sectors"):
        Space(extents)
