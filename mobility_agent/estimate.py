"""When something that fills or empties will be full or empty, from how it went lately.

A window of samples, taken at intervals; the rate is that of the window as a whole, so a burst counts for what it is in
twenty seconds, and a standstill gives no estimate instead of a foolish one.
"""

from __future__ import annotations

from collections import deque
from typing import Final

#: How far back the rate looks; shorter at the beginning.
WINDOW_SECONDS: Final = 20.0
#: Samples held; more than the window has at one a second.
MAX_SAMPLES: Final = 64
#: Below this there is no rate to speak of.
LEAST_SECONDS: Final = 2.0
#: An estimate beyond this says nothing anybody could act on: a year.
MOST_SECONDS: Final = 365 * 86400.0


class Estimate:
    """Of one quantity."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def sample(self, now: float, value: float) -> None:
        """Take the quantity as it is at `now` (seconds of a monotonic clock)."""
        self._samples.append((now, value))
        while self._samples[0][0] < now - WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Change a second over the window; None while that can't be said."""
        if len(self._samples) < 2:
            return None
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended - began >= LEAST_SECONDS else None

    def seconds_until(self, goal: float) -> float | None:
        """How long until it is `goal`, if it goes on so: 0 when it is there, None when it does not go there."""
        if not self._samples:
            return None
        left, rate = goal - self._samples[-1][1], self.rate
        if left == 0:
            return 0.0
        if rate is None or rate * left <= 0 or left / rate > MOST_SECONDS:
            return None
        return left / rate
