"""Shrinking: from a story that fails to the shortest one that still does, for a person to read.

Delta debugging over the list of faults: halves are left out, then quarters, down to single faults, as long as the rest
still breaks a promise of the same kind. Then the marks, and the disks but one. Each try is a whole simulation, so there
is a limit to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from simulator.simulation import Outcome, simulate
from simulator.story import Story

#: Simulations that shrinking may cost.
MAX_TRIES: Final = 120
_Item = TypeVar("_Item")


def kind_of(violation: str) -> str:
    """A violation without its numbers and names: what stays the same when a story is cut short."""
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]+|\d+|'[^']*'|/\S+", "#", violation)[:60]


def shrink(story: Story, outcome: Outcome, *, most_tries: int = MAX_TRIES) -> tuple[Story, Outcome]:
    """The shortest story found that breaks the same promise, and what it comes to."""
    wanted = kind_of(outcome.violations[0])
    left = most_tries
    best = outcome

    def fails(candidate: Story) -> bool:
        nonlocal left, best
        if left <= 0:
            return False
        left -= 1
        found = simulate(candidate)
        if any(kind_of(violation) == wanted for violation in found.violations):
            best = found
            return True
        return False

    faults = fewest(story.faults, lambda kept: fails(replace(story, faults=tuple(kept))))
    story = replace(story, faults=tuple(faults))
    marks = fewest(story.marks, lambda kept: fails(replace(story, marks=tuple(kept))))
    story = replace(story, marks=tuple(marks))
    return story, best


def fewest(items: Sequence[_Item], fails: Callable[[list[_Item]], bool]) -> list[_Item]:
    """A shortest-found part of `items`, in their order, for which `fails` still holds; it holds for all of them."""
    kept, pieces = list(items), 2
    if not kept:
        return kept
    if fails([]):
        return []
    while len(kept) > 1:
        size = max(len(kept) // pieces, 1)
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if rest and fails(rest):
                kept, pieces = rest, max(pieces - 1, 2)
                break
        else:
            if size == 1:
                break
            pieces = min(pieces * 2, len(kept))
    return kept
