"""What a point is proven by: which bytes of its disks an audit of the source still vouches for, and how old that is.

An AUDIT in the log says what a stretch of the source disk held at its sequence; `verify` compares it with what recovery
gives there. It goes on holding for the bytes that were not written since. So of every byte the index knows two things,
where it came from and when it was audited last, and the audit holds if it came later in the log than the byte.

Audits are extents whose *segment* is their time; their *place* less their offset is their position in the log, the
number of their segment and the place of the digest in it. A byte's own position is that of the extent it is in. Zeros
that were written (a trim) have none, and count as not proven; zeros that never were anything else count from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from recovery.extents import ZEROS, ExtentMap, Ints
from recovery.layers import DiskMap

#: A position is a segment's number and a place within it, which is below 4 MiB.
PLACE_BITS: Final = 22


@dataclass(frozen=True, slots=True)
class Audited:
    """How much of a disk had been audited at a point, and the time of the oldest of these audits (None: none); and how
    much of it an audit still holds for, with the time of the oldest that does.

    Each byte counts by its last audit before the point.
    """

    audited_bytes: int = 0
    oldest_ns: int | None = None
    proven_bytes: int = 0
    oldest_proof_ns: int | None = None

    def __add__(self, other: Audited) -> Audited:
        return Audited(
            self.audited_bytes + other.audited_bytes,
            _earlier(self.oldest_ns, other.oldest_ns),
            self.proven_bytes + other.proven_bytes,
            _earlier(self.oldest_proof_ns, other.oldest_proof_ns),
        )


def positions(number: int, offset: Ints, place: Ints) -> Ints:
    """The `place` column of audits: `offset` on the disk, and where in segment `number` the digest is."""
    return offset + ((np.int64(number) << PLACE_BITS) | place)


async def audited(extents: DiskMap, audits: DiskMap) -> Audited:
    """What is proven of a disk, given where its bytes are and its audits.

    Raises:
        CorruptionError: a page of the index is damaged.
    """
    total = Audited()
    for offset, length in audits.ranges():
        said = await audits.lookup(offset, length)
        if len(said):
            first, last = int(said.start[0]), int(said.end[-1])
            total += prove(await extents.lookup(first, last - first), said)
    return total


def prove(data: ExtentMap, audits: ExtentMap) -> Audited:
    """What is proven of a stretch of a disk. Pure."""
    if not len(audits):
        return Audited()
    edges = np.unique(np.concatenate((audits.start, audits.end, data.start, data.end)))
    left, length = edges[:-1], np.diff(edges)
    audit, byte = _covering(audits, left), _covering(data, left)
    seen = audit >= 0
    held = seen & (byte < 0)
    both = np.flatnonzero(seen & (byte >= 0))
    of_audit = audits.place[audit[both]] - audits.start[audit[both]]
    of_byte = (data.segment[byte[both]] << PLACE_BITS) | data.place[byte[both]]
    held[both] = (data.segment[byte[both]] != ZEROS) & (of_byte < of_audit)
    times = audits.segment
    return Audited(
        int(length[seen].sum()),
        int(times.min()),
        int(length[held].sum()),
        int(times[audit[held]].min()) if bool(held.any()) else None,
    )


def _covering(extents: ExtentMap, left: Ints) -> Ints:
    if not len(extents):
        return np.full(len(left), -1, dtype=np.int64)
    index = np.searchsorted(extents.start, left, side="right") - 1
    covers = (index >= 0) & (extents.end[index] > left)
    return np.where(covers, index, -1)


def _earlier(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
