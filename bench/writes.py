"""Which writes a benchmark makes: a named workload of the simulator's, as fio is told of it or as places on a disk.

fio makes 54 MB/s of small writes at a fraction of what Python would take of the cores that are measured, so it is told
which: the workload's name becomes fio's own words for the same distribution.

Weak: fio draws by itself, so its places are those of the distribution, not those that the simulator draws from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Final

from bench.data import SEED
from replicar.errors import PermanentError
from simulator.workload import whole_disk
from simulator.workloads import STEADY, Kind, Workload

#: The names that a benchmark can be asked for.
NAMES: Final = tuple(sorted(STEADY))
#: fio's words for them. zipf: ranks by the exponent that the simulator has (1), and fio takes everything but 1 itself.
_FIO: Final = {
    Kind.SEQUENTIAL: ("--rw=write",),
    Kind.UNIFORM: ("--rw=randwrite", "--norandommap"),
    Kind.ZIPF: ("--rw=randwrite", "--norandommap", "--random_distribution=zipf:1.01"),
}


def named(name: str, block_bytes: int) -> Workload:
    """Writes of one size, spread as the name says.

    Raises:
        PermanentError: no workload of that name has writes of one size.
    """
    if name not in NAMES:
        raise PermanentError(f"{name!r} is no workload for a benchmark", hint=f"one of {', '.join(NAMES)}")
    return Workload(Kind(name), block_bytes=(block_bytes,))


def fio_options(workload: Workload) -> list[str]:
    """How fio is told to make a workload's writes."""
    (size,) = workload.block_bytes
    return [*_FIO[workload.kind], f"--bs={size}"]


def places(workload: Workload, disk_bytes: int, count: int) -> Iterator[int]:
    """Where a workload's first `count` writes go, on a disk of that size."""
    operations = workload.on(whole_disk(disk_bytes), random.Random(SEED))
    return (operation.offset for operation in islice(operations, count))
