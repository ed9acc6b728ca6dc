"""Frames out of received bytes, in place and in order; damage and disorder become one answer: send again from here.

Pure: the caller owns the memory, says what of it holds bytes, and does what the step says.

    following   every frame is the next one           -> Begin, Accept
                received before                       -> Drop
                damaged, or a later one               -> Drop with `resend`, and on to
    seeking     whatever is not the frame asked for   -> Drop
                the frame asked for                   -> Begin, Accept, and back
                one that may jump                     -> Part

A frame whose header is sound is dropped by its length. Where not even the header is sound, the next header is searched
for; TLS keeps accidents of the line out, so this happens only when the agent itself sends rubbish.

A stream may *jump* to a later sequence only where it begins anew: the machine's change log was lost, or its tail in a
power cut, and the first thing it says is a gap. Anything else that skips a sequence would be a silent hole. While
something is sought nobody can tell the answer to it from what was under way behind it: a jump would skip what the agent
is about to send again. A new conversation has no such doubt, so this one ends.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from replicar.errors import CorruptionError
from replicar.formats import frame
from replicar.formats.frame import FrameHeader, Table


class Begin(NamedTuple):
    """A frame that may be the next one begins here: see that there is room for all of it, and ask again."""

    header: FrameHeader


class Accept(NamedTuple):
    """The next frame, verified; its bytes stay where they are. A tuple like the one above: every frame needs both."""

    header: FrameHeader


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget so many bytes; with `resend`, also ask for the stream again (why, in words)."""

    count: int
    resend: str = ""


@dataclass(frozen=True, slots=True)
class Wait:
    """More is needed: ask again when so many bytes are there from here on."""

    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """Forget so many bytes, a frame that nobody may find again, and end the conversation (why, in words)."""

    count: int
    why: str


Step: TypeAlias = Begin | Accept | Drop | Wait | Part
_WAIT_HEADER: Final = Wait(frame.HEADER_BYTES)
#: How far one step looks for the next header, so that rubbish made of false beginnings costs no more than any.
_SEARCH_BYTES: Final = 4096


def may_jump(header: FrameHeader, table: Table, next_sequence: int) -> bool:
    """Whether a frame that is not the next one may follow all the same.

    A gap alone is no reason: the ladder says GAP too, in order, and what it leaves behind is still to come.
    """
    first = header.first_sequence
    return first > next_sequence and frame.may_begin_anew(first) and frame.begins_anew(table)


class Intake:
    """One connection's place in its machine's stream.

    `next_sequence` is the sequence wanted next; `is_seeking` says that it was asked for again and did not come yet.
    """

    def __init__(self, machine_id: uuid.UUID, next_sequence: int) -> None:
        self.next_sequence = next_sequence
        self._machine_id = machine_id
        self.is_seeking = False
        self._begun: FrameHeader | None = None
        self._skip = 0  # bytes of a frame that is being dropped and was not all there

    def step(self, data: memoryview, start: int) -> Step:
        """Look at the bytes from `start` to the end of `data` (never empty) and say what to do with them."""
        there = len(data) - start
        if self._skip:
            count = min(self._skip, there)
            self._skip -= count
            return Drop(count)
        if self._begun is None:
            return self._begin(data, start)
        if there < self._begun.frame_bytes:
            return Wait(self._begun.frame_bytes)
        header, self._begun = self._begun, None
        return self._whole(data, start, header)

    def _begin(self, data: memoryview, start: int) -> Step:
        there = len(data) - start
        try:
            header = frame.read_header(data, start)
        except CorruptionError as error:
            return self._lost(data, start, error)
        if header is None:
            return _WAIT_HEADER
        if header.machine_id is not self._machine_id:  # headers of one machine share the object, so this is quick
            if header.machine_id != self._machine_id:
                return self._unwanted(header, there, f"a frame of machine {header.machine_id} came")
            self._machine_id = header.machine_id
        if header.next_sequence <= self.next_sequence:
            # Received before: a repeat may overlap with what was under way, and asking again would go round in circles.
            return self._skipped(header, there)
        if header.first_sequence < self.next_sequence:
            return self._unwanted(header, there, self._disorder(header))
        self._begun = header
        return Begin(header)

    def _whole(self, data: memoryview, start: int, header: FrameHeader) -> Step:
        try:
            found = frame.read_body(header, data, start)
        except CorruptionError as error:
            return self._unwanted(header, header.frame_bytes, error.message, again=self._is_repeat(header))
        if header.first_sequence != self.next_sequence:
            if not may_jump(header, found.table, self.next_sequence):
                return self._unwanted(header, header.frame_bytes, self._disorder(header), again=self._is_repeat(header))
            if self.is_seeking:
                return Part(header.frame_bytes, f"the stream begins anew while sequence {self.next_sequence} is sought")
        self.is_seeking = False
        self.next_sequence = header.next_sequence
        return Accept(header)

    def _disorder(self, header: FrameHeader) -> str:
        return f"sequence {header.first_sequence} came where {self.next_sequence} was due"

    def _is_repeat(self, header: FrameHeader) -> bool:
        """Whether this is what was asked for: then asking was answered, and badly."""
        anew = header.first_sequence > self.next_sequence and frame.may_begin_anew(header.first_sequence)
        return header.first_sequence == self.next_sequence or anew

    def _unwanted(self, header: FrameHeader, there: int, why: str, *, again: bool = False) -> Drop:
        """Drop the frame of this header; ask for the right one, unless that was asked already and not yet answered."""
        return self._dropped(self._skipped(header, there).count, why, again=again)

    def _skipped(self, header: FrameHeader, there: int) -> Drop:
        count = min(header.frame_bytes, there)
        self._skip = header.frame_bytes - count
        return Drop(count)

    def _lost(self, data: memoryview, start: int, error: CorruptionError) -> Drop:
        """No header here: drop up to where the next one may begin."""
        near = bytes(data[start + 1 : start + 1 + _SEARCH_BYTES])
        found = near.find(frame.MAGIC)
        # What may be the beginning of a magic that is cut off stays.
        count = found + 1 if found >= 0 else max(1, len(near) + 1 - len(frame.MAGIC) + 1)
        return self._dropped(count, error.message)

    def _dropped(self, count: int, why: str, *, again: bool = False) -> Drop:
        resend = "" if self.is_seeking and not again else why
        self.is_seeking = True
        return Drop(count, resend)
