"""The sender: streams the change log to the assigned process server, and lets the log go when storage has it.

Each connection begins where the server says (WELCOME); between connections nothing is assumed. Received is not stored:
the log is trimmed by *stored* alone, so a process server may lose its machine, cache and all, and nothing is missing.

Sealing is driven by demand. While the sender is behind, frames fill up as large as they may. When it has caught up it
waits for a change, lets `seal_delay_seconds` of others gather, and seals what there is: an idle machine's change is
on its way in milliseconds, a busy machine sends large frames, and nobody has to tune that.

Bytes go from the mapped log to TLS without a copy in this process. A view of the log never outlives the step that
writes it, since trimming may unmap it at any await.

A server that asks for what this log can't give has another history of this machine. That is a ConflictError: nothing
is sent, both histories are shown, and it stays so until one of them changes. The one legal break is a log that began
anew, at a sequence that only such a log has, and with a gap: what it replaces was lost, and everything is to come.

Weak: frames that were sent may be lost from this log by a power cut before they were synced. The log then goes on at
numbers reserved for that, with a gap; it never sends other bytes under a number that it has used.
"""

from __future__ import annotations

import asyncio
import logging
import random
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from mobility_agent import link as connection
from mobility_agent.changelog import ChangeLog
from mobility_agent.link import Link
from mobility_agent.metrics import Metrics
from mobility_agent.retry import Backoff, first_of
from replicar.clock import Clock
from replicar.control.identity import Identity
from replicar.control.messages import AgentAssignment
from replicar.errors import ConflictError, CorruptionError, FencedError, ReplicarError, TransientError
from replicar.formats import frame, wire
from replicar.tls import client_context, reload_certificate

#: A server that keeps asking for the same frames has a fault that sending once more won't mend.
MAX_RESENDS: Final = 64
#: What the rate limit lets through at once after a pause.
BURST_SECONDS: Final = 0.25
#: A conversation this long was a good one: the next failure is the first again.
GOOD_SECONDS: Final = 10.0
_TIME_OFFSET: Final = 16  # of time_ns in a descriptor
_TIME = struct.Struct("<Q")

_log = logging.getLogger(__name__)


class SenderState(StrEnum):
    """What the sender is doing."""

    UNASSIGNED = "unassigned"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    WAITING = "waiting"  # for the next try; `error` says why
    FENCED = "fenced"  # until it is assigned elsewhere


@dataclass(frozen=True, slots=True)
class SenderStatus:
    """The sender at one moment. `error` is why the last conversation ended, None while all is well."""

    state: SenderState
    server: str
    error: ReplicarError | None
    position: int
    received_sequence: int
    stored_sequence: int

    def as_dict(self) -> dict[str, Any]:
        error = self.error.as_dict() if self.error is not None else None
        return {
            "state": str(self.state),
            "server": self.server,
            "error": error,
            "next_sequence": self.position,
            "received_sequence": self.received_sequence,
            "stored_sequence": self.stored_sequence,
        }


