"""The one door between cache and storage: who seals and uploads next, into which buffer, and how fast.

A segment under way needs a buffer, of which there are few, and a part of the window: so many bytes may be between cache
and storage at once, just enough to keep all uploads of one machine busy, so that nobody waits for much. Both are given
by turns (`turns`), in proportion to the machines' weights and to the bytes they bring. So a machine with much to store
gets what others leave, one with little waits for what is under way and one segment of each other at most, and
compressing and uploading have the same shares. While the uploads of the hour are spent (`bandwidth`) nobody gets any.

Beyond its first segment a machine holds at most `GENEROSITY` times as much of the window as is free, times its weight;
so one whose uploads hang leaves a part of it to others.

What a turn costs is asked when it comes: a segment grows while its machine waits, and is cut then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from process_server.bandwidth import Pace
from process_server.buffers import BufferPool
from process_server.stream import Stream
from process_server.turns import Turns

#: A schedule is looked at so often while it holds things up: the next window may allow more.
LOOK_SECONDS: Final = 1.0
#: One machine alone may hold eight ninths of the window; see `watermarks` for how such thresholds share.
GENEROSITY: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What a machine got in its turn: a buffer, for a segment of about so many bytes before compression."""

    stream: Stream
    buffer: memoryview
    raw_bytes: int


_Waiter: TypeAlias = tuple["asyncio.Future[Pass]", Callable[[], int]]


class Gate:
    """Lets segments through.

    Args:
        window_bytes: what may be under way at once, before compression; one segment more than that may be.
        pace: what may be uploaded; None for no limit.
    """

    def __init__(self, buffers: BufferPool, window_bytes: int, pace: Pace | None = None) -> None:
        self._buffers, self._window_bytes, self._pace = buffers, window_bytes, pace
        self._turns: Turns[Stream] = Turns()
        self._waiting: dict[Stream, _Waiter] = {}
        self._held: Counter[Stream] = Counter()
        self._under_way = 0
        self._timer: asyncio.TimerHandle | None = None
        self.paced_seconds = 0.0  # for which the hour's uploads held everybody up

    @property
    def under_way_bytes(self) -> int:
        """Between cache and storage now, before compression."""
        return self._under_way

    @property
    def rate(self) -> int | None:
        """Bytes a second that may be uploaded just now; None for no limit."""
        return None if self._pace is None else self._pace.rate

    @property
    def waiting(self) -> int:
        """Machines that wait for their turn."""
        return len(self._waiting)

    def held(self, stream: Stream) -> int:
        """Bytes that the machine has under way."""
        return self._held[stream]

    async def admit(self, stream: Stream, size: Callable[[], int]) -> Pass:
        """Wait for the machine's turn; it waits for one at a time.

        Args:
            size: of its next segment, in bytes before compression, as it is when asked.
        """
        assert stream not in self._waiting
        future: asyncio.Future[Pass] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = future, size
        self._turns.join(stream, stream.weight)
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            self._turns.leave(stream)
            self._waiting.pop(stream, None)
            if future.done() and not future.cancelled():
                self.give(future.result())
            raise

    def sealed(self, raw_bytes: int, sealed_bytes: int) -> None:
        """What was admitted as so many bytes came to so many."""
        self.spend(sealed_bytes - raw_bytes)

    def spend(self, count: int) -> None:
        """So many bytes more go out."""
        if self._pace is not None:
            self._pace.spend(count)

    def give(self, used: Pass) -> None:
        """The segment is stored, or given up; nobody may touch its buffer afterwards."""
        self._held[used.stream] -= used.raw_bytes
        if not self._held[used.stream]:
            del self._held[used.stream]
        self._under_way -= used.raw_bytes
        self._buffers.give(used.buffer)
        self._dispatch()

    def close(self) -> None:
        """Look at no schedule any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _may(self, stream: Stream) -> bool:
        future, size = self._waiting[stream]
        if future.done():
            return False  # it was cancelled, and has not been told yet
        held = self._held[stream]
        return not held or held + size() <= stream.weight * GENEROSITY * (self._window_bytes - self._under_way)

    def _dispatch(self) -> None:
        while self._waiting and self._buffers.has_free and self._under_way < self._window_bytes:
            pause = self._pace.wait_seconds() if self._pace is not None else 0.0
            if pause:
                self._later(min(pause, LOOK_SECONDS))
                return
            stream = self._turns.next(lambda each: self._waiting[each][1](), may=self._may)
            if stream is None:
                return
            self._let(stream)

    def _let(self, stream: Stream) -> None:
        future, size = self._waiting.pop(stream)
        buffer = self._buffers.take()
        assert buffer is not None
        found = Pass(stream, buffer, size())
        self._held[stream] += found.raw_bytes
        self._under_way += found.raw_bytes
        self.spend(found.raw_bytes)
        future.set_result(found)

    def _later(self, seconds: float) -> None:
        if self._timer is None:
            self.paced_seconds += seconds
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._dispatch()
