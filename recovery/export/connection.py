"""One NBD client of an export: its requests, carried out side by side and answered as they are done.

Reads are tasks, since they wait for storage; writes go to the overlay where they are parsed. What may be under way is
bounded: requests by the connection, bytes by the host for all its connections together. A connection at a bound parses
nothing more, and then its socket fills.

A client that breaks the protocol is hung up on. One that goes away takes its reads with it; its writes are done.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Coroutine, Mapping
from typing import Any, Final, Protocol, cast

from recovery.export.disk import ServedDisk
from replicar.errors import ReplicarError
from replicar.formats.frame import SECTOR_BYTES
from replicar.nbd import protocol as nbd, replies
from replicar.nbd.greeting import ANSWER_BYTES, Greeting
from replicar.nbd.protocol import REQUEST, REQUEST_MAGIC, Command, CommandFlag, Errno
from replicar.observe.logs import fields

#: Requests of one client that may be under way.
MAX_REQUESTS: Final = 64
#: When an export ends, what is under way may take so long; storage may be away.
CLOSING_SECONDS: Final = 5.0
#: Of what lies where, extents in one answer, and the range that is looked at for it; the client asks on from there.
MAX_EXTENTS: Final = 2048
ALLOCATION_BYTES: Final = 1 << 30
#: A read this long is looked at for holes, if the client can be told of them.
SPARSE_BYTES: Final = 64 << 10
_WRITING: Final = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)

_log = logging.getLogger(__name__)


class Host(Protocol):
    """What a connection needs of the server it belongs to."""

    disks: Mapping[str, ServedDisk]
    tls: ssl.SSLContext | None

    def admit(self, connection: Connection) -> bool: ...
    def forget(self, connection: Connection) -> None: ...
    def take(self, connection: Connection, length: int) -> bool:
        """Whether so many bytes may be under way now; if not, the connection is resumed when others gave some back."""
        ...

    def give_back(self, length: int) -> None: ...


class Connection(asyncio.Protocol):
    """Handshake, then requests."""

    def __init__(self, host: Host, policy: nbd.Tls) -> None:
        self._host = host
        sizes = {name: disk.size_bytes for name, disk in host.disks.items()}
        read_only = not any(disk.is_writable for disk in host.disks.values())
        handshake = nbd.Handshake(sizes, policy, read_only=read_only)
        self._greeting: Greeting | None = Greeting(self, handshake, host.tls)
        self._chosen: nbd.Chosen
        self._disk: ServedDisk
        self._data = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()
        self._paused = self._closing = self._leaving = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)
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
        for task in self._tasks:
            task.cancel()
        self._host.forget(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.resume()

    def resume(self) -> None:
        """Go on parsing, now that something was given back."""
        if not self._closing and self._greeting is None:
            self._process()

    def data_received(self, data: bytes) -> None:
        if self._greeting is not None:
            self._greeting.received(data)
        else:
            self._data += data
            self._process()

    async def aclose(self) -> None:
        """Answer what is under way and does not take long, then hang up."""
        self._leaving = True
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSING_SECONDS)
        self._transport.close()

    # --- handshake ---

    def secured(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def chose(self, chosen: nbd.Chosen, rest: bytes) -> None:
        self._greeting = None
        self._chosen, self._disk = chosen, self._host.disks[chosen.export]
        self._data += rest
        self._process()

    # --- requests ---

    def _process(self) -> None:
        at = 0
        while not (self._closing or self._paused or self._leaving) and len(self._data) - at >= REQUEST.size:
            taken = self._request(at)
            if not taken:
                break
            at += taken
        del self._data[:at]
        if not self._closing:
            self._flow()

    def _flow(self) -> None:
        """Read on while less is waiting to be parsed than one request may have."""
        if len(self._data) > nbd.MAX_REQUEST_BYTES + REQUEST.size:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _request(self, at: int) -> int:
        """Begin the request at `at`; the bytes it took, 0 if it has to wait."""
        magic, flags, kind, handle, offset, length = REQUEST.unpack_from(self._data, at)
        if magic != REQUEST_MAGIC or (kind == Command.WRITE and length > nbd.MAX_REQUEST_BYTES):
            self._hang_up("it sends no request, or a larger one than it may, where one belongs")
            return 0
        if len(self._tasks) >= MAX_REQUESTS or (kind == Command.WRITE and len(self._data) - at < REQUEST.size + length):
            return 0
        if kind == Command.READ and not self._invalid(kind, offset, length):
            if not self._host.take(self, length):
                return 0
            self._begin(self._read(flags, handle, offset, length), length)
        elif kind in _WRITING:
            with memoryview(self._data)[at + REQUEST.size : at + REQUEST.size + length] as content:
                error = self._change(kind, offset, length, content)
            if flags & CommandFlag.FUA and not error:
                self._begin(self._flush(handle))
            else:
                self._answer(replies.simple(handle, error))
            return REQUEST.size + (length if kind == Command.WRITE else 0)
        elif kind == Command.FLUSH:
            self._begin(self._flush(handle))
        elif kind == Command.BLOCK_STATUS and self._chosen.allocation:
            self._begin(self._allocation(flags, handle, offset, length))
        elif kind == Command.DISC:
            self._leaving = True
            self._begin(self._leave())
        else:
            self._refuse(kind, handle, self._invalid(kind, offset, length) or Errno.EINVAL)
        return REQUEST.size

    async def _leave(self) -> None:
        """The client said goodbye; what it asked for before is answered."""
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        if others:
            await asyncio.wait(others)
        self._transport.close()

    def _begin(self, work: Coroutine[Any, Any, None], taken: int = 0) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            if taken:
                self._host.give_back(taken)
            if not ended.cancelled() and (error := ended.exception()) is not None:
                self._hang_up(f"a request ended badly: {error!r}")
            self.resume()

        task.add_done_callback(done)

    async def _read(self, flags: int, handle: int, offset: int, length: int) -> None:
        try:
            out = await self._disk.read(offset, length)
            parts = await self._parts(flags, offset, memoryview(out))
        except (ReplicarError, OSError) as error:
            words = error.message if isinstance(error, ReplicarError) else str(error)
            _log.error(
                "disk %s can't be read at %d: %s",
                self._disk.name,
                offset,
                words,
                extra=fields(disk=self._disk.name, offset=offset),
            )
            self._refuse(Command.READ, handle, Errno.EIO, words)
            return
        if self._chosen.structured:
            self._answer(replies.chunks(handle, parts))
        else:
            self._answer(replies.simple(handle, 0, parts[0][2]))

    async def _parts(self, flags: int, offset: int, out: memoryview) -> list[replies.Part]:
        if not self._chosen.structured or flags & CommandFlag.DF or len(out) < SPARSE_BYTES:
            return [(offset, len(out), bytes(out))]
        return [
            (start, size, None if is_hole else bytes(out[start - offset : start - offset + size]))
            for start, size, is_hole in await self._disk.stretches(offset, len(out))
        ]

    async def _flush(self, handle: int) -> None:
        try:
            await self._disk.flush()
        except OSError as error:
            _log.error(
                "disk %s: its overlay can't be made durable: %s",
                self._disk.name,
                error,
                extra=fields(disk=self._disk.name),
            )
            self._answer(replies.simple(handle, Errno.EIO))
            return
        self._answer(replies.simple(handle, 0))

    def _change(self, kind: int, offset: int, length: int, content: memoryview) -> int:
        if not self._disk.is_writable:
            return Errno.EPERM
        if error := self._invalid(kind, offset, length):
            return error
        try:
            if kind == Command.WRITE:
                self._disk.write(offset, content)
            else:
                self._disk.zero(offset, length)
        except OSError as failure:
            _log.error(
                "disk %s: its overlay can't take %d bytes: %s",
                self._disk.name,
                length,
                failure,
                extra=fields(disk=self._disk.name),
            )
            return Errno.ENOSPC if failure.errno == Errno.ENOSPC else Errno.EIO
        return 0

    async def _allocation(self, flags: int, handle: int, offset: int, length: int) -> None:
        if error := self._invalid(Command.BLOCK_STATUS, offset, length):
            self._refuse(Command.BLOCK_STATUS, handle, error)
            return
        try:
            found = await self._disk.stretches(offset, min(length, ALLOCATION_BYTES))
        except (ReplicarError, OSError) as failure:
            _log.error(
                "disk %s can't tell what lies at %d: %s",
                self._disk.name,
                offset,
                failure,
                extra=fields(disk=self._disk.name, offset=offset),
            )
            self._refuse(Command.BLOCK_STATUS, handle, Errno.EIO)
            return
        most = 1 if flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        kinds = ((size, replies.HOLE_AND_ZERO if hole else replies.ALLOCATED) for _, size, hole in found[:most])
        self._answer(replies.block_status(handle, kinds))

    def _invalid(self, kind: int, offset: int, length: int) -> int:
        """Why a range can't be asked for, as an NBD error; 0 if it can."""
        if not length or (offset | length) % SECTOR_BYTES:
            return Errno.EINVAL
        if offset + length > self._disk.size_bytes:
            return Errno.ENOSPC if kind in _WRITING else Errno.EINVAL
        return Errno.EOVERFLOW if kind == Command.READ and length > nbd.MAX_REQUEST_BYTES else 0

    def _refuse(self, kind: int, handle: int, error: int, words: str = "") -> None:
        if self._chosen.structured and kind in (Command.READ, Command.BLOCK_STATUS):
            said = words or f"disk {self._disk.name} does not do that"
            self._answer(replies.failure(handle, error, said))
        else:
            self._answer(replies.simple(handle, error))

    def _answer(self, parts: list[bytes]) -> None:
        if not self._closing and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def _hang_up(self, why: str) -> None:
        _log.warning("an NBD client is hung up on: %s", why)
        self._closing = True
        self._transport.abort()
