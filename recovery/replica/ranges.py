"""Which ranges of a disk are written together, and what lies between extents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from recovery.extents import ExtentMap, Ints

#: Changed ranges that lie so close together are written in one: a request costs as much as so many bytes, nearly.
BRIDGE_BYTES: Final = 16 << 10
#: Ranges of a disk that are gathered one by one; with more of them, larger gaps are bridged.
MAX_RANGES: Final = 1 << 17


def joined(parts: Sequence[tuple[Ints, Ints]]) -> list[tuple[int, int]]:
    """Ranges (start, end) in any order as ascending (offset, length) that lie further apart than is worth two requests,
    and are not too many."""
    start, end = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    bridge = BRIDGE_BYTES
    while True:
        fresh = np.flatnonzero(np.concatenate(([True], start[1:] - reach[:-1] > bridge)))
        if len(fresh) <= MAX_RANGES:
            break
        bridge *= 4
    last = np.concatenate((fresh[1:] - 1, [len(start) - 1]))
    return list(zip(start[fresh].tolist(), (reach[last] - start[fresh]).tolist(), strict=True))


def between(data: ExtentMap, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, end) within a range that no extent covers."""
    at = offset
    for start, end in [*zip(data.start.tolist(), data.end.tolist(), strict=True), (offset + length, offset + length)]:
        if start > at:
            yield at, start
        at = end
