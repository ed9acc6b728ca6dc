"""A store whose reads go no faster than somebody allows: for whoever must not be in the way of what matters more."""

from __future__ import annotations

from replicar.clock import Clock
from replicar.storage.limits import LimitedStore, TokenBucket
from replicar.storage.store import PageBlobStore


class PacedStore(LimitedStore):
    """`inner`, with at most `bytes_per_second` read over all its blobs together."""

    def __init__(self, inner: PageBlobStore, bytes_per_second: float, *, clock: Clock) -> None:
        super().__init__(inner, clock=clock)
        self._time = clock
        self._bucket = TokenBucket.full(bytes_per_second, clock.monotonic())

    async def read(self, name: str, offset: int, length: int) -> bytes:
        wait = self._bucket.take(length, self._time.monotonic())
        if wait > 0:
            await self._time.sleep(wait)
        return await super().read(name, offset, length)
