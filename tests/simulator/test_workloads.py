"""The named workloads: one set for stories, the demo, the benchmarks and the tests on real processes."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from bench import writes
from replicar.errors import PermanentError
from simulator import workload
from simulator.workload import Action, Extent, Operation, Space, whole_disk
from simulator.workloads import STEADY, Kind, Workload

_MIB = 1 << 20


def _some(kind: Kind, space: Space, *, log: Space | None = None, **options: tuple[int, ...]) -> list[Operation]:
    return list(islice(Workload(kind, **options).on(space, random.Random(7), log=log), 300))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_stays_in_its_space_and_follows_from_its_seed(kind: Kind) -> None:
    space = Space([Extent(4 * _MIB, _MIB), Extent(_MIB, 2 * _MIB)])
    found = _some(kind, space)
    assert found == _some(kind, space)
    for operation in found:
        if operation.action is not Action.FLUSH:
            assert any(
                extent.offset <= operation.offset
                and operation.offset + operation.length <= extent.offset + extent.length
                for extent in space.extents
            )


def test_a_database_appends_where_it_is_told_to() -> None:
    tables, log = Space([Extent(0, 4 * _MIB)]), Space([Extent(8 * _MIB, _MIB)])
    assert _some(Kind.OLTP, tables, log=log) == list(islice(workload.oltp(tables, log, random.Random(7)), 300))


@pytest.mark.parametrize("kind", sorted(STEADY))
def test_steady_writes_have_the_size_that_is_asked_for(kind: Kind) -> None:
    found = _some(kind, whole_disk(4 * _MIB), block_bytes=(8192,))
    assert {(operation.action, operation.length) for operation in found} == {(Action.WRITE, 8192)}


def test_a_kind_with_sizes_of_its_own_takes_no_others() -> None:
    with pytest.raises(ValueError, match="sizes of their own"):
        Workload(Kind.OLTP, block_bytes=(4096,))


def test_churn_tells_fio_of_8_kib_at_random() -> None:
    assert writes.fio_options(writes.named("uniform", 8192)) == ["--rw=randwrite", "--norandommap", "--bs=8192"]


@pytest.mark.parametrize("name", writes.NAMES)
def test_fio_has_words_for_every_workload_of_a_benchmark(name: str) -> None:
    assert "--bs=4096" in writes.fio_options(writes.named(name, 4096))


def test_the_data_path_is_written_one_place_behind_the_other() -> None:
    assert list(writes.places(writes.named("sequential", 4096), 4 * 4096, 4)) == [0, 4096, 8192, 12288]


def test_another_workload_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(PermanentError, match=r"one of sequential, uniform, zipf"):
        writes.named("oltp", 4096)
