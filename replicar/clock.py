"""Time, handed in: the parts never ask the operating system themselves, so a simulator can run them under its own.

`now_ns` is the wall clock that descriptors, certificates and heartbeats carry; `monotonic` is for intervals and
deadlines; `sleep` is the only way to wait for time to pass.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What a part may know about time."""

    def now_ns(self) -> int:
        """Wall clock, nanoseconds since 1970-01-01T00:00:00Z."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after at least `seconds`."""
        ...


class SystemClock:
    """The clock of the operating system."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
