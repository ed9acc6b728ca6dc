"""One machine's stream inside the process server: which bytes are received, durable, cut into segments, stored.

Pure: no clock, no disk, no socket. The shell appends frames that `intake` accepted, says what became durable and what
became stored, and asks `tick(now)` which segments to seal next.

    received bytes   a slot's `filled`    in the buffer, perhaps in the middle of a frame
    parsed bytes     a slot's `parsed`    whole, verified frames
    durable bytes    a slot's `durable`   in the cache file, behind a sync
    cut bytes        a slot's `cut`       part of a segment
    stored           the segment and every one before it are in storage

A segment is a run of whole frames inside one slot, consecutive in sequence, small enough for one Put Page. It is cut

- by size: when the next frame would not fit, or lies in the next slot, or jumps in sequence;
- by age: when its first frame has waited for `age_seconds`, or `idle_age_seconds` if nothing else is under way; but
  only while there is room to upload it. So an idle machine has a short way to storage, and when storage is the
  bottleneck segments grow by themselves.

Numbers, chains and places are the log writer's affair. The stored watermark moves only over whole prefixes.
"""

from __future__ import annotations

import uuid
from collections import deque
from dataclasses import dataclass
from typing import Final

from process_server.cache import PAYLOAD_BYTES, page_ceiling, page_floor
from replicar.errors import ConflictError
from replicar.formats import segment
from replicar.formats.frame import FrameHeader

#: No frame is placed so that a segment from the slot's start to its end would be larger than a segment may be.
SLOT_LIMIT_BYTES: Final = segment.MAX_RAW_BYTES
assert SLOT_LIMIT_BYTES < PAYLOAD_BYTES
#: Segments that wait for their turn, beyond which more would only lie in memory and not make storing any faster.
AHEAD_SEGMENTS: Final = 2

LOST_LOG_HINT: Final = (
    "was the container or a blob deleted? Bring it back (soft delete), or enrol the machine again to start anew"
)


@dataclass(frozen=True, slots=True)
class Cutting:
    """When segments are cut, and how many may be under way at once."""

    age_seconds: float = 0.2
    idle_age_seconds: float = 0.05
    in_flight: int = 6


@dataclass(slots=True, eq=False)
class Slot:
    """A slot in use. `buffer` is None while its bytes are in the cache file alone; `pins` counts who needs it there."""

    index: int
    serial: int
    first_sequence: int
    buffer: memoryview | None
    filled: int = 0
    parsed: int = 0
    durable: int = 0
    cut: int = 0
    index_bytes: int = 0
    segments: int = 0  # cut from it and not stored yet
    pins: int = 0
    headed: bool = False  # its header page is in the file
    closed: bool = False  # nothing more is received into it

    @property
    def is_done(self) -> bool:
        """Nothing of it is needed any more."""
        return self.closed and self.cut == self.parsed and not self.segments and not self.pins

    @property
    def is_cold(self) -> bool:
        """All of it is in the cache file and nobody is at it, so its buffer may serve somebody else."""
        return self.closed and self.durable == self.parsed and not self.pins and self.buffer is not None


@dataclass(slots=True, eq=False)
class Segment:
    """Bytes [start, end) of a slot: a run of frames to be sealed, being sealed, or being stored."""

    slot: Slot
    start: int
    end: int
    first_sequence: int
    last_sequence: int
    frames: int
    index_bytes: int
    since: float  # when its first frame arrived
    is_stored: bool = False
    captured_ns: int = 0  # of its first descriptor; 0: not known (an earlier life received it)

    @property
    def raw_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Commit:
    """What one group commit takes of a stream: page ranges by slot, and what is received once they are durable."""

    ranges: tuple[tuple[Slot, int, int, int], ...]  # slot, first page's offset, end of the last page, parsed bytes
    last_sequence: int
    cuts: int  # how often the stream had been cut back when it began


