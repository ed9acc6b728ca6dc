"""How much may be uploaded, and when: a rate for ordinary times, other rates in windows of the week, a token bucket.

Windows are in the server's own local time, as its wall clock shows it: "08:00" to "18:00" are working hours before and
after a change to or from summer time. An hour that a spring night leaves out never comes, and one that an autumn night
has twice is in its window both times. A window that ends before it begins goes on past midnight and belongs to the day
it begins on. Of several that apply the first one counts.

What is uploaded is charged when it is admitted, by its size before compression, and corrected when its size is known; a
repeated upload is charged again. The bucket may go into debt by one segment for each machine that is under way, and
nothing more is admitted until the debt is paid; so the mean holds over seconds, not over milliseconds.

Weak: TLS and HTTP headers, and the few requests that are no segments, are not counted: 1 % at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Final, Literal, TypeAlias

from replicar.clock import Clock

Day: TypeAlias = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
DAYS: Final[tuple[Day, ...]] = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
#: What may be saved up while nothing is uploaded.
BURST_SECONDS: Final = 1.0
#: Below this a single full segment would take longer than a minute: 512 Kbit/s.
LEAST_BYTES_PER_SECOND: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Window:
    """From minute `start` of each of `days` (0: Monday) up to minute `end`, of the next day if that is not later.

    `bytes_per_second` is None where there is no limit.
    """

    days: frozenset[int]
    start: int
    end: int
    bytes_per_second: int | None

    def holds(self, local: datetime) -> bool:
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        yesterday = (local - timedelta(days=1)).weekday()
        return (day in self.days and minute >= self.start) or (yesterday in self.days and minute < self.end)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The rate outside all windows (None: no limit), and the windows."""

    bytes_per_second: int | None = None
    windows: tuple[Window, ...] = ()

    def rate_at(self, local: datetime) -> int | None:
        """Bytes a second at a moment of local time; None for no limit."""
        return next((window.bytes_per_second for window in self.windows if window.holds(local)), self.bytes_per_second)


class Pace:
    """The token bucket under a schedule.

    Args:
        zone: whose local time; None for the system's.
    """

    def __init__(self, schedule: Schedule, clock: Clock, zone: tzinfo | None = None) -> None:
        self._schedule, self._clock, self._zone = schedule, clock, zone
        self._rate = self.rate
        self._tokens = BURST_SECONDS * (self._rate or 0)
        self._at = clock.monotonic()

    @property
    def rate(self) -> int | None:
        """Bytes a second just now; None for no limit."""
        return self._schedule.rate_at(datetime.fromtimestamp(self._clock.now_ns() // 10**9, self._zone))

    def spend(self, count: int) -> None:
        """So many bytes go out (or, below 0, did not after all)."""
        self._refill()
        if self._rate is not None:
            self._tokens -= count

    def wait_seconds(self) -> float:
        """How long until more may go out, if the rate stays as it is; 0 for now."""
        self._refill()
        return 0.0 if self._rate is None or self._tokens > 0 else max(-self._tokens / self._rate, 0.001)

    def _refill(self) -> None:
        """What the rate gave since the last look; a rate that ended or began since starts with an empty slate."""
        now, rate = self._clock.monotonic(), self.rate
        if rate is None or self._rate is None:
            self._tokens = BURST_SECONDS * (rate or 0)
        else:
            self._tokens = min(self._tokens + (now - self._at) * rate, BURST_SECONDS * rate)
        self._rate, self._at = rate, now
