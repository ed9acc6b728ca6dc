"""One machine's way from cache to storage: segments are sealed side by side, chained in order, uploaded side by side.

Each segment is a task; a future orders them. It is cut and gets its number when it is the machine's turn at the gate,
its digest and place when the one before has them, and it counts as stored when all before it are. So sealing uses all
cores, uploads hide each other's latency, and still the log grows in one order.

Errors: a `TransientError` of storage repeats the same write, for ever, with bounded pauses: the machine waits, and
nobody else does. Any other error ends the pipeline; whoever runs it opens the log again, or stops. Buffers go back to
their pools only when nobody reads or writes them any more, cancelled or not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from process_server.cache import PAYLOAD_BYTES, CacheFile, page_ceiling, page_floor
from process_server.effort import Effort
from process_server.gate import Pass
from process_server.health import Counters, Tallies
from process_server.logwriter import LogWriter, Place, Writer
from process_server.sealer import Sealer
from process_server.slots import Slots
from process_server.stream import Segment, Stream
from replicar.clock import Clock
from replicar.errors import CorruptionError, ReplicarError, TransientError
from replicar.formats import segment
from replicar.formats.segment import Position, SealedChunks
from replicar.log.reader import Tail

#: Pauses between tries of an upload that storage could not take; the store itself has tried for a while by then.
RETRY_SECONDS: Final = 1.0
LONGEST_RETRY_SECONDS: Final = 30.0


class CacheDamage(Exception):
    """The cache did not give a segment back as it was received: a signal to the machine, which nobody else sees."""

    def __init__(self, damaged: Segment, error: CorruptionError) -> None:
        super().__init__(error.message)
        self.damaged = damaged
        self.error = error


@dataclass(slots=True, eq=False)
class _Work:
    """A segment under way. `chained` gives its digest once it has its place."""

    segment: Segment
    position: Position
    chained: asyncio.Future[bytes]
    digest: bytes = b""
    is_sealed: bool = False


class Pipeline:
    """Seals and stores what `stream` has, until cancelled.

    Args:
        uploads: how many at once.
        on_stored: called when the stored watermark may have moved.
        on_error: told of what uploads wait for, and None when they go on.
    """

    def __init__(
        self,
        stream: Stream,
        log: LogWriter,
        writer: Writer,
        *,
        sealer: Sealer,
        slots: Slots,
        cache: CacheFile,
        clock: Clock,
        counters: Counters,
        tallies: Tallies,
        uploads: int,
        on_stored: Callable[[], None],
        on_error: Callable[[ReplicarError | None], None],
    ) -> None:
        self.tail = log.tail
        self._stream, self._log, self._writer = stream, log, writer
        self._sealer, self._slots, self._cache = sealer, slots, cache
        self._gate, self._meter = sealer.gate, sealer.meter
        self._clock, self._counters, self._tallies = clock, counters, tallies
        self._uploads = asyncio.Semaphore(uploads)
        self._on_stored, self._on_error = on_stored, on_error
        self._news = asyncio.Event()
        self._works: deque[_Work] = deque()
        self._number = log.tail.number
        self._last: _Work | None = None
        self._passes: dict[_Work, Pass] = {}
        self._effort = Effort()

    @property
    def under_way(self) -> tuple[int, int]:
        """Bytes being sealed, and bytes sealed that are not stored, or not all before them; before compression."""
        sealed = sum(work.segment.raw_bytes for work in self._works if work.is_sealed)
        return sum(work.segment.raw_bytes for work in self._works) - sealed, sealed

    def wake(self) -> None:
        """The stream has news for `tick`."""
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled, or until something other than a TransientError stands in the way; raises that."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    while self._stream.is_due(self._clock.monotonic()):
                        await self._start(group)
                    await self._sleep()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            # A task that is cancelled before its first step runs no `finally` of its own.
            for work in list(self._passes):
                self._give_back(work)

    async def _sleep(self) -> None:
        deadline = self._stream.deadline()
        timeout = None if deadline is None else deadline - self._clock.monotonic()
        if timeout is None or timeout > 0:
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                pass
        self._news.clear()

    async def _start(self, group: asyncio.TaskGroup) -> None:
        if not self._log.reserve():
            await self._roll()
        with self._meter.waiting():
            found = await self._gate.admit(self._stream, lambda: self._stream.next_bytes)
        [each] = self._stream.tick(self._clock.monotonic(), most=1)
        self._number += 1
        position = Position(
            self._writer.machine_id,
            self._writer.epoch,
            self._log.run,
            self._number,
            each.first_sequence,
            each.last_sequence,
        )
        work = _Work(each, position, asyncio.get_running_loop().create_future())
        self._passes[work] = found
        previous, self._last = self._last, work
        self._works.append(work)
        group.create_task(self._carry(work, previous))

    async def _roll(self) -> None:
        while self._works:
            self._news.clear()
            await self._news.wait()
        await self._log.roll(self.tail)
        self._last = None
        assert self._log.reserve(), "a new run has room"

    async def _carry(self, work: _Work, previous: _Work | None) -> None:
        """One segment from cut to stored."""
        try:
            data, place = await self._seal(work, previous, self._passes[work].buffer)
            self._gate.sealed(self._passes[work].raw_bytes, len(data))
            work.is_sealed = True
            with self._meter.waiting():
                await self._uploads.acquire()
            try:
                await self._upload(place, data)
            finally:
                self._uploads.release()
        finally:
            self._give_back(work)
        self._stored(work, len(data))

    def _give_back(self, work: _Work) -> None:
        work.chained.cancel()  # no effect once it has its result
        self._gate.give(self._passes.pop(work))

    async def _seal(self, work: _Work, previous: _Work | None, out: memoryview) -> tuple[memoryview, Place]:
        slot, stream = work.segment.slot, self._stream
        slot.pins += 1  # its buffer stays, or it stays without one
        self._slots.settle(stream, [slot])
        readback: memoryview | None = None
        try:
            if slot.buffer is None:
                readback = await self._slots.readback.acquire()
            with self._meter.sealing(work.segment.raw_bytes):
                if readback is None and self._sealer.is_quick(work.segment.raw_bytes):
                    chunks = self._prepare(work, slot.buffer, None, out)
                else:
                    chunks = await self._sealer.run(self._prepare, work, slot.buffer, readback, out)
            before = self._log.tail.digest if previous is None else await previous.chained
            data, work.digest = segment.chain(chunks, before)
            place = await self._log.place(len(data))
            work.chained.set_result(work.digest)
        finally:
            slot.pins -= 1
            if readback is not None:
                self._slots.readback.give(readback)
            self._slots.settle(stream, [slot])
        return data, place

    def _prepare(
        self, work: _Work, buffer: memoryview | None, readback: memoryview | None, out: memoryview
    ) -> SealedChunks:
        """Get the bytes, compress and encrypt them; in a thread, but for what is quick."""
        each, where = work.segment, work.position
        source = buffer
        try:
            if source is None:
                assert readback is not None
                start, end = page_floor(each.start), min(page_ceiling(each.end), PAYLOAD_BYTES)
                self._cache.read(each.slot.index, start, end, readback)
                source = readback
            run = source[each.start : each.end]
            return self._sealer.seal(
                *(run, where, self._writer.data_key, self._writer.key_id, out, self._effort),
                verify=readback is not None,
            )
        except CorruptionError as error:
            raise CacheDamage(each, error) from error

    async def _upload(self, place: Place, data: memoryview) -> None:
        pause, began = RETRY_SECONDS, self._clock.monotonic()
        while True:
            try:
                await self._log.write(place, data)
            except TransientError as error:
                self._counters.upload_failures += 1
                self._on_error(error)
                await self._clock.sleep(max(pause, error.retry_after_seconds or 0.0))
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)
                self._gate.spend(len(data))
            else:
                self._tallies.upload_seconds.observe(self._clock.monotonic() - began)
                return

    def _stored(self, work: _Work, sealed_bytes: int) -> None:
        counters = self._counters
        counters.segments += 1
        counters.bytes_stored += work.segment.raw_bytes
        counters.bytes_uploaded += sealed_bytes
        changed = self._stream.stored(work.segment)
        while self._works and self._works[0].segment.is_stored:
            first = self._works.popleft()
            self.tail = Tail(first.position.number, first.position.last_sequence, first.digest, "stored")
            if first.segment.captured_ns:
                self._tallies.stored(self._clock.now_ns() - first.segment.captured_ns)
        self._slots.settle(self._stream, changed)
        self._on_error(None)
        self._on_stored()
        self.wake()


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one of a group that says most: a programmer's error first, then whatever came first."""
    leaves: list[BaseException] = []
    for each in errors.exceptions:
        leaves.append(first_error(each) if isinstance(each, BaseExceptionGroup) else each)
    strange = [each for each in leaves if not isinstance(each, ReplicarError | CacheDamage)]
    return (strange or leaves)[0]


def end_if_cancelled() -> None:
    """A task group that is ending over an error forgets that its task was cancelled meanwhile (until Python 3.13)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
