"""Workloads: what an application does to its disk, as endless, pure, seeded generators of operations.

A workload knows no disk, no clock and no connection. It is given a `Space` (the places that it may touch, which may be
files scattered over a disk) and a `random.Random`, and yields `Operation`s. The same seed gives the same operations for
ever, so a failure is replayed by its seed. `paced` adds the times at which they are due.

    uniform      every place as likely as any other; the worst case for anything that caches or coalesces
    zipf         a few hot blocks take most writes, as in most databases (exponent ~1)
    sequential   one block after the other, round and round: a backup, a copy, a stream
    log_append   small appends made durable each, round a ring: a journal
    oltp         pages by zipf, a log append beside each transaction, and now and then a burst that clears old pages

Operations come out split where the space is not contiguous, so each lies in one extent.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SECTOR_BYTES: Final = 512
#: Zipf ranks are drawn from a table; beyond this many blocks the tail is drawn evenly from each rank's share.
_ZIPF_RANKS: Final = 4096


class Action(StrEnum):
    """What is done to a place. FLUSH has none."""

    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing the application asks of its disk; offsets and lengths in bytes, multiples of 512."""

    action: Action
    offset: int = 0
    length: int = 0
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous part of a disk, in bytes."""

    offset: int
    length: int


class Space:
    """The places that a workload may touch, seen as one run of bytes from 0 to `length`.

    Args:
        extents: in the order in which the run passes through them; whole sectors.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        if not extents or any((e.offset | e.length) % SECTOR_BYTES or e.length <= 0 for e in extents):
            raise ValueError("a space needs extents of whole sectors")
        self.extents = tuple(extents)
        self._starts = list(itertools.accumulate((extent.length for extent in extents), initial=0))
        self.length = self._starts.pop()

    def places(self, start: int, length: int) -> Iterator[Extent]:
        """Where `length` bytes from `start` of the run lie on the disk; what is beyond the end begins anew at 0."""
        start %= self.length
        while length > 0:
            index = bisect.bisect_right(self._starts, start) - 1
            inside = start - self._starts[index]
            taken = min(length, self.extents[index].length - inside)
            yield Extent(self.extents[index].offset + inside, taken)
            length -= taken
            start = (start + taken) % self.length


def whole_disk(size_bytes: int) -> Space:
    """The space of a disk without anything worth keeping."""
    return Space([Extent(0, size_bytes)])


def uniform(space: Space, randomness: random.Random, block_bytes: Sequence[int] = (4096,)) -> Iterator[Operation]:
    """Writes of randomly chosen sizes at places aligned to their size."""
    while True:
        size = randomness.choice(block_bytes)
        yield from at(space, Action.WRITE, randomness.randrange(max(space.length // size, 1)) * size, size)


def zipf(
    space: Space, randomness: random.Random, block_bytes: int = 8192, exponent: float = 1.0
) -> Iterator[Operation]:
    """Writes of one size, the block of rank r with probability proportional to r**-exponent; ranks are scattered."""
    for block in _zipf_blocks(max(space.length // block_bytes, 1), randomness, exponent):
        yield from at(space, Action.WRITE, block * block_bytes, block_bytes)


def sequential(space: Space, block_bytes: int = 256 << 10) -> Iterator[Operation]:
    """Writes of one size, one behind the other, beginning anew at the end."""
    for start in itertools.count(0, block_bytes):
        yield from at(space, Action.WRITE, start, block_bytes)


def log_append(
    space: Space, randomness: random.Random, record_bytes: tuple[int, int] = (512, 16384)
) -> Iterator[Operation]:
    """Appends of random size (whole sectors, between the two given), each durable: FUA, or a flush behind it."""
    head = 0
    while True:
        size = randomness.randrange(record_bytes[0], record_bytes[1] + SECTOR_BYTES, SECTOR_BYTES)
        durable = randomness.random() < 0.5
        yield from at(space, Action.WRITE, head, size, fua=durable)
        if not durable:
            yield Operation(Action.FLUSH)
        head = (head + size) % space.length


def oltp(tables: Space, log: Space, randomness: random.Random) -> Iterator[Operation]:
    """A database: each transaction appends to its log, then changes some hot pages; at times old pages are cleared."""
    appends = log_append(log, randomness)
    pages = zipf(tables, randomness, block_bytes=8192)
    while True:
        for append in appends:
            yield append
            if append.action is Action.FLUSH or append.fua:
                break
        yield from itertools.islice(pages, randomness.randint(1, 6))
        chance = randomness.random()
        if chance < 0.01:
            size = randomness.choice((64 << 10, 256 << 10))
            start = randomness.randrange(max(tables.length // size, 1)) * size
            yield from at(tables, randomness.choice((Action.TRIM, Action.ZERO)), start, size)
        elif chance < 0.03:
            start = randomness.randrange(max(tables.length >> 20, 1)) << 20
            for offset in range(0, 1 << 20, 128 << 10):
                yield from at(tables, Action.WRITE, start + offset, 128 << 10)


def paced(
    operations: Iterable[Operation], *, bytes_per_second: float = 0.0, operations_per_second: float = 0.0
) -> Iterator[tuple[float, Operation]]:
    """Each operation with the second, counted from the start, at which it is due by whichever rate is slower.

    A rate of 0 sets none.
    """
    due = 0.0
    for operation in operations:
        yield due, operation
        by_bytes = operation.length / bytes_per_second if bytes_per_second else 0.0
        by_count = 1 / operations_per_second if operations_per_second else 0.0
        due += max(by_bytes, by_count)


def at(space: Space, action: Action, start: int, length: int, *, fua: bool = False) -> Iterator[Operation]:
    """One thing done to `length` bytes from `start` of the run: one operation for each extent that it meets."""
    for place in space.places(start, length):
        yield Operation(action, place.offset, place.length, fua)


def _zipf_blocks(blocks: int, randomness: random.Random, exponent: float) -> Iterator[int]:
    ranks = min(blocks, _ZIPF_RANKS)
    weights = list(itertools.accumulate(rank**-exponent for rank in range(1, ranks + 1)))
    # Each rank stands for every `ranks`-th block from a place of its own, so the hot ones are not neighbours.
    order = randomness.sample(range(ranks), ranks)
    while True:
        rank = order[bisect.bisect_left(weights, randomness.random() * weights[-1])]
        span = (blocks - rank + ranks - 1) // ranks
        yield rank + ranks * randomness.randrange(span)
