"""Where received bytes move: from the transport into the slot that is cached and sealed, parsed there, in place.

Bytes are copied only

- when a slot is full: the beginning of the next frame, which came with the end of the last one (256 KiB at most);
- when a machine was idle and has no slot: its first read, from a scratch buffer (32 KiB at most);
- when there is no slot or buffer to be had: those same bytes, kept aside until there is.

Counted over the whole server, by libraries and never by Python, each byte is copied:

    in     from the kernel to OpenSSL, within it twice (the loop's TLS has memory in between), decrypted into the slot
    cache  not at all: O_DIRECT takes it from the slot
    seal   zstd reads the slot and writes what is left into memory of its own; AES-GCM writes that to its place in the
           segment
    out    TLS encrypts from there, record by record, into the kernel (`replicar.storage.line`)

The two in OpenSSL are the loop's price for many connections on one thread; measured, a blocking socket's extra system
calls cost as much. All others change the bytes, or cross into another's memory.

When there is no slot to be had, reading stops, and with it, by TCP, the agent; nothing is dropped.

It stops for a moment too, between two slots, while storing has enough to go on with and does go on: what is received
far ahead goes through cold memory, and when that runs out is read back and verified again. It stops for a moment only:
where storage is the slower one, or stands still, the cache is what takes the difference.

Bounds: a connection may make us ask for so many repeats, and have us drop so many bytes while it finds its place again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from process_server.intake import Accept, Begin, Drop, Intake, Part, Wait
from process_server.machine import Machine
from process_server.slots import Slots
from process_server.stream import Slot, Stream
from replicar.errors import CorruptionError, ReplicarError, TransientError
from replicar.formats import frame
from replicar.formats.frame import first_time_ns
from replicar.formats.wire import Message, Resend

#: A connection that needs more repeats than this is not an accident.
MAX_RESENDS: Final = 16
#: Asked for and not come: ask again.
REPEAT_SECONDS: Final = 5.0
#: What may be dropped while waiting for a repeat: what was under way, and a good deal more.
MAX_DROPPED_BYTES: Final = 64 << 20
#: How long storing may take to catch up by something, before receiving goes on without it.
PATIENCE_SECONDS: Final = 0.25


class Line(Protocol):
    """The connection, as far as a receiver knows it."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def say(self, message: Message) -> None: ...

    def refuse(self, error: ReplicarError) -> None: ...

    def later(self, seconds: float, call: Callable[[], None]) -> None: ...


