"""One NBD client's requests, carried out where they lie: the agent's hot path, and the one place where its bytes move.

The socket's bytes are received straight into the change log's open frame (or, when the log is full, into a scratch area
of the same shape), so a write is not copied in this process; `pwrite` takes it from there to the disk. Copied are only
what arrived of an unfinished request when a frame is sealed (at most one request), and the answers to reads.

Order of things for a write: its region recorded as touched (once in a while; only this connection waits for that), its
descriptor into the log, its bytes to the disk, the answer. A disk that fails a write answers EIO to the client, and the
range is distrusted: a gap begins before the client learns of it. A client that breaks the protocol is hung up on; that
loses nothing that was acknowledged.

Weak: reads, writes and hole punching run on the event loop's thread; a slow disk stalls the other disks of the agent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, Protocol, cast

from mobility_agent.capture import nbd
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.nbd import REPLY, REPLY_MAGIC, REQUEST, REQUEST_MAGIC, Command, CommandFlag, Errno
from mobility_agent.ladder import Ladder
from mobility_agent.touched import TouchedRegions
from replicar.errors import CorruptionError
from replicar.formats.frame import SECTOR_BYTES, Kind

#: Answers that a client does not fetch: beyond this its requests are not carried out any more.
ANSWER_BYTES: Final = 8 << 20

_log = logging.getLogger(__name__)
_HEADER_BYTES: Final = REQUEST.size
_UNALIGNED: Final = SECTOR_BYTES - 1
_ZEROING: Final = (Command.TRIM, Command.WRITE_ZEROES)


class Host(Protocol):
    """What a connection needs of the server it belongs to."""

    ladder: Ladder
    disks: Mapping[str, Disk]
    exports: Mapping[str, int]

    def admit(self, connection: Connection) -> bool: ...
    def forget(self, connection: Connection) -> None: ...
    def flush_soon(self, connection: Connection, disk: Disk, handle: int) -> None: ...
    def record_soon(self, connection: Connection, disk: Disk, offset: int, length: int) -> None: ...


class _LargeWrite:
    """A write of more than 1 MiB, taken in pieces as it arrives."""

    __slots__ = ("error", "flags", "handle", "offset", "remaining")

    def __init__(self, handle: int, flags: int, offset: int, remaining: int, error: int) -> None:
        self.handle, self.flags, self.offset, self.remaining, self.error = handle, flags, offset, remaining, error


class Connection(asyncio.BufferedProtocol):
    """Handshake, then requests. An `Owner` of the change log's open frame."""

    def __init__(self, host: Host) -> None:
        self.parsed = 0
        self._host = host
        self._ladder, self._log = host.ladder, host.ladder.log
        self._handshake: nbd.Handshake | None = nbd.Handshake(host.exports)
        self._greeting = memoryview(bytearray(4096))
        self._carry = b""  # received and not parsed, while the open frame is somebody else's
        self._needed = 0  # bytes that the unfinished request at the end still lacks
        self._large: _LargeWrite | None = None
        self._answers: list[bytes] = []
        self._answer_bytes = 0
        self._paused = self._recording = self._closing = False
        self._disk: Disk
        self._touched: TouchedRegions
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it
        transport.set_write_buffer_limits(high=ANSWER_BYTES)
        if self._host.admit(self):
            transport.write(nbd.Handshake.greeting())
        else:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._host.forget(self)
        self._log.disown(self)

    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._resume()

    def recorded(self, error: OSError | None) -> None:
        """The region that a request waited for is recorded as touched, or can't be."""
        self._recording = False
        if error is not None:
            self._hang_up(f"can't be served: a touched region can't be recorded ({error})")
        self._resume()

    def _resume(self) -> None:
        if self._closing or self._paused or self._recording:
            return
        self._transport.resume_reading()
        if self._handshake is None and self._log.buffer(self, 0) is None:
            self._claim()
        if self._handshake is None:
            self._process()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._handshake is not None:
            return self._greeting
        room = self._log.buffer(self, self._needed)
        if room is None:
            self._claim()
            room = self._log.buffer(self, self._needed)
            assert room is not None, "a fresh frame has room for any request"
        return room

    def buffer_updated(self, count: int) -> None:
        if self._handshake is not None:
            self._greet(bytes(self._greeting[:count]))
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

    def _greet(self, data: bytes) -> None:
        handshake = self._handshake
        assert handshake is not None
        try:
            self._transport.write(handshake.receive(data))
        except CorruptionError as error:
            _log.warning("an NBD client was refused: %s", error.message)
            self._transport.abort()
            return
        if handshake.finished:
            self._transport.close()
        elif handshake.chosen is not None:
            self._disk = self._host.disks[handshake.chosen.export]
            self._touched = self._ladder.touched[self._disk.index]
            self._handshake, self._carry = None, handshake.rest
            if self._carry:
                self._claim()
                self._process()

    def _claim(self) -> None:
        self._log.disown(self)  # what is unparsed moves along, by way of `release`
        carry, self._carry = self._carry, b""
        self._ladder.claim(self, carry)

    def _process(self) -> None:
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
            elif kind == Command.WRITE and length <= nbd.PREFERRED_MAX_BYTES:
                following = at + _HEADER_BYTES + length
                if following > end:
                    self._needed = following - end
                    break
                error = self._invalid(offset, length)
                if not error and not self._may_touch(offset, length):
                    break
                if not error:
                    error = self._change(Kind.WRITE, offset, length, at + _HEADER_BYTES, time_ns)
                self._done(handle, flags, error)
                left, at = left - 1, following
            elif kind == Command.WRITE:
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
            self._read(handle, offset, length)
        elif kind == Command.FLUSH:
            self._host.flush_soon(self, self._disk, handle)
        elif kind in _ZEROING:
            error = self._invalid(offset, length) or self._change(Kind.ZERO, offset, length, 0, time_ns)
            self._done(handle, flags, error)
        elif kind == Command.DISC:
            self._send()
            self.close()
        else:
            self._done(handle, 0, Errno.EINVAL)

    def _change(self, kind: Kind, offset: int, length: int, place: int, time_ns: int) -> int:
        """Journal and do one write or zeroing; 0 or an NBD error."""
        log, disk = self._log, self._disk
        if log.ordered:
            log.describe(kind, disk.index, offset, length, place, time_ns)
        else:
            self._ladder.regions[disk.index].mark(offset, length)
        if offset < disk.watch_end and offset + length > disk.watch_start:
            disk.touched(offset, length)
        try:
            if place:
                disk.write(offset, log.data[place : place + length])
            else:
                disk.zero(offset, length)
        except OSError as error:
            _log.error("disk %s fails a write of %d bytes at %d: %s", disk.name, length, offset, error)
            self._ladder.distrust(disk.index, offset, length)
            return Errno.ENOSPC if error.errno == Errno.ENOSPC else Errno.EIO
        return 0

    def _may_touch(self, offset: int, length: int) -> bool:
        """Whether a range may be written now; else it will be when its regions are recorded, and this goes on then."""
        if self._touched.covers(offset, length):
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
            large.error = self._change(Kind.WRITE, large.offset, piece, at, time_ns)
        large.offset += piece
        large.remaining -= piece
        if not large.remaining:
            self._large = None
            self._done(large.handle, large.flags, large.error)
        return piece

    def _read(self, handle: int, offset: int, length: int) -> None:
        error = self._invalid(offset, length)
        if not error and length > nbd.MAX_REQUEST_BYTES:
            error = Errno.EOVERFLOW
        data = b""
        if not error:
            try:
                data = self._disk.read(offset, length)
            except OSError as failure:
                _log.error("disk %s can't be read at %d: %s", self._disk.name, offset, failure)
                error = Errno.EIO
        self._answers.append(REPLY.pack(REPLY_MAGIC, error, handle))
        if data:
            self._answers.append(data)
            self._answer_bytes += length
            if self._answer_bytes > ANSWER_BYTES:
                self._send()  # may pause this connection, and then no further request is carried out

    def _done(self, handle: int, flags: int, error: int) -> None:
        if flags & CommandFlag.FUA and not error:
            self._host.flush_soon(self, self._disk, handle)
        else:
            self._answers.append(REPLY.pack(REPLY_MAGIC, error, handle))

    def _send(self) -> None:
        answers, self._answers, self._answer_bytes = self._answers, [], 0
        if answers and not self._transport.is_closing():
            self._transport.write(b"".join(answers))

    def _invalid(self, offset: int, length: int) -> int:
        if (offset | length) & _UNALIGNED or not length:
            return Errno.EINVAL
        return Errno.ENOSPC if offset + length > self._disk.size_bytes else 0

    def _hang_up(self, why: str) -> None:
        _log.warning("the NBD client of disk %s %s: hanging up", self._disk.name, why)
        self._closing = True
        self._transport.abort()
