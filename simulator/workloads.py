"""The catalogue of workloads: what kinds of applications there are, by name, with their sizes and rates over time.

`workload` has the single patterns; here they become whole applications, which is what the simulation, the demo, the
benchmarks and the tests on real processes choose from:

    oltp          a database: log appends, hot pages, now and then old pages cleared
    sequential    large blocks one behind the other: a backup, a copy
    boot_storm    a burst of small reads' worth of writes all over the disk, then next to nothing
    file_server   files of many sizes written whole, their metadata beside them, and trimmed when they are deleted
    log_append    a journal: small appends, each durable
    uniform       small blocks anywhere
    zipf          small blocks, most of them the same few
    quiet         a write now and then

A `Workload` is a kind and a few numbers, so a story can be written down; `operations` gives what is done with the
second at which it is due. The rate is not even: it comes in phases, some of them busy, some idle. Where the rate is
somebody else's (`workload.paced`, fio's), or only a part of a disk may be touched, `on` gives the operations alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from simulator import workload
from simulator.workload import SECTOR_BYTES, Action, Operation, Space, whole_disk

#: How long a phase of one rate lasts, in seconds: between these.
PHASE_SECONDS: Final = (1.0, 12.0)
#: By how much a phase is busier than the mean: one of these.
PHASE_FACTORS: Final = (0.0, 0.3, 1.0, 1.0, 2.0, 6.0)
_KIB: Final = 1024


class Kind(StrEnum):
    OLTP = "oltp"
    SEQUENTIAL = "sequential"
    BOOT_STORM = "boot_storm"
    FILE_SERVER = "file_server"
    LOG_APPEND = "log_append"
    UNIFORM = "uniform"
    ZIPF = "zipf"
    QUIET = "quiet"


#: Kinds whose writes are all alike, so that somebody may choose their size.
STEADY: Final = frozenset({Kind.SEQUENTIAL, Kind.UNIFORM, Kind.ZIPF})


@dataclass(frozen=True, slots=True)
class Workload:
    """What one disk's application does.

    Args:
        rate: operations a second in the mean, while it is not idle.
        flush_share: of operations that a flush follows, where the kind has none of its own.
        trim_share: of operations that are trims or zeroings instead, where the kind has none of its own.
        block_bytes: sizes of writes, each as likely, instead of the kind's own; for `STEADY` kinds.

    Raises:
        ValueError: sizes for a kind that has its own.
    """

    kind: Kind
    rate: float = 8.0
    flush_share: float = 0.05
    trim_share: float = 0.03
    block_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = len(self.block_bytes)
        if sizes and (self.kind not in STEADY or (sizes > 1 and self.kind is not Kind.UNIFORM)):
            raise ValueError(f"writes of {self.kind} have sizes of their own")

    def operations(self, size_bytes: int, randomness: random.Random) -> Iterator[tuple[float, Operation]]:
        """What to do with a disk of that size, each with the second, counted from the start, at which it is due."""
        return _in_phases(
            self._seasoned(self.on(whole_disk(size_bytes), randomness), size_bytes, randomness),
            self.rate,
            randomness,
        )

    def on(self, space: Space, randomness: random.Random, *, log: Space | None = None) -> Iterator[Operation]:
        """The kind's operations in a space, one after the other without an end.

        Args:
            log: where a database appends; without it, in the first eighth of the space.
        """
        sizes = self.block_bytes
        match self.kind:
            case Kind.OLTP if log is not None:
                return workload.oltp(space, log, randomness)
            case Kind.OLTP:
                log_bytes = max(space.length // 8 // SECTOR_BYTES, 64) * SECTOR_BYTES
                tables = Space(list(space.places(log_bytes, space.length - log_bytes)))
                return workload.oltp(tables, Space(list(space.places(0, log_bytes))), randomness)
            case Kind.SEQUENTIAL:
                return workload.sequential(space, *(sizes or (64 * _KIB,)))
            case Kind.BOOT_STORM:
                return boot_storm(space, randomness)
            case Kind.FILE_SERVER:
                return file_server(space, randomness)
            case Kind.LOG_APPEND:
                return workload.log_append(space, randomness)
            case Kind.UNIFORM:
                return workload.uniform(space, randomness, sizes or (512, 4096, 4096, 16 * _KIB))
            case Kind.ZIPF:
                return workload.zipf(space, randomness, *(sizes or (4096,)))
            case Kind.QUIET:
                return workload.uniform(space, randomness, (512, 4096))

    def _seasoned(
        self, operations: Iterator[Operation], size_bytes: int, randomness: random.Random
    ) -> Iterator[Operation]:
        """With flushes, FUA and trims, which every kind has some of."""
        for operation in operations:
            chance = randomness.random()
            if chance < self.trim_share:
                length = randomness.choice((4096, 16 * _KIB, 64 * _KIB))
                start = randomness.randrange(max(size_bytes // length, 1)) * length
                action = randomness.choice((Action.TRIM, Action.ZERO))
                yield Operation(action, start, min(length, size_bytes - start))
            if operation.action is Action.WRITE and not operation.fua and chance > 0.97:
                operation = Operation(operation.action, operation.offset, operation.length, fua=True)
            yield operation
            if randomness.random() < self.flush_share:
                yield Operation(Action.FLUSH)


def boot_storm(space: Space, randomness: random.Random) -> Iterator[Operation]:
    """What systems do when all of them start: many small writes in places of their own, in bursts of a few hundred."""
    while True:
        places = [randomness.randrange(max(space.length >> 12, 1)) << 12 for _ in range(24)]
        for _ in range(randomness.randint(50, 300)):
            place = randomness.choice(places) + randomness.randrange(4) * 4096
            yield from workload.at(space, Action.WRITE, place, randomness.choice((512, 4096, 4096, 8192)))


def file_server(space: Space, randomness: random.Random) -> Iterator[Operation]:
    """Files written whole (sizes by a heavy tail), a block of metadata for each, a flush now and then, and deletions,
    which trim."""
    held: list[tuple[int, int]] = []
    metadata = min(space.length // 16 // 4096 * 4096, 1 << 20) or 4096
    head = metadata
    while True:
        size = min(int(randomness.paretovariate(1.1) * 4096) // 4096 * 4096, 256 * _KIB, space.length - metadata)
        if head + size > space.length:
            head = metadata
        for offset in range(0, size, 64 * _KIB):
            yield from workload.at(space, Action.WRITE, head + offset, min(64 * _KIB, size - offset))
        yield from workload.at(space, Action.WRITE, randomness.randrange(metadata // 4096) * 4096, 4096)
        held.append((head, size))
        head += size
        if randomness.random() < 0.3:
            yield Operation(Action.FLUSH)
        if len(held) > 8 and randomness.random() < 0.5:
            start, length = held.pop(randomness.randrange(len(held)))
            yield from workload.at(space, Action.TRIM, start, length)


def _in_phases(
    operations: Iterator[Operation], rate: float, randomness: random.Random
) -> Iterator[tuple[float, Operation]]:
    """Each operation with its time; the rate changes from phase to phase."""
    due = 0.0
    while True:
        factor = randomness.choice(PHASE_FACTORS)
        ends = due + randomness.uniform(*PHASE_SECONDS)
        if not factor:
            due = ends
            continue
        while due < ends:
            yield due, next(operations)
            due += randomness.expovariate(rate * factor)
