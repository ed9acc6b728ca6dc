"""Port 9443: machines connect with their certificates, say HELLO, and send frames; they are told how far these got.

The transport decrypts into what `get_buffer` returns, which is a scratch buffer until WELCOME and whatever the
`Receiver` says from then on.

Bounds: a connection must finish TLS and say HELLO in time; a HELLO waits only so long for its machine's log to be
opened; acknowledgements are the newest numbers, never a queue.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import uuid
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, cast

from process_server.machine import Machine, MachineFinder
from process_server.receiver import Receiver
from process_server.slots import Slots
from replicar.errors import CorruptionError, PermanentError, ReplicarError, TransientError
from replicar.formats import wire
from replicar.formats.wire import Ack, Hello, Message, Refusal, Welcome
from replicar.tls import PeerIdentity, Role, peer_identity

#: HELLO takes up to 16 KiB and a header; frames of a machine without a slot land here too.
SCRATCH_BYTES: Final = 32 << 10
#: What TLS may hold undecrypted of one connection that is not read from: a thousand wait when storage is slow. (The
#: event loop's own limit is 256 KiB, and it takes as much again before it looks.)
UNREAD_BYTES: Final = 16 << 10
HELLO_SECONDS: Final = 10.0
#: How long a HELLO waits for its machine to be assigned here: the agent may have heard of it first.
ASSIGNMENT_SECONDS: Final = 3.0
ASSIGNMENT_CHECK_SECONDS: Final = 0.1
#: How long a HELLO waits for its machine's log; well below wire.SILENCE_SECONDS.
WELCOME_SECONDS: Final = 10.0
#: An acknowledgement waits this long for others to join it, and comes no sooner than so long after the last one. One
#: that says *received* alone waits longer: the agent lets go of nothing by it, and *stored* mostly follows soon.
ACK_PAUSE_SECONDS: Final = 0.005
RECEIVED_PAUSE_SECONDS: Final = 0.25
ACK_SPACING_SECONDS: Final = 0.02
#: A peer that vanished without a word is noticed after 30 + 3 x 10 s.
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


class State(Enum):
    INTRODUCING = auto()  # HELLO is to come
    ANSWERING = auto()  # WELCOME is to be said
    STREAMING = auto()
    CLOSED = auto()


class Connection(asyncio.BufferedProtocol):
    """One agent's connection.

    Args:
        find: the machine of a verified id, or None.
        now: monotonic seconds.
        came: told when the connection stands, and of which party; raises what it is refused with.
        gone: told when the connection is over.
    """

    def __init__(
        self,
        find: MachineFinder,
        slots: Slots,
        now: Callable[[], float],
        came: Callable[[Connection, uuid.UUID], None] = lambda _connection, _peer: None,
        gone: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self.state = State.INTRODUCING
        self.peer: PeerIdentity | None = None
        self._find, self._slots, self._now, self._came, self._gone = find, slots, now, came, gone
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._machine: Machine | None = None
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._scratched = 0
        self._receiver: Receiver | None = None
        self._acknowledged = (0, 0)
        self._acknowledged_at = 0.0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._can_write = True

    # --- transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _keep_alive(self._transport)
        _hold_little(self._transport)
        try:
            ssl_object = cast(ssl.SSLObject | None, transport.get_extra_info("ssl_object"))
            self.peer = peer_identity(ssl_object)
            self._came(self, self.peer.id)
            if self.peer.role is not Role.MACHINE:
                raise PermanentError(
                    f"a {self.peer.role} does not send a stream here", hint="only machines do: `mobility-agent run`"
                )
        except ReplicarError as error:
            self.refuse(error)
            return
        self._deadline = self._loop.call_later(HELLO_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._gone(self)

    def eof_received(self) -> bool | None:
        return None  # TLS has no half-open connections

    def pause_writing(self) -> None:
        self._can_write = False

    def resume_writing(self) -> None:
        self._can_write = True
        self.progress()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._receiver is not None:
            buffer = self._receiver.buffer()
            return self._scratch if buffer is None else buffer
        # A closed connection's bytes go nowhere; there must be room for them all the same.
        return self._scratch[self._scratched :] or self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._receiver is not None:
            self._receiver.received(nbytes, self._scratch)
        elif self.state is State.INTRODUCING:
            self._scratched += nbytes
            self._introduce()
        elif self.state is State.ANSWERING:
            self.refuse(CorruptionError("frames came before WELCOME", hint="upgrade the agent"))

    # --- the machine's side ---

    def welcome(self, welcome: Welcome) -> None:
        assert self._machine is not None
        assert self._transport is not None
        self._cancel_deadline()
        self._receiver = Receiver(self._machine, self, self._slots, self._now, welcome.next_sequence)
        self.state = State.STREAMING
        self.say(welcome)
        self._acknowledge_later(wire.ACK_INTERVAL_SECONDS)
        self.resume()

    def progress(self) -> None:
        if self._receiver is None:
            return
        received, stored = self._receiver.progress()
        if (received, stored) == self._acknowledged:
            return
        if stored == self._acknowledged[1]:
            self._acknowledge_later(RECEIVED_PAUSE_SECONDS)
        else:
            soonest = self._acknowledged_at + ACK_SPACING_SECONDS - self._loop.time()
            self._acknowledge_later(max(ACK_PAUSE_SECONDS, soonest))
            self._receiver.stored()

    def refuse(self, error: ReplicarError) -> None:
        if self.state is State.CLOSED:
            return
        self.say(Refusal(type(error).__name__, error.message, error.hint))
        self._end()
        if self._transport is not None:
            self._transport.close()

    # --- HELLO ---

    def _introduce(self) -> None:
        try:
            found = wire.read_message(self._scratch[: self._scratched])
            if found is None:
                if self._scratched == SCRATCH_BYTES:
                    raise CorruptionError("a HELLO that does not end")
                return
            hello, end = found
            if not isinstance(hello, Hello) or end != self._scratched:
                raise CorruptionError("the first message is no HELLO alone", hint="upgrade the agent")
            self._attach(hello)
        except ReplicarError as error:
            self.refuse(error)

    def _attach(self, hello: Hello) -> None:
        assert self.peer is not None
        if hello.machine_id != self.peer.id:
            raise PermanentError(
                f"HELLO of machine {hello.machine_id} came with the certificate of machine {self.peer.id}",
                hint="enrol the agent again: `mobility-agent enrol`",
            )
        self._scratched = 0
        self.state = State.ANSWERING
        self.pause()
        self._find_machine(hello, self._loop.time() + ASSIGNMENT_SECONDS)

    def _find_machine(self, hello: Hello, give_up: float) -> None:
        self._cancel_deadline()
        machine = self._find(hello.machine_id)
        if machine is not None:
            self._machine = machine
            self._deadline = self._loop.call_later(WELCOME_SECONDS, self._too_late)
            machine.attach(self, hello)
        elif self._loop.time() < give_up:
            self._deadline = self._loop.call_later(ASSIGNMENT_CHECK_SECONDS, self._find_machine, hello, give_up)
        else:
            self.refuse(
                PermanentError(
                    f"machine {hello.machine_id} is not assigned to this process server",
                    hint="protect it with `replicar protect NAME`, or see `replicar machines` for where it belongs",
                )
            )

    def _too_late(self) -> None:
        if self._machine is not None:
            self.refuse(self._machine.waiting_error())
        else:
            self.refuse(TransientError(f"no HELLO within {HELLO_SECONDS:g} s"))

    # --- acknowledging ---

    def _acknowledge_later(self, seconds: float) -> None:
        if self._ack_timer is not None:
            if self._ack_timer.when() <= self._loop.time() + seconds:
                return
            self._ack_timer.cancel()
        self._ack_timer = self._loop.call_later(seconds, self._acknowledge)

    def _acknowledge(self) -> None:
        self._ack_timer = None
        if self._receiver is None:
            return
        if self._can_write:
            self._acknowledged, self._acknowledged_at = self._receiver.progress(), self._loop.time()
            self.say(Ack(*self._acknowledged))
            self._receiver.nudge()
        self._acknowledge_later(wire.ACK_INTERVAL_SECONDS)

    # --- the receiver's side, and the end ---

    def pause(self) -> None:
        """Read nothing for now."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None:
            self._transport.resume_reading()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have `call` called so much later; it finds out itself whether that still matters."""
        self._loop.call_later(seconds, call)

    def say(self, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.pack_message(message))

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        """No more of this connection, whoever ended it."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._cancel_deadline()
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()
        if self._machine is not None:
            self._machine.detach(self)


def _hold_little(transport: asyncio.Transport) -> None:
    """Leave what comes in the kernel's hands while nothing is read; only TLS transports hold anything."""
    limit = getattr(transport, "set_read_buffer_limits", None)
    if limit is not None:
        limit(high=UNREAD_BYTES)


def _keep_alive(transport: asyncio.Transport) -> None:
    connected = transport.get_extra_info("socket")
    if connected is None:
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
