"""The recovery point objective as it was, instant by instant: the age of the oldest change that storage does not hold.

From the sink's record alone: segment headers say when the first change of each was captured (the machine's clock), the
record says when each was answered for, and segments count only when all before them are stored too. So at an instant

    stored       every segment up to the first number that was not answered for by then
    age          from the capture of the next one's first change until that instant; 0 if that was captured later

The clocks of machine and sink are one here. Pure: records in, figures out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from bench.sink import StoredSegment
from replicar.errors import PermanentError

SAMPLE_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Rpo:
    """The distribution over one window of time, in seconds."""

    samples: int
    p50: float
    p99: float
    longest: float


def ages(
    segments: Iterable[StoredSegment], start_ns: int, end_ns: int, step_ns: int = int(SAMPLE_SECONDS * 1e9)
) -> list[float]:
    """The age at every step from start to end, in seconds, of one machine.

    Raises:
        PermanentError: a segment is missing, so nothing can be said.
    """
    chain = sorted({each.number: each for each in segments}.values(), key=lambda each: each.number)
    if any(later.number != earlier.number + 1 for earlier, later in pairwise(chain)):
        raise PermanentError("the record of the sink has a hole", hint="a segment was never answered for")
    found: list[float] = []
    following, stored_ns = 0, 0  # the first segment that is not stored yet
    for now in range(start_ns, end_ns, step_ns):
        while following < len(chain) and max(stored_ns, chain[following].answered_ns) <= now:
            stored_ns = max(stored_ns, chain[following].answered_ns)
            following += 1
        waiting_ns = chain[following].first_ns if following < len(chain) else now
        found.append(max(0, now - waiting_ns) / 1e9)
    return found


def summary(ages: Sequence[float]) -> Rpo:
    """What the samples come to."""
    if not ages:
        raise PermanentError("no time passed, so there is no RPO to tell", hint="measure for longer")
    ranked = sorted(ages)
    return Rpo(len(ranked), percentile(ranked, 0.5), percentile(ranked, 0.99), ranked[-1])


def percentile(ranked: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all, which are sorted, do not exceed."""
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]
