"""How many requests are under way at once: as many as there are lanes, and fewer while they time each other out.

On a thin link requests that share it may all reach their time limit unfinished, and, repeated together, do so for ever.
So one that ends by its limit halves how many may be under way, down to one, and each that is answered makes room for
a fraction of one more: as many answers as may be under way are a lane. A link that carries one request within the
limit carries all of them, one behind the other.

Pure but for the waiting: who waits longest is next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Lanes:
    """See the module.

    Args:
        most: lanes while all is well.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """How many requests may be under way now."""
        return int(self._limit)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Have a lane, as soon as there is one."""
        await self._enter()
        try:
            yield
        finally:
            self._used -= 1
            self._wake()

    def answered(self) -> None:
        """A request got its answer in time."""
        self._limit = min(self._most, self._limit + 1 / self._limit)
        self._wake()

    def timed_out(self) -> None:
        """A request did not."""
        self._limit = max(1.0, min(self._limit, self._used) / 2)

    async def _enter(self) -> None:
        if self._used < self.limit and not self._waiting:
            self._used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # `_wake` may have passed over it already
                    self._waiting.remove(turn)
            else:  # it was given a lane, and goes
                self._used -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self._used < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._used += 1
                turn.set_result(None)
