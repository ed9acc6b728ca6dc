"""Who holds which slot of the cache file and which buffer in memory, and who waits for one.

A slot in use has a place in the file; it has a buffer too while it is received into or sealed from. When buffers are
short, slots that lie in the file whole give theirs up, the newest first (it will be sealed last), and are read back
into a few buffers kept for that alone: so a cache larger than memory can't lock itself up.

When the file is full, or every buffer is in use, or the machine holds its share already (`watermarks`), a receiver gets
nothing and waits here in line: it stops reading from its connection, so the agent keeps what it has, and nothing is
dropped. A machine waits in one place, however often it connects.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Final

from process_server.buffers import BufferPool
from process_server.cache import PAYLOAD_BYTES, SLOT_BYTES
from process_server.stream import Slot, Stream
from process_server.watermarks import Level, allowance, level_of

#: Buffers set aside for reading back what is in the file alone: one for each of a few segments under way.
READBACK_BUFFERS: Final = 4


class Slots:
    """All slots of one cache file.

    Args:
        count: slots in the file.
        buffers_bytes: memory for receiving; at least one buffer, whatever this says.
        next_serial: larger than any serial in the file.
    """

    def __init__(self, count: int, buffers_bytes: int, *, next_serial: int = 1) -> None:
        self.count = count
        self.readback = BufferPool(PAYLOAD_BYTES, READBACK_BUFFERS)
        self._buffers = BufferPool(PAYLOAD_BYTES, max(1, min(count, buffers_bytes // PAYLOAD_BYTES)))
        self._next_serial = next_serial
        self._free = list(range(count))  # a heap: low places are used again and again, high ones seldom
        self._cold: dict[Slot, None] = {}
        self._waiting: dict[Stream, Callable[[], None]] = {}

    @property
    def free_bytes(self) -> int:
        return len(self._free) * SLOT_BYTES

    @property
    def total_bytes(self) -> int:
        return self.count * SLOT_BYTES

    def claim(self, indices: Iterable[int]) -> None:
        """These places hold what an earlier life left; they are in use until their slots are settled."""
        taken = set(indices)
        self._free = [index for index in self._free if index not in taken]
        heapq.heapify(self._free)

    @property
    def level(self) -> Level:
        return level_of(len(self._free), self.count)

    @property
    def buffers_in_use(self) -> int:
        """Of `buffers_limit` that slots may have in memory."""
        return self._buffers.in_use

    @property
    def buffers_limit(self) -> int:
        return self._buffers.limit

    @property
    def waiting(self) -> int:
        """Machines that wait for a slot."""
        return len(self._waiting)

    def may_take(self, stream: Stream) -> bool:
        """Whether the machine may have one more slot, if there is one."""
        return len(stream.slots) < allowance(len(self._free), self.count, stream.weight)

    def take(self, stream: Stream) -> Slot | None:
        """A slot with a buffer, to receive the stream's next frame into; None when there is none for it now."""
        if not self._free or not self.may_take(stream):
            return None
        buffer = self._buffers.take()
        if buffer is None and self._cold:
            donor, _ = self._cold.popitem()
            buffer, donor.buffer = donor.buffer, None
        if buffer is None:
            return None
        slot = Slot(heapq.heappop(self._free), self._next_serial, stream.next_sequence, buffer)
        self._next_serial += 1
        return slot

    def wait(self, stream: Stream, retry: Callable[[], None]) -> None:
        """Call `retry` once when there may be a slot for the machine; who waits longest is first.

        A machine that waits already keeps its place; what it was to be told by is replaced.
        """
        self._waiting[stream] = retry

    def forget(self, stream: Stream) -> None:
        """The machine does not wait any more."""
        self._waiting.pop(stream, None)

    def settle(self, stream: Stream, slots: Iterable[Slot]) -> None:
        """The slots' state changed: free those that are done, note which could give up their buffer."""
        for slot in slots:
            if slot.is_done:
                self._release(stream, slot)
            elif slot.is_cold:
                self._cold[slot] = None
                self._wake()
            else:
                self._cold.pop(slot, None)

    def release_index(self, index: int) -> None:
        """A claimed place holds nothing of use."""
        heapq.heappush(self._free, index)
        self._wake()

    def _release(self, stream: Stream, slot: Slot) -> None:
        if slot not in stream.slots:
            return
        del stream.slots[slot]
        self._cold.pop(slot, None)
        buffer, slot.buffer = slot.buffer, None
        if buffer is not None:
            self._buffers.give(buffer)
        self.release_index(slot.index)

    def _wake(self) -> None:
        # A thousand machines may wait for one buffer that came free, so whoever is not reached costs nothing. Whoever
        # has hung up meanwhile takes nothing, so the next one gets its turn; who may not yet keeps its own.
        for _ in range(len(self._waiting)):
            if not self._free or not (self._buffers.has_free or self._cold):
                return
            following = next((stream for stream in self._waiting if self.may_take(stream)), None)
            if following is None:
                return
            self._waiting.pop(following)()
