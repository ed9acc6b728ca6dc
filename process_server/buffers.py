"""Page-aligned memory that is mapped once and used again and again.

Fresh memory costs: half of what an obvious server spends is the kernel faulting pages in and copying them. So all that
bytes travel through here are anonymous private mappings of one size, which are aligned as O_DIRECT wants it, taken from
a pool with a named limit and given back.

`take` never waits: whoever receives has to stop reading instead. `acquire` waits in order: whoever seals may.

Weak: a buffer that was given back is not wiped; whoever takes it overwrites what it shows to others.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque

from replicar.errors import LimitError


class BufferPool:
    """At most `limit` buffers of `buffer_bytes` (a multiple of the page size) each; made when first needed."""

    def __init__(self, buffer_bytes: int, limit: int) -> None:
        if buffer_bytes % mmap.PAGESIZE:
            raise ValueError(f"buffers of {buffer_bytes} bytes are no whole pages")
        if limit < 1:
            raise LimitError(f"a pool of {limit} buffers", hint="give it room for at least one buffer")
        self.buffer_bytes = buffer_bytes
        self.limit = limit
        self._made = 0
        self._free: list[memoryview] = []
        self._waiting: deque[asyncio.Future[memoryview]] = deque()

    @property
    def in_use(self) -> int:
        return self._made - len(self._free)

    @property
    def has_free(self) -> bool:
        """Whether `take` would give one."""
        return bool(self._free) or self._made < self.limit

    def take(self) -> memoryview | None:
        """A buffer of `buffer_bytes`, with whatever its last user left in it; None when all are in use."""
        if self._free:
            return self._free.pop()  # the one used last is the one most likely still in the processor's cache
        if self._made == self.limit:
            return None
        self._made += 1
        return memoryview(mmap.mmap(-1, self.buffer_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    async def acquire(self) -> memoryview:
        """A buffer, as soon as there is one; first come, first served."""
        buffer = self.take() if not self._waiting else None
        if buffer is not None:
            return buffer
        waiter: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give(waiter.result())
            raise

    def give(self, buffer: memoryview) -> None:
        """Give a buffer back; nobody may touch it afterwards."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(buffer)
                return
        self._free.append(buffer)
