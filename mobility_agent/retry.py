"""How long to wait before the next try, and waiting for whichever of several things comes first."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from replicar.errors import ReplicarError, TransientError


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential, bounded and jittered delays, so that a thousand agents do not come back in one instant.

    What may pass by itself (TransientError) is tried again quickly at first; what somebody has to mend is tried more
    slowly, but tried: nobody should have to visit every machine after mending it.
    """

    first_seconds: float = 0.2
    most_seconds: float = 5.0
    slow_first_seconds: float = 1.0
    slow_most_seconds: float = 60.0

    def delay(self, failures: int, error: ReplicarError, randomness: random.Random) -> float:
        """Seconds to wait after so many failures in a row, the last one being `error`."""
        doubled = 2.0 ** min(max(failures - 1, 0), 16)
        if isinstance(error, TransientError):
            seconds = min(self.first_seconds * doubled, self.most_seconds)
            if error.retry_after_seconds is not None:
                seconds = max(seconds, min(error.retry_after_seconds, self.slow_most_seconds))
        else:
            seconds = min(self.slow_first_seconds * doubled, self.slow_most_seconds)
        return seconds * randomness.uniform(0.5, 1.0)


async def first_of(*waiting: Coroutine[Any, Any, object]) -> None:
    """Run all of them until the first one returns or raises; the others are cancelled and waited for.

    Raises:
        BaseException: what the first one to end raised.
    """
    tasks = [asyncio.ensure_future(each) for each in waiting]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