class Sender:
    """Sends one machine's stream, for as long as `run` runs.

    Args:
        log: the change log; the sender is the only one that trims it.
        identity: of this machine, saved; its certificate is shown to the server.
        seal_delay_seconds: how long changes gather when everything before them was sent.
        rate_limit_bytes_per_second: what may be sent; None for no limit.
        silence_seconds: without a word from the server for so long, the connection is given up.
    """

    def __init__(
        self,
        log: ChangeLog,
        identity: Identity,
        metrics: Metrics,
        clock: Clock,
        *,
        seal_delay_seconds: float = 0.005,
        rate_limit_bytes_per_second: int | None = None,
        silence_seconds: float = wire.SILENCE_SECONDS,
        backoff: Backoff | None = None,
        randomness: random.Random | None = None,
        software: str = "",
    ) -> None:
        self._log = log
        self._identity = identity
        self._metrics = metrics
        self._clock = clock
        self._context = client_context(identity)
        self._seal_delay = seal_delay_seconds
        self._rate = rate_limit_bytes_per_second
        self._silence = silence_seconds
        self._backoff = backoff or Backoff()
        self._randomness = randomness or random.Random()
        self._software = software
        self._assignment: AgentAssignment | None = None
        self._changed = asyncio.Event()
        self._rewound = asyncio.Event()
        self._state = SenderState.UNASSIGNED
        self._error: ReplicarError | None = None
        self._failures = 0
        self._position = log.first_sequence
        self._received = 0
        # What a log lost is not in it and not stored either, so such a log's beginning says nothing.
        self._stored = log.stored_sequence if log.survived else 0
        self._welcomed: asyncio.Future[wire.Welcome] | None = None
        self._resends = 0
        self._due = 0.0

    # --- what others ask and say ---

    @property
    def status(self) -> SenderStatus:
        server = connection.address(self._assignment) if self._assignment is not None else ""
        stored = self._stored
        received = max(self._received, stored)
        return SenderStatus(self._state, server, self._error, self._position, received, stored)

    def assign(self, assignment: AgentAssignment | None) -> None:
        """Send to this server from now on; a conversation with another one ends."""
        if assignment != self._assignment:
            _log.info("assigned to %s", connection.address(assignment) if assignment else "no process server")
            self._assignment = assignment
            self._failures = 0
            self._changed.set()

    def use_certificate(self, identity: Identity) -> None:
        """Show this renewed certificate from the next connection on."""
        self._identity = identity
        reload_certificate(self._context, identity)

    async def run(self) -> None:
        """Send for ever; cancel to stop. What fails is tried again, and shown in `status` until it works."""
        while True:
            self._changed.clear()
            assignment = self._assignment
            if assignment is None:
                self._state, self._error = SenderState.UNASSIGNED, None
                await self._changed.wait()
                continue
            self._state = SenderState.CONNECTING
            try:
                await first_of(self._converse(assignment), self._changed.wait())
            except ReplicarError as error:
                await self._recover(error)

    # --- one conversation ---

    async def _recover(self, error: ReplicarError) -> None:
        """Wait before the next try; a fenced sender waits until it is assigned elsewhere."""
        if self._error is None or self._error.message != error.message:
            _log.warning("not sending: %s", error)
        self._error = error
        self._failures += 1
        if isinstance(error, FencedError):
            self._state = SenderState.FENCED
            await self._changed.wait()
            return
        self._state = SenderState.WAITING
        delay = self._backoff.delay(self._failures, error, self._randomness)
        await first_of(self._clock.sleep(delay), self._changed.wait())

    async def _converse(self, assignment: AgentAssignment) -> None:
        self._welcomed = asyncio.get_running_loop().create_future()
        link = await connection.connect(assignment, self._context, self._receive, self._clock)
        try:
            self._metrics.connections += 1
            hello = wire.Hello(
                self._identity.id, self._log.first_sequence, self._log.next_sequence, software=self._software
            )
            link.write(link.session.hello(hello))
            await first_of(self._send_all(link, self._welcomed), link.ended(), link.silence(self._silence))
        finally:
            self._state = SenderState.CONNECTING
            await link.close()

    async def _send_all(self, link: Link, welcomed: asyncio.Future[wire.Welcome]) -> None:
        welcome = await welcomed
        self._position = self._begin_at(welcome)
        self._resends = 0
        self._state, self._error = SenderState.STREAMING, None
        good_at = self._clock.monotonic() + GOOD_SECONDS
        _log.info("sending from sequence %d", self._position)
        while True:
            await link.writable()
            sent = self._send_some(link)
            if not sent:
                await self._gather()
            elif self._rate is not None:
                await self._pace(sent, self._rate)
            else:
                await asyncio.sleep(0)  # the disks' clients come in between
            if self._failures and self._clock.monotonic() >= good_at:
                self._failures = 0

    def _send_some(self, link: Link) -> int:
        """Write what is sealed from the position on, up to about 1 MiB; how many bytes that was.

        The one place where the agent's bytes go out. The view of the log dies with this call.
        """
        data = self._log.take(self._position)
        if data is None:
            return 0
        size, offset, position = len(data), 0, self._position
        while offset < size:
            header = frame.read_header(data, offset)
            if header is None or (offset == 0 and header.first_sequence < position):
                raise self._inside_a_frame(position, header)
            position = header.next_sequence
            first_time_ns = _TIME.unpack_from(data, offset + header.table_offset + _TIME_OFFSET)[0]
            self._metrics.frame_sent(header.last_sequence, first_time_ns)
            offset += header.frame_bytes
        link.write(data)
        self._position = position
        self._metrics.sent(size)
        return size

    async def _gather(self) -> None:
        """Everything sealed was sent: wait for a change, let others join it, and seal them."""
        position = self._position
        if self._log.next_sequence <= position:
            self._rewound.clear()
            await first_of(self._log.wait_for(position), self._rewound.wait())
        await self._clock.sleep(self._seal_delay)
        if self._log.take(self._position) is None:
            self._log.seal()

    async def _pace(self, size: int, rate: int) -> None:
        now = self._clock.monotonic()
        self._due = max(self._due, now - BURST_SECONDS) + size / rate
        await self._clock.sleep(max(self._due - now, 0.0))

    # --- what the server says ---

    def _receive(self, message: wire.Message) -> None:
        """Act on a message at once.

        Raises:
            ReplicarError: the conversation is over.
        """
        match message:
            case wire.Welcome():
                self._acknowledge(None, message.stored_sequence)
                if self._welcomed is not None and not self._welcomed.done():
                    self._welcomed.set_result(message)
            case wire.Ack(received, stored):
                self._acknowledge(received, stored)
            case wire.Resend():
                self._go_back(message)
            case wire.Refusal():
                raise message.as_error()
            case wire.Hello():
                raise CorruptionError("the process server said HELLO, which is the agent's word")

    def _acknowledge(self, received: int | None, stored: int) -> None:
        following = self._log.next_sequence
        highest = max(stored, received or 0)
        if highest >= following:
            raise self._conflict(
                f"the process server has sequence {highest}, which this machine never captured", stored
            )
        if received is not None:
            if received > self._received:
                self._failures = 0
            self._received = received
        self._stored = max(self._stored, stored)
        if stored > self._log.stored_sequence:
            self._log.trim(stored)
            self._metrics.stored(stored, self._clock.now_ns())

    def _begin_at(self, welcome: wire.Welcome) -> int:
        """Where to begin.

        Raises:
            ConflictError: the server's history does not meet this log's.
        """
        wanted, first, following = welcome.next_sequence, self._log.first_sequence, self._log.next_sequence
        self._received = wanted - 1
        if first <= wanted <= following:
            return wanted
        if wanted < first and frame.may_begin_anew(first):
            return first  # an earlier log was lost; this one begins with a gap that says so
        raise self._conflict(f"the process server asks for sequence {wanted}", welcome.stored_sequence, wanted)

    def _go_back(self, message: wire.Resend) -> None:
        self._resends += 1
        self._metrics.resends += 1
        wanted = message.next_sequence
        _log.warning("the process server asks for sequence %d again: %s", wanted, message.reason)
        if self._resends > MAX_RESENDS:
            raise TransientError(
                f"the process server asked {self._resends} times to send again, lately because: {message.reason}",
                hint="look for a fault of the network between here and there",
                sequence=wanted,
            )
        if not self._log.first_sequence <= wanted <= self._position:
            raise self._conflict(
                f"the process server asks for sequence {wanted} again", self._log.stored_sequence, wanted
            )
        data = self._log.take(wanted)
        if data is not None:
            frame.read_frame(data)  # damaged in the log itself? sending it again would not help
        self._position = wanted
        self._rewound.set()

    # --- errors ---

    def _conflict(self, what: str, stored: int, wanted: int | None = None) -> ConflictError:
        log = self._log
        ours = {"first_sequence": log.first_sequence, "next_sequence": log.next_sequence, "stored": log.stored_sequence}
        theirs = {"next_sequence": wanted, "stored": stored}
        return ConflictError(
            f"{what}, but this machine's change log holds {log.first_sequence} up to {log.next_sequence - 1}",
            hint="two agents may share this machine's identity, or the state directory is an old copy; stop the wrong"
            " one, or enrol this machine again under its name, after which it is compared in full",
            ours=ours,
            theirs=theirs,
            machine=self._identity.name,
        )

    def _inside_a_frame(self, position: int, header: frame.FrameHeader | None) -> ReplicarError:
        if header is None:
            return CorruptionError("the change log ends within a frame", sequence=position)
        return self._conflict(
            f"the process server asks for sequence {position}, inside the frame from {header.first_sequence} on",
            self._log.stored_sequence,
            position,
        )
