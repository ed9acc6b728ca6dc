"""One connection: two ends, and a pipe each way.

A pipe takes bytes from its end's transport, cuts them into pieces wherever it likes, and brings them in order, after a
delay, as fast as the way allows. What the other end does not read stays in the pipe, up to a window, and then with the
writer, who is told to pause; so memory is bounded as it is with TCP.

Whatever a protocol is told, it is told in its own process's context, by a callback of its own; so a process that dies
in the middle of one is the only one that notices.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from simulator.world.processes import Process

if TYPE_CHECKING:
    from simulator.world.network import VirtualNetwork

#: Bytes that may be under way or wait at the other end.
WINDOW_BYTES: Final = 256 << 10
_PIECE_BYTES: Final = 64 << 10
_DEFAULT_HIGH: Final = 64 << 10
_TICK_SECONDS: Final = 1e-8


class Shown:
    """What TLS would know of the other end."""

    def __init__(self, certificate: dict[str, Any] | None) -> None:
        self._certificate = certificate

    def getpeercert(self) -> dict[str, Any] | None:
        return self._certificate


class Pipe:
    """From `source` to `target`."""

    def __init__(self, network: VirtualNetwork, source: End, target: End) -> None:
        self._network, self._source, self._target = network, source, target
        self._queue: deque[bytes] = deque()
        self.queued = 0
        self._under_way = 0
        self._free_at = self._last_at = 0.0
        self._held: deque[bytes | None] = deque()  # came while the way was shut; None: the end
        self._ends = False
        self._end_sent = False

    def put(self, data: bytes) -> None:
        self._queue.append(data)
        self.queued += len(data)
        self.pump()

    def finish(self) -> None:
        """Nothing comes behind what is queued."""
        self._ends = True
        self.pump()

    def drop(self) -> None:
        """Forget what was not sent."""
        self._queue.clear()
        self.queued = 0

    def pump(self) -> None:
        """Send what may be sent."""
        network, source, target = self._network, self._source.process.machine.name, self._target.process.machine.name
        if not network.is_open(source, target):
            return
        while self._held:
            self._deliver(self._held.popleft())
        draw, way = network.randomness, network.way(source, target)
        while self._queue and self._under_way < WINDOW_BYTES:
            piece = self._queue.popleft()
            most = _PIECE_BYTES if draw.random() < 0.8 else draw.randint(1, _PIECE_BYTES)
            if len(piece) > most:
                self._queue.appendleft(piece[most:])
                piece = piece[:most]
            self.queued -= len(piece)
            self._send(piece, len(piece) / way.bytes_per_second, way.delay_seconds * draw.uniform(0.8, 1.5))
        if self._ends and not self._queue and not self._end_sent:
            self._end_sent = True
            self._send(None, 0.0, way.delay_seconds)
        self._source.drained()

    def read(self, count: int) -> None:
        """The other end has read so many."""
        self._under_way -= count
        if self._queue or self._source.is_paused:
            self._network.loop.call_soon(self.pump, context=self._source.process.context)

    def _send(self, piece: bytes | None, busy: float, delay: float) -> None:
        loop = self._network.loop
        self._free_at = max(self._free_at, loop.time()) + busy
        # Later by a little, since timers of one moment go off in no order.
        self._last_at = max(self._last_at + _TICK_SECONDS, self._free_at + delay)
        self._under_way += 0 if piece is None else len(piece)
        loop.call_at(self._last_at, self._arrive, piece, context=self._target.process.context)

    def _arrive(self, piece: bytes | None) -> None:
        names = self._source.process.machine.name, self._target.process.machine.name
        if self._held or not self._network.is_open(*names):
            self._held.append(piece)
        else:
            self._deliver(piece)

    def _deliver(self, piece: bytes | None) -> None:
        target = self._target
        if not target.process.alive:
            if target.process.machine.is_up and piece:  # nobody knows of this connection there
                self._source.break_off(ConnectionResetError(104, "Connection reset by peer"))
            return
        self._network.loop.call_soon(target.receive, piece, context=target.process.context)


class End(asyncio.Transport):
    """A process's end of a connection, as a transport."""

    def __init__(self, network: VirtualNetwork, process: Process, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.process = process
        self.protocol = protocol
        self.peer: End
        self.out: Pipe
        self.is_closed = False  # no more callbacks but `connection_lost`
        self.is_paused = False
        self._network = network
        self._shown: Shown | None = None
        self._high, self._low = _DEFAULT_HIGH, _DEFAULT_HIGH // 4
        self._reading = True
        self._closing = False
        self._begun = False
        self._waiting: deque[bytes | None] = deque()
        self._lost = False

    def begin(self, peer: End, shown: Shown | None) -> None:
        """Both ends are there: the protocol hears of it."""
        self._shown = shown
        self._network.ends[self] = None
        self.process.ends[self] = None
        self._begun = True
        self.protocol.connection_made(self)
        self._read_on()

    # --- what asyncio's transports offer ---

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._shown
        if name == "peername":
            return self.peer.process.machine.name, 0
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self.is_closed:
            return
        self.process.call()
        self.out.put(bytes(data))
        if self.out.queued > self._high and not self.is_paused:
            self.is_paused = True
            self.protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = _DEFAULT_HIGH if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self.out.queued

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            if self._waiting:
                self._network.loop.call_soon(self._read_on, context=self.process.context)

    def is_reading(self) -> bool:
        return self._reading

    def is_closing(self) -> bool:
        return self._closing or self.is_closed

    def can_write_eof(self) -> bool:
        return False

    @property
    def is_left(self) -> bool:
        """Whether the other end has closed, whatever it sent before and was not read."""
        return None in self._waiting

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def close(self) -> None:
        """Send what was written, then end."""
        if self.is_closing():
            return
        self._closing = True
        self.out.finish()
        self._lose(None)

    def abort(self) -> None:
        """End now."""
        if self.is_closed:
            return
        self.out.drop()
        self.out.finish()
        self._lose(None)

    # --- what the network tells ---

    def receive(self, piece: bytes | None) -> None:
        if self.is_closed:
            if piece:
                self.peer.out.read(len(piece))
            return
        self._waiting.append(piece)
        if self._begun:
            self._read_on()

    def drained(self) -> None:
        """The pipe took something."""
        if self.is_paused and self.out.queued <= self._low and not self.is_closed:
            self.is_paused = False
            self._network.loop.call_soon(self._resume, context=self.process.context)

    def break_off(self, error: Exception) -> None:
        """The connection is gone, whatever was under way."""
        if not self.is_closed:
            self.out.drop()
            self._lose(error)

    def process_died(self) -> None:
        """Its process is dead: the other end hears of it, unless the whole machine went."""
        self.is_closed = self._lost = True
        self._network.ends.pop(self, None)
        if not hasattr(self, "peer"):
            return
        self.out.drop()
        peer, loop = self.peer, self._network.loop
        if self.process.machine.is_up:
            self.out.finish()
        else:
            from simulator.world.network import KEEPALIVE_SECONDS

            gone = TimeoutError(110, "Connection timed out")
            loop.call_later(KEEPALIVE_SECONDS, peer.break_off, gone, context=peer.process.context)

    def _read_on(self) -> None:
        while self._waiting and self._reading and not self.is_closed:
            piece = self._waiting.popleft()
            if piece is None:
                self._end_of_stream()
                return
            try:
                self._feed(piece)
            except Exception as error:
                self._fatal(error)

    def _fatal(self, error: Exception) -> None:
        """A protocol failed: asyncio says so and hangs up."""
        context = {"message": f"a protocol of {self.process} failed", "exception": error, "transport": self}
        self._network.loop.call_exception_handler(context)
        self.out.drop()
        self.out.finish()
        self._lose(error)

    def _feed(self, piece: bytes) -> None:
        protocol = self.protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            self.peer.out.read(len(piece))
            protocol.data_received(piece)  # type: ignore[attr-defined]
            return
        done = 0
        while done < len(piece):
            if self.is_closed:
                break
            if not self._reading:
                self._waiting.appendleft(piece[done:])
                break
            buffer = memoryview(protocol.get_buffer(-1))
            count = min(len(buffer), len(piece) - done)
            buffer[:count] = piece[done : done + count]
            del buffer
            done += count
            protocol.buffer_updated(count)
        self.peer.out.read(done)

    def _end_of_stream(self) -> None:
        keep = self.protocol.eof_received()  # type: ignore[attr-defined]
        if not keep and not self.is_closed:
            self.out.finish()
            self._lose(None)

    def _resume(self) -> None:
        if not self.is_closed:
            self.protocol.resume_writing()

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self.is_closed = True
        self._waiting.clear()
        self._network.ends.pop(self, None)
        self.process.ends.pop(self, None)
        self._network.loop.call_soon(self._tell_lost, error, context=self.process.context)

    def _tell_lost(self, error: Exception | None) -> None:
        self.protocol.connection_lost(error)
