"""What retention left of a stream, and whether it may have given up the rest; pure.

The rules are told here in their own words, beside `recovery.retention`, which is what is judged:

- all of the policy's window is whole: the floor is older than that, by the time of the last change that there is;
- of every stretch of time in front of it the last named point outside gaps is kept, as long as the policy reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from replicar.log.index import Fold
from simulator.world.folder import UpkeepPlan

_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Left:
    """Every sequence from `floor` on (its time beside it), and before it those in `kept`, ascending."""

    floor: int = 0
    floor_ns: int = 0
    kept: tuple[int, ...] = ()

    @classmethod
    def of(cls, fold: Fold) -> Left:
        kept = tuple(sorted(item.checkpoint.first for item in fold.kept))
        return cls(fold.floor_sequence, fold.floor.last if fold.floor is not None else 0, kept)

    def has(self, sequence: int) -> bool:
        """Whether the state after that sequence may be offered."""
        return sequence >= self.floor or sequence in self.kept


def problems(plan: UpkeepPlan | None, left: Left, marks: Mapping[int, int], latest_ns: int) -> Iterator[str]:
    """What was given up and should not have been, in words.

    Args:
        marks: the named points outside gaps, as sequence and time.
        latest_ns: of the stream.
    """
    if plan is None or not left.floor:
        return
    window_ns, stretch_ns = int(plan.window_seconds * _NS), int(plan.stretch_seconds * _NS)
    if left.floor_ns > latest_ns - window_ns:
        yield f"the floor is of {left.floor_ns}, and all from {latest_ns - window_ns} on is to be kept"
    best: dict[int, int] = {}
    for sequence, time_ns in marks.items():
        if sequence < left.floor:
            stretch = time_ns // stretch_ns
            best[stretch] = max(best.get(stretch, 0), sequence)
    for stretch, sequence in sorted(best.items()):
        reaches = latest_ns - (stretch + 1) * stretch_ns < int(plan.until_seconds * _NS)
        if reaches and sequence not in left.kept:
            yield f"the point at {sequence} is the last of its stretch and was given up; kept are {left.kept}"
