"""What an earlier life of this server left in the cache file: found at the start, taken up where it is still of use.

Slots are sorted by serial; a machine's frames are taken up contiguously from the first one that storage does not have.
Whatever is torn, damaged, missing or out of order ends the run there: the agent still has everything that is not stored
and sends the rest again. So this can cost time and never data.

A stream that leaves numbers out (after a power cut of its machine) is followed only right behind a frame that is sound
in the same slot: at a slot's beginning nobody can tell such a jump from a slot before it that lost its end, and what
was lost there would count as stored. Another incarnation is followed anywhere: its agent has nothing of the older one.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from process_server.buffers import BufferPool
from process_server.cache import PAYLOAD_BYTES, CacheFile, SlotHeader
from process_server.intake import may_jump
from process_server.stream import SLOT_LIMIT_BYTES
from replicar.errors import CorruptionError
from replicar.formats import frame
from replicar.formats.frame import INCARNATION_SHIFT, FrameHeader


@dataclass(frozen=True, slots=True)
class FoundSlot:
    """A slot whose frames go on where storage ends: `headers` lie back to back from byte `start` of its payload."""

    index: int
    header: SlotHeader
    headers: list[FrameHeader]
    start: int


@dataclass(slots=True)
class Leftovers:
    """Slots by machine, in order of their serial. `next_serial` is larger than any of them."""

    by_machine: dict[uuid.UUID, list[tuple[int, SlotHeader]]] = field(default_factory=dict)
    next_serial: int = 1


def find(cache: CacheFile) -> Leftovers:
    """Read all slot headers. Blocks: call it in a thread."""
    found = Leftovers()
    for index, header in sorted(cache.headers(), key=lambda item: item[1].serial):
        found.by_machine.setdefault(header.machine_id, []).append((index, header))
        found.next_serial = header.serial + 1
    return found


def take_up(
    cache: CacheFile, slots: list[tuple[int, SlotHeader]], machine_id: uuid.UUID, stored_sequence: int
) -> list[FoundSlot]:
    """The slots that hold what follows `stored_sequence`, verified byte by byte. Blocks: call it in a thread.

    Args:
        slots: of this machine, in order.
    """
    cache.sync()
    buffer = BufferPool(PAYLOAD_BYTES, 1).take()
    assert buffer is not None
    useful: list[FoundSlot] = []
    following = stored_sequence + 1
    for place, (index, header) in enumerate(slots):
        later = slots[place + 1][1].first_sequence if place + 1 < len(slots) else None
        if later is not None and later <= following and not useful:
            continue  # all of it is stored
        try:
            cache.read(index, 0, PAYLOAD_BYTES, buffer)
        except CorruptionError:
            break
        headers, start = _frames(buffer, machine_id, following)
        if headers:
            useful.append(FoundSlot(index, header, headers, start))
            following = headers[-1].next_sequence
        elif useful:
            break
    return useful


def _frames(buffer: memoryview, machine_id: uuid.UUID, following: int) -> tuple[list[FrameHeader], int]:
    """The frames from sequence `following` on, and where the first of them begins."""
    headers: list[FrameHeader] = []
    start = offset = 0
    data = buffer[:SLOT_LIMIT_BYTES]
    expected: int | None = None
    while True:
        try:
            found = frame.read_frame(data, offset)
        except CorruptionError:
            return headers, start
        if found is None or found.header.machine_id != machine_id:
            return headers, start
        header = found.header
        wanted = expected if expected is not None else following
        if header.next_sequence > following:  # else it is stored
            follows = expected is not None or header.first_sequence >> INCARNATION_SHIFT > wanted >> INCARNATION_SHIFT
            if header.first_sequence != wanted and not (follows and may_jump(header, found.table, wanted)):
                return headers, start
            if not headers:
                start = offset
            headers.append(header)
        elif expected is not None and header.first_sequence != expected:
            return headers, start
        expected = header.next_sequence
        offset += header.frame_bytes
