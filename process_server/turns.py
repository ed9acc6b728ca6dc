"""Whose turn it is: those who share something get it in proportion to their weights, by start-time fair queueing.

Whoever waits has a start tag: the virtual time at which it joined, or the end of what it was given last if that is
later. The least tag is next, virtual time moves there, and what is given moves the receiver's own end by cost / weight.
So a machine that always wants more gets its share and no more, one that wants little waits for at most one turn of each
other, and nobody saves up turns by being idle. (Goyal, Vin, Cheng: SIGCOMM 1996. Deficit round robin gives the same
shares, but forgets a deficit whenever a queue is empty, and here it is empty between any two turns: a machine asks for
its next turn when it has used the last.)

Pure: no clock, no waiting; who joins is told by the caller when it is its turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

#: Ends in the past that are remembered before they are cleared away; they mean nothing any more.
_OLD_ENDS: Final = 1024


class Turns(Generic[Key]):
    """Those who wait, each once."""

    def __init__(self) -> None:
        self._time = 0.0
        self._ends: dict[Key, float] = {}
        self._queue: list[tuple[float, int, Key]] = []
        self._weights: dict[Key, tuple[int, int]] = {}  # number of the entry, weight
        self._number = 0

    def __len__(self) -> int:
        return len(self._weights)

    def join(self, key: Key, weight: int = 1) -> None:
        """Wait for a turn; whoever waits already keeps its place."""
        if key in self._weights:
            return
        self._number += 1
        self._weights[key] = (self._number, weight)
        heapq.heappush(self._queue, (max(self._time, self._ends.get(key, 0.0)), self._number, key))

    def leave(self, key: Key) -> None:
        """Wait no more."""
        self._weights.pop(key, None)

    def next(self, cost: Callable[[Key], float], *, may: Callable[[Key], bool] = lambda _: True) -> Key | None:
        """Give the next turn to one who may have it; None when nobody may. Those who may not keep their places.

        Args:
            cost: of the turn, in whatever unit is shared; asked of the one who gets it.
        """
        passed: list[tuple[float, int, Key]] = []
        found: Key | None = None
        while self._queue:
            entry = heapq.heappop(self._queue)
            start, number, key = entry
            known = self._weights.get(key)
            if known is None or known[0] != number:
                continue  # it left
            if not may(key):
                passed.append(entry)
                continue
            found = key
            del self._weights[key]
            self._time = max(self._time, start)
            self._ends[key] = start + cost(key) / known[1]
            break
        for entry in passed:
            heapq.heappush(self._queue, entry)
        if len(self._ends) > _OLD_ENDS + len(self._weights):
            self._ends = {key: end for key, end in self._ends.items() if end > self._time}
        return found
