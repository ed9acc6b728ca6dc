"""One NBD client's requests, carried out where they lie: the agent's hot path, and the one place where its bytes move.

The socket's bytes are received straight into the change log's open frame (or, when the log is full, into a scratch area
of the same shape), so a write is not copied in this process; `pwrite` takes it from there to the disk. Copied are only
what arrived of an unfinished request when a frame is sealed (at most one request), and the answers to reads.

Order of things for a write: its region recorded as touched (once in a while; only this connection waits for that), its
descriptor into the log, its bytes to the disk (`writing`), the answer. A client that breaks the protocol is hung up on;
that loses nothing that was acknowledged.

Weak: reads, writes and hole punching run on the event loop's thread; a slow disk stalls the other disks of the agent.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from typing import Final, Protocol, cast

from mobility_agent.capture.disk import Disk
from mobility_agent.capture.host import Host
from mobility_agent.capture.peers import has_left
from mobility_agent.capture.reading import Reader, invalid
from mobility_agent.capture.writing import Writer
from replicar.formats.frame import SECTOR_BYTES, Kind
from replicar.nbd import protocol as nbd
from replicar.nbd.greeting import ANSWER_BYTES, Greeting
from replicar.nbd.protocol import REPLY, REPLY_MAGIC, REQUEST, REQUEST_MAGIC, Command, CommandFlag, Errno

_log = logging.getLogger(__name__)
_HEADER_BYTES: Final = REQUEST.size
_UNALIGNED: Final = SECTOR_BYTES - 1
_ZEROING: Final = (Command.TRIM, Command.WRITE_ZEROES)
# Plain numbers: on the path of every request an enumeration's lookup, or its `&`, costs as much as the rest of a line.
_NBD_WRITE: Final = int(Command.WRITE)
_FUA: Final = int(CommandFlag.FUA)
_WRITE: Final = int(Kind.WRITE)


class NbdHost(Host, Protocol):
    """What a connection needs of the server it belongs to."""

    disks: Mapping[str, Disk]
    exports: Mapping[str, int]
    tls: ssl.SSLContext | None

    def admit(self, connection: Connection) -> bool: ...
    def forget(self, connection: Connection) -> None: ...


class _LargeWrite:
    """A write of more than 1 MiB, taken in pieces as it arrives."""

    __slots__ = ("error", "flags", "handle", "offset", "remaining")

    def __init__(self, handle: int, flags: int, offset: int, remaining: int, error: int) -> None:
        self.handle, self.flags, self.offset, self.remaining, self.error = handle, flags, offset, remaining, error


class Connection(asyncio.BufferedProtocol):
    """Handshake, then requests. An `Owner` of the change log's open frame."""

    def __init__(self, host: NbdHost, tls: nbd.Tls = nbd.Tls.NONE) -> None:
        self.parsed = 0
        self._host = host
        self._ladder, self._log = host.ladder, host.ladder.log
        self._greeting: Greeting | None = Greeting(self, nbd.Handshake(host.exports, tls), host.tls)
        self._reader: Reader
        self._hall = memoryview(bytearray(4096))  # the handshake's bytes
        self._carry = b""  # received and not parsed, while the open frame is somebody else's
        self._needed = 0  # bytes that the unfinished request at the end still lacks
        self._large: _LargeWrite | None = None
        self._answers: list[bytes] = []
        self._answer_bytes = 0
        self._paused = self._recording = self._closing = False
        self._holding = host.ladder.gate.is_closed
        self._disk: Disk
        self._writer: Writer
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it
        transport.set_write_buffer_limits(high=ANSWER_BYTES)
        if self._host.admit(self):
            assert self._greeting is not None
            self._greeting.begin(transport)
        else:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        if self._greeting is not None:
            self._greeting.end()
        self._host.forget(self)
        self._log.disown(self)

    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._resume()

    def hold(self) -> None:
        """Carry out nothing more until `resume`."""
        self._holding = True
        if self._greeting is None:
            self._transport.pause_reading()

    def resume(self) -> None:
        self._holding = False
        self._resume()

    def recorded(self, error: OSError | None) -> None:
        """The region that a request waited for is recorded as touched, or can't be."""
        self._recording = False
        if error is not None:
            self._hang_up(f"can't be served: a touched region can't be recorded ({error})")
        self._resume()

    def _resume(self) -> None:
        if self._closing or self._paused or self._recording or self._holding:
            return
        # What a client had sent and left was never answered, and by now another write may stand where it would go: that
        # of the same application, come back over another connection.
        if self._greeting is None and has_left(self._transport):
            self._hang_up("left while it was held")
            return
        self._transport.resume_reading()
        if self._greeting is None and self._log.buffer(self, 0) is None:
            self._claim()
        if self._greeting is None:
            self._process()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._greeting is not None:
            return self._hall
        room = self._log.buffer(self, self._needed)
        if room is None:
            self._claim()
            room = self._log.buffer(self, self._needed)
            assert room is not None, "a fresh frame has room for any request"
        return room

    def buffer_updated(self, count: int) -> None:
        if self._greeting is not None:
            self._greeting.received(bytes(self._hall[:count]))
        else:
            self._log.free += count
            self._process()

    def release(self, unparsed: bytes) -> None:
        self._carry = unparsed

    def answer(self, handle: int, error: int) -> None:
        """Answer a request that was waiting for a flush."""
        if not self._closing:
            self._transport.write(REPLY.pack(REPLY_MAGIC, error, handle))

    def close(self) -> None:
        self._closing = True
        self._transport.close()

    def secured(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def chose(self, chosen: nbd.Chosen, rest: bytes) -> None:
        self._disk = self._host.disks[chosen.export]
        self._reader = Reader(self._disk, chosen)
        self._writer = Writer(self._ladder, self._disk)
        self._greeting, self._carry = None, rest
        if rest:
            self._claim()
            self._process()

    def _claim(self) -> None:
        self._log.disown(self)  # what is unparsed moves along, by way of `release`
        carry, self._carry = self._carry, b""
        self._ladder.claim(self, carry)

    def _process(self) -> None:
        if self._holding:
            self._transport.pause_reading()
            return
        while self._requests():
            self._claim()  # the frame's table is full: go on in the next one
        self._log.batch_done()
        self._ladder.declare()
        self._send()

    def _requests(self) -> bool:
        """Carry out every whole request in the open frame. True: stopped only because its table is full."""
        log, unpack = self._log, REQUEST.unpack_from
        data, end, at = log.data, log.free, self.parsed
        time_ns, left = log.now_ns(), log.descriptors_left
        self._needed = 0
        while end - at >= _HEADER_BYTES or self._large is not None:
            if not left or self._paused or self._recording or self._closing:
                break
            if self._large is not None:
                taken = self._large_piece(self._large, at, end, time_ns)
                if not taken and self._large is not None:
                    break
                left, at = left - 1, at + taken
                continue
            magic, flags, kind, handle, offset, length = unpack(data, at)
            if magic != REQUEST_MAGIC:
                self._hang_up("sends no request where one belongs")
            elif kind == _NBD_WRITE and length <= nbd.PREFERRED_MAX_BYTES:
                following = at + _HEADER_BYTES + length
                if following > end:
                    self._needed = following - end
                    break
                error = self._invalid(offset, length)
                if not error and not self._may_touch(offset, length):
                    break
                if not error:
                    error = self._writer.change(_WRITE, offset, length, at + _HEADER_BYTES, time_ns)
                self._done(handle, flags, error)
                left, at = left - 1, following
            elif kind == _NBD_WRITE:
                self._begin_large(handle, flags, offset, length)
                at += _HEADER_BYTES
            elif kind in _ZEROING and not self._invalid(offset, length) and not self._may_touch(offset, length):
                break
            else:
                self._other(kind, flags, handle, offset, length, time_ns)
                left, at = left - 1, at + _HEADER_BYTES
        self.parsed = at
        return not left

    def _other(self, kind: int, flags: int, handle: int, offset: int, length: int, time_ns: int) -> None:
        if kind == Command.READ:
            self._answers += self._reader.read(flags, handle, offset, length)
            self._answer_bytes += length
            if self._answer_bytes > ANSWER_BYTES:
                self._send()  # may pause this connection, and then no further request is carried out
        elif kind == Command.BLOCK_STATUS and self._reader.tells_allocation:
            self._answers += self._reader.allocation(flags, handle, offset, length)
        elif kind == Command.FLUSH:
            self._host.flush_soon(self, self._disk, handle)
        elif kind in _ZEROING:
            error = self._invalid(offset, length) or self._writer.change(Kind.ZERO, offset, length, 0, time_ns)
            self._done(handle, flags, error)
        elif kind == Command.DISC:
            self._send()
            self.close()
        else:
            self._done(handle, 0, Errno.EINVAL)

    def _may_touch(self, offset: int, length: int) -> bool:
        """Whether a range may be written now; else it will be when its regions are recorded, and this goes on then."""
        if self._writer.may_touch(offset, length):
            return True
        self._recording = True
        self._transport.pause_reading()
        self._host.record_soon(self, self._disk, offset, length)
        return False

    def _begin_large(self, handle: int, flags: int, offset: int, length: int) -> None:
        if length > nbd.MAX_REQUEST_BYTES:
            self._hang_up(f"writes {length} bytes at once; {nbd.MAX_REQUEST_BYTES} is the limit")
        else:
            self._large = _LargeWrite(handle, flags, offset, length, self._invalid(offset, length))

    def _large_piece(self, large: _LargeWrite, at: int, end: int, time_ns: int) -> int:
        """Do one piece of a large write; the bytes taken, 0 when more has to arrive first."""
        available = min(end - at, large.remaining, nbd.PREFERRED_MAX_BYTES)
        piece = available if large.error else available & ~_UNALIGNED
        if not piece:
            self._needed = min(large.remaining, SECTOR_BYTES) - (end - at)
            return 0
        if not large.error and not self._may_touch(large.offset, piece):
            return 0
        if not large.error:
            large.error = self._writer.change(Kind.WRITE, large.offset, piece, at, time_ns)
        large.offset += piece
        large.remaining -= piece
        if not large.remaining:
            self._large = None
            self._done(large.handle, large.flags, large.error)
        return piece

    def _done(self, handle: int, flags: int, error: int) -> None:
        if flags & _FUA and not error:
            self._host.flush_soon(self, self._disk, handle)
        else:
            self._answers.append(REPLY.pack(REPLY_MAGIC, error, handle))

    def _send(self) -> None:
        answers, self._answers, self._answer_bytes = self._answers, [], 0
        if answers and not self._transport.is_closing():
            self._transport.write(b"".join(answers))

    def _invalid(self, offset: int, length: int) -> int:
        return invalid(self._disk, offset, length)

    def _hang_up(self, why: str) -> None:
        _log.warning("an NBD client of disk %s %s: hanging up", self._disk.name, why)
        self._closing = True
        self._transport.abort()
