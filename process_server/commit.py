"""Group commit: one task that makes what all machines sent durable, with one sync for all of them.

While a sync runs, more arrives, and goes with the next one; so the cost of a sync is shared by whoever is there, and
nobody waits for a timer. A short pause between commits keeps them from being tiny.

A full disk is waited out (the space is preallocated, but thin volumes and copying file systems promise what they don't
have): nothing more is durable here, what is in memory is stored all the same, and memory is bounded.

Any other error of the cache ends the server: `run` raises it, and it must never be caught and forgotten. Acknowledging
goes no further by then, and agents keep everything that is not stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from process_server.cache import CacheFile, PageWrite, SlotHeader
from process_server.slots import Slots
from process_server.stream import Commit, Stream
from replicar.errors import LimitError
from replicar.observe.histogram import Histogram

#: The least time from one commit's beginning to the next one's: at most 50 syncs a second. The first one after a pause
#: waits for nothing.
COMMIT_INTERVAL_SECONDS: Final = 0.02
#: How long a full disk is left alone before the same is written again: at first, and at most.
FULL_SECONDS: Final = 0.1
LONGEST_FULL_SECONDS: Final = 5.0


class Committer:
    """Commits for all streams of one cache file. `error` says what it waits for, None while all is well."""

    def __init__(self, cache: CacheFile, slots: Slots) -> None:
        self.error: LimitError | None = None
        self.seconds = Histogram()  # that commits took, syncs and all
        self._cache = cache
        self._slots = slots
        self._dirty: dict[Stream, Callable[[], None]] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def mark(self, stream: Stream, on_durable: Callable[[], None]) -> None:
        """`stream` has frames that are not durable; `on_durable` is called after the commit that made them so."""
        self._dirty[stream] = on_durable
        self._idle.clear()
        self._wake.set()

    async def flushed(self) -> None:
        """Return once everything marked so far is durable."""
        await self._idle.wait()

    async def run(self) -> None:
        """Commit for ever.

        Raises:
            PermanentError: the cache can't be written.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                began = loop.time()
                await self._commit(loop)
                if not self._dirty:
                    self._idle.set()
                await asyncio.sleep(max(0.0, began + COMMIT_INTERVAL_SECONDS - loop.time()))
        finally:
            # A write under way reads buffers that others would reuse: let it end.
            self._thread.shutdown(wait=True)

    async def _commit(self, loop: asyncio.AbstractEventLoop) -> None:
        dirty, self._dirty = self._dirty, {}
        commits = [(stream, stream.begin_commit(), notify) for stream, notify in dirty.items()]
        writes = [write for stream, commit, _ in commits for write in _writes(stream, commit)]
        if writes:
            await self._write(loop, writes)
        for stream, commit, notify in commits:
            stream.end_commit(commit)
            self._slots.settle(stream, [slot for slot, *_ in commit.ranges])
            notify()

    async def _write(self, loop: asyncio.AbstractEventLoop, writes: list[PageWrite]) -> None:
        """Write and sync; the slots are pinned, so the same bytes can be written as often as it takes."""
        pause, began = FULL_SECONDS, loop.time()
        while True:
            try:
                await loop.run_in_executor(self._thread, self._cache.write, writes)
            except LimitError as error:
                self.error = error
            else:
                self.error = None
                self.seconds.observe(loop.time() - began)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_FULL_SECONDS)


def _writes(stream: Stream, commit: Commit) -> list[PageWrite]:
    writes = []
    for slot, start, end, _ in commit.ranges:
        assert slot.buffer is not None, "a pinned slot keeps its buffer"
        header = None if slot.headed else SlotHeader(stream.machine_id, slot.serial, slot.first_sequence)
        writes.append(PageWrite(slot.index, header, slot.buffer, start, end))
    return writes
