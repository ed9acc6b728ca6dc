"""What the agent measures about itself: how far storage is behind the disk, and how many bytes went by.

The RPO is taken, not derived: ten times a second, the age of the oldest change that is not stored, which is what would
be lost if the machine burnt down at that moment (0 when all is stored). Percentiles are over a window of ten minutes.
The lag is the other view of it: for every frame, how long from the capture of its first change until it was stored.

Everything is bounded: a ring of samples, a ring of lags, and at most `MAX_FRAMES_UNDER_WAY` frames remembered; frames
beyond that are sent all the same, only their lag is not measured.

Weak: times are differences of wall clocks (capture times are), so a clock that is set moves them; never below 0.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent.estimate import Estimate

SAMPLE_SECONDS: Final = 0.1
WINDOW_SAMPLES: Final = 6000  # ten minutes of RPO samples
WINDOW_LAGS: Final = 16384
MAX_FRAMES_UNDER_WAY: Final = 65536


class Window:
    """The last `size` values, and their percentiles by nearest rank."""

    def __init__(self, size: int) -> None:
        self._values: npt.NDArray[np.float64] = np.zeros(size)
        self._next = 0
        self.count = 0

    def add(self, value: float) -> None:
        self._values[self._next] = value
        self._next = (self._next + 1) % len(self._values)
        self.count = min(self.count + 1, len(self._values))

    def percentiles(self, *shares: float) -> tuple[float, ...]:
        """The values that at least this share (0 to 1) of those held does not exceed; zeros when none are held."""
        if not self.count:
            return tuple(0.0 for _ in shares)
        ordered = np.sort(self._values[: self.count])
        return tuple(float(ordered[max(int(np.ceil(share * self.count)) - 1, 0)]) for share in shares)


class Metrics:
    """Counters and windows of one run of the agent. Times are nanoseconds of the wall clock, results seconds."""

    def __init__(self) -> None:
        self.rpo_seconds = 0.0
        self.bytes_sent = 0
        self.connections = 0
        self.resends = 0
        #: Bytes of the journal, and bytes still to be copied: when the one is full and the other done.
        self.journal, self.copying = Estimate(), Estimate()
        self._rpo = Window(WINDOW_SAMPLES)
        self._lags = Window(WINDOW_LAGS)
        self._under_way: deque[tuple[int, int]] = deque()  # last sequence and first capture time of frames sent

    def sample_rpo(self, oldest_unstored_time_ns: int | None, now_ns: int, *, protected: bool = True) -> None:
        """Take the RPO as it is now; None when all is stored. Before a machine is protected it does not count."""
        self.rpo_seconds = 0.0 if oldest_unstored_time_ns is None else max(now_ns - oldest_unstored_time_ns, 0) / 1e9
        if protected:
            self._rpo.add(self.rpo_seconds)

    def sent(self, byte_count: int) -> None:
        """Bytes of frames were handed to the network; those sent again count again."""
        self.bytes_sent += byte_count

    def frame_sent(self, last_sequence: int, time_ns: int) -> None:
        """A frame is under way; one that is sent again keeps its first entry."""
        under_way = self._under_way
        if len(under_way) < MAX_FRAMES_UNDER_WAY and (not under_way or last_sequence > under_way[-1][0]):
            under_way.append((last_sequence, time_ns))

    def stored(self, stored_sequence: int, now_ns: int) -> None:
        """Everything up to here is in storage."""
        under_way = self._under_way
        while under_way and under_way[0][0] <= stored_sequence:
            self._lags.add(max(now_ns - under_way.popleft()[1], 0) / 1e9)

    def rpo_percentiles(self) -> tuple[float, float]:
        """p50 and p99 of the RPO in seconds over the window."""
        middle, high = self._rpo.percentiles(0.50, 0.99)
        return middle, high

    def lag_percentiles(self) -> tuple[float, float]:
        """p50 and p99 in seconds of capture to stored, over the last frames."""
        middle, high = self._lags.percentiles(0.50, 0.99)
        return middle, high
