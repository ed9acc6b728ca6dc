"""Each machine's idea of the time: its wall clock may be off, jump and drift; its monotonic clock only drifts."""

from __future__ import annotations

import asyncio
from typing import Final

from simulator.world.loop import VirtualLoop

#: When every story begins.
EPOCH_NS: Final = 1_764_000_000 * 10**9
#: A clock never drifts by more than this share; NTP's own limit is 500 ppm.
MAX_DRIFT: Final = 500e-6


class MachineClock:
    """A `Clock` of one machine.

    Args:
        drift: by how much it is too fast, as a share.
        offset_seconds: by how much the wall clock is ahead.
    """

    def __init__(self, loop: VirtualLoop, *, drift: float = 0.0, offset_seconds: float = 0.0) -> None:
        self._loop = loop
        self._rate = 1.0 + drift
        self._offset_ns = int(offset_seconds * 1e9)

    def jump(self, seconds: float) -> None:
        """The wall clock is set."""
        self._offset_ns += int(seconds * 1e9)

    def now_ns(self) -> int:
        return EPOCH_NS + int(self._loop.time() * self._rate * 1e9) + self._offset_ns

    def monotonic(self) -> float:
        return self._loop.time() * self._rate

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._rate)