class Stream:
    """The core. Sequences are those of the last descriptor concerned; 0 is "nothing yet".

    Args:
        stored_sequence: where the log in storage ends.
        weight: of this machine beside the others, where they share something.
    """

    def __init__(self, machine_id: uuid.UUID, stored_sequence: int, cutting: Cutting, *, weight: int = 1) -> None:
        self.machine_id = machine_id
        self.weight = weight
        self.next_sequence = stored_sequence + 1
        self.stored_sequence = stored_sequence
        self.open_slot: Slot | None = None
        self.slots: dict[Slot, None] = {}  # in use, oldest first
        self._dirty: dict[Slot, None] = {}  # those with bytes that no commit has taken yet
        self._durable_sequence = stored_sequence
        self._cutting = cutting
        self._cuts = 0
        self._growing: Segment | None = None
        self._ready: deque[Segment] = deque()
        self._in_flight: deque[Segment] = deque()

    @property
    def received_sequence(self) -> int:
        """Up to here nothing is lost if this process dies: durable in the cache, or stored already."""
        return max(self._durable_sequence, self.stored_sequence)

    @property
    def is_ahead(self) -> bool:
        """Whether more is received than storing needs to go on without a pause."""
        return len(self._ready) + len(self._in_flight) >= self._cutting.in_flight + AHEAD_SEGMENTS

    @property
    def pending_bytes(self) -> int:
        """Whole frames that are not stored yet."""
        waiting = sum(each.raw_bytes for each in (*self._ready, *self._in_flight))
        return waiting + (self._growing.raw_bytes if self._growing is not None else 0)

    @property
    def oldest_ns(self) -> int | None:
        """When the oldest change that is pending was captured; 0 where that is not known, None where none is."""
        for queue in (self._in_flight, self._ready):
            if queue:
                return queue[0].captured_ns
        return self._growing.captured_ns if self._growing is not None else None

    # --- receiving ---

    def open(self, slot: Slot) -> None:
        """Receive into `slot` from now on."""
        assert self.open_slot is None, "one slot at a time is open"
        self.open_slot = slot
        self.slots[slot] = None

    def close(self) -> Slot | None:
        """Receive no more into the open slot; what was not a whole frame in it is forgotten."""
        slot, self.open_slot = self.open_slot, None
        if slot is not None:
            slot.closed, slot.filled = True, slot.parsed
            self._cut(slot)
        return slot

    def has_room(self, header: FrameHeader) -> bool:
        """Whether a frame fits behind those of the open slot, index and all."""
        slot = self.open_slot
        assert slot is not None
        index = segment.index_bytes(1, header.count)
        return slot.parsed + header.frame_bytes + slot.index_bytes + index <= SLOT_LIMIT_BYTES

    def append(self, header: FrameHeader, now: float) -> bool:
        """A whole, verified frame lies at the open slot's `parsed`. True when `tick` may have something new to say."""
        slot = self.open_slot
        assert slot is not None
        assert slot.parsed + header.frame_bytes <= slot.filled
        news = self._grow(slot, header, now)
        slot.parsed += header.frame_bytes
        self._dirty[slot] = None
        self.next_sequence = header.next_sequence
        return news

    def began(self, captured_ns: int) -> None:
        """The frame that was just appended, with which a segment began, holds changes from then on."""
        if self._growing is not None:
            self._growing.captured_ns = captured_ns

    def adopt(self, slot: Slot, headers: list[FrameHeader], start: int, now: float) -> None:
        """Take a slot from an earlier life, whose frames `headers` (in order) lie back to back from byte `start`."""
        slot.parsed = slot.cut = start
        self.slots[slot] = None
        for header in headers:
            self._grow(slot, header, now)
            slot.parsed += header.frame_bytes
            self.next_sequence = header.next_sequence
        slot.filled = slot.durable = slot.parsed
        slot.closed = slot.headed = True
        self._cut(slot)
        self._durable_sequence = self.next_sequence - 1

    # --- the cache ---

    def begin_commit(self) -> Commit:
        """What is parsed and not durable. The slots are pinned until `end_commit`."""
        ranges = []
        for slot in self._dirty:
            if slot.buffer is not None:  # else it was stored and released before any commit came
                slot.pins += 1
                ranges.append((slot, page_floor(slot.durable), page_ceiling(slot.parsed), slot.parsed))
        self._dirty.clear()
        return Commit(tuple(ranges), self.next_sequence - 1, self._cuts)

    def end_commit(self, commit: Commit) -> None:
        """The ranges of `commit` are durable."""
        for slot, _, _, parsed in commit.ranges:
            slot.pins -= 1
            slot.durable, slot.headed = parsed, True
        if commit.cuts == self._cuts:  # else what was made durable may have been cut off, and come again since
            self._durable_sequence = commit.last_sequence

    # --- storage ---

    def is_due(self, now: float) -> bool:
        """Whether `tick` would give a segment."""
        if len(self._in_flight) >= self._cutting.in_flight:
            return False
        return bool(self._ready) or (self._growing is not None and now >= self._due(self._growing))

    @property
    def next_bytes(self) -> int:
        """What the next segment would hold if it were cut now; 0 for none."""
        following = self._ready[0] if self._ready else self._growing
        return following.raw_bytes if following is not None else 0

    def tick(self, now: float, *, most: int | None = None) -> list[Segment]:
        """The segments to seal and store now, in order, or so many of them; under way until `stored` or `restart`."""
        taken: list[Segment] = []
        while len(self._in_flight) < self._cutting.in_flight and (most is None or len(taken) < most):
            if not self._ready and self._growing is not None and now >= self._due(self._growing):
                self._cut(self._growing.slot)
            if not self._ready:
                break
            taken.append(self._ready.popleft())
            self._in_flight.append(taken[-1])
        return taken

    def deadline(self) -> float | None:
        """When `tick` has something to say if nothing else happens; None if only something happening can change it."""
        if len(self._in_flight) >= self._cutting.in_flight or self._growing is None:
            return None
        return self._due(self._growing)

    def flush(self) -> None:
        """Cut what is there, whatever its age."""
        if self._growing is not None:
            self._cut(self._growing.slot)

    def stored(self, each: Segment) -> list[Slot]:
        """A segment is in storage; the watermark moves as far as it can. Returns slots whose state changed."""
        each.is_stored = True
        changed = []
        while self._in_flight and self._in_flight[0].is_stored:
            first = self._in_flight.popleft()
            first.slot.segments -= 1
            self.stored_sequence = first.last_sequence
            changed.append(first.slot)
        slot = self.open_slot
        if slot is not None and slot.filled == slot.parsed == slot.cut and not slot.segments:
            self.close()  # idle: others may need the memory
            changed.append(slot)
        return changed

    def check_log(self, log_sequence: int) -> None:
        """Whether the log can end where it does.

        Raises:
            ConflictError: it holds less than was once acknowledged, or ends where no segment of ours ended.
        """
        ends = {self.stored_sequence, *(each.last_sequence for each in (*self._in_flight, *self._ready))}
        if log_sequence not in ends:
            raise lost_log(self.machine_id, self.stored_sequence, log_sequence)

    def restart(self, log_sequence: int) -> list[Slot]:
        """The log was opened again and ends at `log_sequence`: what was under way and is not in it is to be stored.

        Returns the slots whose state changed. Raises as `check_log`.
        """
        self.check_log(log_sequence)
        waiting = [*self._in_flight, *self._ready]
        self._in_flight.clear()
        self._ready = deque(each for each in waiting if each.last_sequence > log_sequence)
        changed = []
        for each in waiting:
            each.is_stored = False
            if each.last_sequence <= log_sequence:
                each.slot.segments -= 1
                changed.append(each.slot)
        self.stored_sequence = log_sequence
        return changed

    def truncate(self, damaged: Segment) -> list[Slot]:
        """The cache lost a segment's bytes: forget it and all behind it; the agent sends that again.

        Nothing may be under way (see `restart`). Returns the slots whose state changed.
        """
        assert not self._in_flight
        self._cuts += 1
        closed = self.close()  # it may hold no whole frame, and then nothing else would let go of it
        kept: list[Segment] = []
        dropped: list[Segment] = []
        for each in self._ready:
            (dropped if each is damaged or dropped else kept).append(each)
        self._ready = deque(kept)
        for each in dropped:
            each.slot.segments -= 1
        self.next_sequence = damaged.first_sequence
        self._durable_sequence = min(self._durable_sequence, self.next_sequence - 1)
        changed = {each.slot: None for each in dropped} | ({closed: None} if closed is not None else {})
        return list(changed)

    def abandon(self) -> list[Slot]:
        """Forget everything; returns the slots, to be settled."""
        self.close()
        self._ready.clear()
        self._in_flight.clear()
        self._dirty.clear()
        for slot in self.slots:
            slot.segments, slot.cut = 0, slot.parsed
        return list(self.slots)

    # --- cutting ---

    def _grow(self, slot: Slot, header: FrameHeader, now: float) -> bool:
        """Make the frame at the slot's `parsed` part of a segment. True when a segment began or became ready."""
        index = segment.index_bytes(1, header.count)
        slot.index_bytes += index
        growing = self._growing
        if growing is not None and self._follows(growing, slot, header, index):
            growing.end += header.frame_bytes
            growing.last_sequence = header.last_sequence
            growing.frames += 1
            growing.index_bytes += index
            return False
        if growing is not None:
            self._cut(growing.slot)
        first, last = header.first_sequence, header.last_sequence
        self._growing = Segment(slot, slot.parsed, slot.parsed + header.frame_bytes, first, last, 1, index, now)
        return True

    @staticmethod
    def _follows(growing: Segment, slot: Slot, header: FrameHeader, index: int) -> bool:
        size = growing.raw_bytes + growing.index_bytes + header.frame_bytes + index
        following = growing.last_sequence + 1 == header.first_sequence
        return growing.slot is slot and following and size <= segment.MAX_RAW_BYTES

    def _cut(self, slot: Slot) -> None:
        growing = self._growing
        if growing is None or growing.slot is not slot:
            return
        self._growing = None
        slot.cut = growing.end
        slot.segments += 1
        self._ready.append(growing)

    def _due(self, growing: Segment) -> float:
        busy = bool(self._in_flight)
        return growing.since + (self._cutting.age_seconds if busy else self._cutting.idle_age_seconds)


def lost_log(machine_id: uuid.UUID, ours: int, theirs: int) -> ConflictError:
    """Storage does not hold what it acknowledged."""
    return ConflictError(
        f"the log of machine {machine_id} in storage ends at sequence {theirs}, but {ours} was stored",
        hint=LOST_LOG_HINT,
        ours=ours,
        theirs=theirs,
        machine_id=str(machine_id),
    )