class Receiver:
    """One connection's receiving end, from WELCOME on.

    Args:
        now: monotonic seconds.
        wanted: what WELCOME asked for; beyond the stream's own next sequence when the agent's log begins anew.
    """

    def __init__(self, machine: Machine, line: Line, slots: Slots, now: Callable[[], float], wanted: int) -> None:
        assert machine.stream is not None
        self._machine, self._line, self._slots, self._now = machine, line, slots, now
        self._stream: Stream = machine.stream
        self._intake = Intake(machine.assignment.machine_id, self._stream.next_sequence)
        self._wanted = wanted
        self._aside = b""  # received, and in no slot
        self._is_blocked = False  # there is no slot to receive into
        self._is_waiting = False  # there may be one, but storing is to catch up first
        self._is_timing = False  # how long that takes
        self._outwaited = -1  # what was stored when waiting for more of it was in vain
        self._is_closed = False
        self._needed = 1  # unparsed bytes before which parsing has nothing to do
        self._resends = 0
        self._asked = 0.0  # when
        self._paused_at: float | None = None
        self._dropped = 0

    def progress(self) -> tuple[int, int]:
        """Received and stored, as an acknowledgement says them."""
        return self._stream.received_sequence, self._stream.stored_sequence

    def nudge(self) -> None:
        """Called now and then: ask again for what was asked for and never came (its header may be what is damaged)."""
        if self._intake.is_seeking and self._now() >= self._asked + REPEAT_SECONDS:
            self._ask("it has not come yet")

    def stored(self) -> None:
        """Something may have been stored."""
        if self._is_waiting and not self._should_wait():
            self._unblock()

    def buffer(self) -> memoryview | None:
        """Where the next bytes go; None for a scratch buffer, of which they are copied."""
        slot = self._stream.open_slot
        return slot.buffer[slot.filled :] if slot is not None and slot.buffer is not None else None

    def received(self, count: int, scratch: memoryview) -> None:
        """So many bytes came to where `buffer` said, or into `scratch`."""
        slot = self._stream.open_slot
        if slot is not None:
            slot.filled += count
            self._parse(slot)
        elif self._is_blocked:
            self._aside += bytes(scratch[:count])  # what the transport had decrypted already
        else:
            self._place(bytes(scratch[:count]))

    def close(self) -> None:
        """The connection is over; half a frame is nobody's."""
        self._is_closed, self._is_waiting, self._aside = True, False, b""
        self._count_pause()
        slot = self._stream.open_slot
        if slot is not None:
            slot.filled = slot.parsed

    def _place(self, data: bytes) -> None:
        """Bytes that are in no slot: find one for them, or stop reading until there is one."""
        slot = self._slots.take(self._stream)
        if slot is None:
            self._block(data)
            return
        self._stream.open(slot)
        _fill(slot, data)
        self._parse(slot)

    def _block(self, data: bytes) -> None:
        self._aside, self._is_blocked = data, True
        self._pause()
        self._slots.wait(self._stream, self._unblock)

    def _should_wait(self) -> bool:
        return self._stream.is_ahead and self._stream.stored_sequence != self._outwaited

    def _wait(self, data: bytes) -> None:
        """Let storing catch up by a segment, if it does so soon."""
        self._aside, self._is_blocked, self._is_waiting = data, True, True
        self._pause()
        if not self._is_timing:
            self._time()

    def _time(self) -> None:
        self._is_timing = True
        self._line.later(PATIENCE_SECONDS, partial(self._timed, self._stream.stored_sequence))

    def _timed(self, stored: int) -> None:
        self._is_timing = False
        if self._is_waiting and self._stream.stored_sequence == stored:
            self._outwaited = stored
            self._unblock()
        elif self._is_waiting:
            self._time()

    def _unblock(self) -> None:
        if self._is_closed or not self._is_blocked:
            return
        data, self._aside, self._is_blocked, self._is_waiting = self._aside, b"", False, False
        self._place(data)
        if not self._is_blocked:
            self._count_pause()
            self._line.resume()

    def _pause(self) -> None:
        """Read nothing from here on."""
        if self._paused_at is None:
            self._paused_at = self._now()
            self._machine.counters.waits += 1
        self._line.pause()

    def _count_pause(self) -> None:
        if self._paused_at is not None:
            self._machine.counters.waited_seconds += self._now() - self._paused_at
            self._paused_at = None

    def _parse(self, slot: Slot) -> None:
        """Take whole frames out of the slot's unparsed bytes, in place. The hot path."""
        intake, stream, counters = self._intake, self._stream, self._machine.counters
        assert slot.buffer is not None
        at, frames, news, now = slot.parsed, 0, False, 0.0
        while slot.filled - at >= self._needed:
            step = intake.step(slot.buffer[: slot.filled], at)
            self._needed = 1
            if isinstance(step, Accept):
                now = now or self._now()
                if stream.append(step.header, now):  # once a segment
                    news = True
                    stream.began(first_time_ns(slot.buffer, at, step.header))
                counters.bytes_received += step.header.frame_bytes
                frames, at, self._dropped = frames + 1, slot.parsed, 0
            elif isinstance(step, Begin):
                at = _close_up(slot, at)
                if not stream.has_room(step.header):
                    following = self._roll(slot)
                    if following is None:
                        break
                    slot, at = following, 0
                    assert slot.buffer is not None
            elif isinstance(step, Drop):
                at += step.count
                self._note(step)
            elif isinstance(step, Wait):
                self._needed = step.count
            elif isinstance(step, Part):
                # It lies right behind what is parsed, in a page that is written whole: a next life may not take it up.
                assert slot.buffer is not None
                slot.buffer[at : at + len(frame.MAGIC)] = bytes(len(frame.MAGIC))
                at += step.count
                self._part(step.why)
            if self._is_closed:
                break
        if not self._is_blocked and not self._is_closed:
            _close_up(slot, at)
        if frames:
            counters.frames += frames
            self._machine.received(news=news)

    def _roll(self, slot: Slot) -> Slot | None:
        """Go on in another slot, with what is unparsed in this one; None if there is none (reading stops then)."""
        assert slot.buffer is not None
        rest = slot.buffer[slot.parsed : slot.filled]
        waits = self._should_wait()
        following = None if waits else self._slots.take(self._stream)
        if waits:
            self._wait(bytes(rest))
        elif following is None:
            self._block(bytes(rest))
        else:
            _fill(following, rest)
        self._stream.close()
        if following is not None:
            self._stream.open(following)
        self._slots.settle(self._stream, [slot])
        return following

    def _note(self, step: Drop) -> None:
        """Count what is dropped and ask for a repeat, or hang up when that was once too often."""
        counters = self._machine.counters
        counters.bytes_dropped += step.count
        self._dropped += step.count
        if step.resend:
            self._ask(step.resend)
        elif self._dropped > MAX_DROPPED_BYTES:
            self._give_up("other frames come instead")

    def _ask(self, why: str) -> None:
        self._resends += 1
        self._asked = self._now()
        self._machine.counters.resends += 1
        if self._resends > MAX_RESENDS:
            self._give_up(why)
        else:
            self._line.say(Resend(self._due(), why))

    def _give_up(self, why: str) -> None:
        name = self._machine.assignment.name
        self._line.refuse(
            CorruptionError(
                f"machine {name} does not send sequence {self._due()} sound and in order: {why}",
                hint="look at the agent's log; `mobility-agent status` shows what its change log holds",
            )
        )

    def _part(self, why: str) -> None:
        name = self._machine.assignment.name
        hint = "nothing to do: the agent connects again, and sends it in order"
        self._line.refuse(TransientError(f"machine {name}: {why}", hint=hint))

    def _due(self) -> int:
        return max(self._intake.next_sequence, self._wanted)


def _fill(slot: Slot, data: bytes | memoryview) -> None:
    assert slot.buffer is not None
    slot.buffer[: len(data)] = data
    slot.filled = len(data)


def _close_up(slot: Slot, at: int) -> int:
    """Move unparsed bytes from `at` to where the parsed ones end, over what was dropped; returns that place."""
    if at != slot.parsed:
        assert slot.buffer is not None
        rest = slot.filled - at
        slot.buffer[slot.parsed : slot.parsed + rest] = bytes(slot.buffer[at : slot.filled])
        slot.filled = slot.parsed + rest
    return slot.parsed
