"""One NBD connection seen from the client: the newstyle handshake (GO), then replies matched to requests by cookie.

An `asyncio.Protocol` without opinions: `NbdClient` says what to ask, this says what was answered and when it was seen.
Bytes that are no NBD end the connection with a `PermanentError`, a connection that ends takes every request in flight
with it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, cast

from replicar.errors import PermanentError, TransientError

#: Requests without a reply on one connection; NBD itself sets no bound.
MAX_IN_FLIGHT: Final = 256
#: What every server must take without having said a limit (the protocol's "block size constraints").
MAX_REQUEST_BYTES: Final = 32 << 20
#: Written bytes that may wait in this process before a write waits for the server to read.
_WRITE_BUFFER_BYTES: Final = 4 << 20

_SERVER_MAGIC: Final = b"NBDMAGIC"
_OPTION_MAGIC: Final = b"IHAVEOPT"
_OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_OPTION_GO: Final = 7
_INFO_EXPORT: Final = 0
_INFO_BLOCK_SIZE: Final = 3
_REPLY_ACK: Final = 1
_REPLY_INFO: Final = 3
_REPLY_ERROR_BIT: Final = 1 << 31
_REPLY_UNKNOWN_EXPORT: Final = _REPLY_ERROR_BIT | 6
_MAX_OPTION_BYTES: Final = 64 << 10

_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
#: NBD's error numbers are those of Linux, whatever the host.
_ERRORS: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
}


class Command(IntEnum):
    """A request's type on the wire."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class ExportFlag(IntFlag):
    """What the server says it can do (transmission flags)."""

    READ_ONLY = 0x02
    FLUSH = 0x04
    FUA = 0x08
    TRIM = 0x20
    WRITE_ZEROES = 0x40
    MULTI_CONNECTION = 0x100


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request was handed to the connection, and when its reply was seen (wall clock, ns)."""

    issued_ns: int
    acknowledged_ns: int


@dataclass(slots=True)
class Request:
    command: Command
    offset: int
    length: int
    issued_ns: int
    done: asyncio.Future[tuple[Timing, bytes]]


class NbdConnection(asyncio.Protocol):
    """State of one connection. `ready` is done after the handshake; `closed` is set when nothing will come any more."""

    def __init__(self, export: str, now_ns: Callable[[], int]) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self.requests: dict[int, Request] = {}
        self.broken: TransientError | PermanentError | None = None
        self.size_bytes = 0
        self.flags = ExportFlag(0)
        self.block_bytes = (1, 4096, MAX_REQUEST_BYTES)
        self._export = export
        self._now_ns = now_ns
        self._parse = self._greeting
        self._cookie = 0
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None
        # Nobody may be left to read it when connecting was cancelled.
        self.ready.add_done_callback(lambda future: future.cancelled() or future.exception())

    def begin(self, command: Command, offset: int, length: int) -> tuple[int, Request]:
        """A new request in flight, with its cookie."""
        self._cookie += 1
        done: asyncio.Future[tuple[Timing, bytes]] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        request = Request(command, offset, length, self._now_ns(), done)
        self.requests[self._cookie] = request
        return self._cookie, request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            while self._parse():
                pass
        except PermanentError as error:
            self._end(error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(TransientError(f"the NBD connection ended: {error or 'the server hung up'}", hint="connect again"))
        self.closed.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def _end(self, error: TransientError | PermanentError) -> None:
        if self.broken is None:
            self.broken = error
        self.writable.set()
        if not self.ready.done():
            self.ready.set_exception(self.broken)
        for request in self.requests.values():
            if not request.done.done():
                request.done.set_exception(self.broken)
        self.requests.clear()

    def _greeting(self) -> bool:
        if len(self._data) < 18:
            return False
        magic, option, flags = bytes(self._data[:8]), bytes(self._data[8:16]), self._data[17]
        if magic != _SERVER_MAGIC or option != _OPTION_MAGIC or not flags & 1:
            raise PermanentError("no fixed-newstyle NBD server answers there", hint="check the address")
        del self._data[:18]
        name = self._export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
        self._write(struct.pack(">I", flags & 3) + _OPTION.pack(_OPTION_MAGIC, _OPTION_GO, len(body)) + body)
        self._parse = self._option_reply
        return True

    def _option_reply(self) -> bool:
        if len(self._data) < _OPTION_REPLY.size:
            return False
        magic, option, kind, length = _OPTION_REPLY.unpack_from(self._data)
        if magic != _OPTION_REPLY_MAGIC or option != _OPTION_GO or length > _MAX_OPTION_BYTES:
            raise PermanentError("the NBD server's answer to GO makes no sense")
        if len(self._data) < _OPTION_REPLY.size + length:
            return False
        body = bytes(self._data[_OPTION_REPLY.size : _OPTION_REPLY.size + length])
        del self._data[: _OPTION_REPLY.size + length]
        if kind & _REPLY_ERROR_BIT:
            said = body.decode(errors="replace") or f"error {kind:#x}"
            unknown = kind == _REPLY_UNKNOWN_EXPORT
            raise PermanentError(
                f"the NBD server has no export {self._export!r}" if unknown else f"the NBD server refuses: {said}",
                hint="look at the agent's settings for the names of its disks",
                export=self._export,
            )
        if kind == _REPLY_INFO:
            self._information(body)
        elif kind == _REPLY_ACK:
            self._parse = self._reply
            self.ready.set_result(None)
        return True

    def _information(self, body: bytes) -> None:
        (kind,) = struct.unpack_from(">H", body)
        if kind == _INFO_EXPORT:
            self.size_bytes, flags = struct.unpack_from(">QH", body, 2)
            self.flags = ExportFlag(flags & sum(ExportFlag))
        elif kind == _INFO_BLOCK_SIZE:
            minimum, preferred, maximum = struct.unpack_from(">III", body, 2)
            self.block_bytes = (minimum, preferred, maximum)

    def _reply(self) -> bool:
        """Take every whole reply that is there."""
        data, offset = self._data, 0
        finished: list[tuple[Request, int, bytes]] = []
        while len(data) - offset >= _REPLY.size:
            magic, error, cookie = _REPLY.unpack_from(data, offset)
            request = self.requests.get(cookie)
            if magic != _REPLY_MAGIC or request is None:
                raise PermanentError("the NBD server sent a reply to no request of ours")
            taken = request.length if request.command is Command.READ and not error else 0
            if len(data) - offset - _REPLY.size < taken:
                break
            offset += _REPLY.size
            finished.append((request, error, bytes(data[offset : offset + taken])))
            offset += taken
            del self.requests[cookie]
        del data[:offset]
        now = self._now_ns()
        for request, error, content in finished:
            if request.done.done():
                continue
            if error:
                request.done.set_exception(_refused(request, error))
            else:
                request.done.set_result((Timing(request.issued_ns, now), content))
        return False

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _refused(request: Request, error: int) -> PermanentError:
    number = _ERRORS.get(error, error)
    what = f"{request.command.name} of {request.length} bytes at {request.offset}"
    return PermanentError(f"the NBD server refused {what}: {os.strerror(number)}", errno=number)
