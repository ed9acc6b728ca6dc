"""A disk as a file: the kernel's requests, carried out on the event loop like those of an NBD client.

A request is read into memory that is there and stays (see `_lasting_memory`), and what it writes is copied from there
into the change log's open frame, of which the front is an owner as an NBD connection is. Order of things for a write:
its region recorded as touched, its descriptor into the log, its bytes to the disk, the answer. A flush is answered when
the log is durable, then the disk, and shares its round with all others that wait.

The file is for a loop device with direct I/O (`losetup --direct-io=on`), which asks in whole sectors; other ranges are
refused. What a mounted file system discards arrives as a hole to be punched, and is a ZERO in the stream.

While no agent runs, whoever uses the file waits (`session`).

Weak: requests are carried out one after the other, and while one waits for its region to be recorded the following wait
with it. The agent's own directory must not be on the disk that it shows: it would wait for itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import mmap
import os
import struct
from pathlib import Path
from typing import Final

from mobility_agent.capture.disk import Disk
from mobility_agent.capture.fuse.session import Session
from mobility_agent.capture.host import Host
from mobility_agent.capture.reading import invalid
from mobility_agent.capture.writing import Writer
from replicar.errors import CorruptionError
from replicar.formats.frame import SECTOR_BYTES, Kind
from replicar.fuse import protocol
from replicar.fuse.channel import Channel, Silence
from replicar.fuse.protocol import FILE, SILENT, Opcode, Request, Tree
from replicar.observe.logs import fields

#: Requests carried out before others on the event loop have their turn.
BATCH: Final = 64
#: One descriptor says no more than this.
_ZERO_BYTES: Final = 1 << 30

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class FuseFront:
    """One disk's file, from `open` to `aclose`. A `Client` of inline capture, and an `Owner` of the open frame.

    Args:
        file: what the disk is shown as; its directory is this front's alone.
        keeper: the path of its keeper's socket; see `session`.
        time_ns: what the file's times say.
    """

    def __init__(self, host: Host, disk: Disk, file: Path, *, keeper: Path, time_ns: int) -> None:
        self.parsed = 0
        self._host, self._disk, self.file = host, disk, file
        self._ladder, self._changes = host.ladder, host.ladder.log
        self._writer = Writer(host.ladder, disk)
        self._session = Session(disk.name, file, keeper)
        self._tree = Tree(file.name, disk.size_bytes, owner=os.geteuid(), group=os.getegid(), time_ns=time_ns)
        self._channel = Channel(-1, _lasting_memory(protocol.MAX_REQUEST_BYTES))
        self._is_ending = False
        self._holding = host.ladder.gate.is_closed
        self._recorded: tuple[OSError | None, ...] = ()  # what `recorded` was told while requests were held
        self._held: tuple[Request, memoryview] | None = None  # a request that waits for its region to be recorded
        self._loop = asyncio.get_running_loop()

    def open(self) -> None:
        """Show the file.

        Raises:
            PermanentError: it can't be; see `session`.
        """
        self._session.begin()
        self._channel.fd = self._session.fd
        self._listen()

    async def aclose(self) -> None:
        """Take the file away, or let its users wait for the next agent. What was acknowledged is in the log."""
        if self._channel.fd < 0:
            return
        self._is_ending = True
        unmounted = await asyncio.to_thread(self._session.unmount)  # whose questions are answered meanwhile
        self._loop.remove_reader(self._channel.fd)
        self._channel.fd = -1
        self._changes.disown(self)
        self._session.close(unmounted=unmounted)

    # --- what the change log and the host say ---

    def release(self, unparsed: bytes) -> None:
        assert not unparsed, "a request is carried out, or held, before anything else is read"

    def hold(self) -> None:
        """Carry out nothing more until `resume`."""
        self._holding = True
        if self._channel.fd >= 0:
            self._loop.remove_reader(self._channel.fd)

    def resume(self) -> None:
        self._holding = False
        if self._recorded:
            (error,), self._recorded = self._recorded, ()
            self.recorded(error)
        elif self._channel.fd >= 0:
            self._listen()

    def recorded(self, error: OSError | None) -> None:
        """The region that a request waited for is recorded as touched, or can't be."""
        if self._holding:
            self._recorded = (error,)
            return
        held, self._held = self._held, None
        if self._channel.fd < 0 or held is None:
            return
        request, body = held
        if error is not None:
            self._channel.send(protocol.refusal(request.unique, errno.EIO))
        else:
            self._carry_out(request, body)
        self._done()
        self._listen()

    def answer(self, handle: int, error: int) -> None:
        """Answer a request that was waiting for a flush."""
        if self._channel.fd >= 0:
            self._channel.send(protocol.refusal(handle, error) if error else protocol.answer(handle))

    # --- requests ---

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                received = self._channel.receive()
            except OSError as error:
                self._unmounted(error.strerror or str(error))
                return
            if received is Silence.UNMOUNTED:
                self._unmounted("it is unmounted")
                return
            if isinstance(received, Silence):
                break
            self._take(*received)
            if self._held is not None:
                break
        self._done()
        self._listen()

    def _unmounted(self, why: str) -> None:
        if not self._is_ending:
            _log.error(
                "disk %s is no longer shown at %s: %s",
                self._disk.name,
                self.file,
                why,
                extra=fields(disk=self._disk.name),
            )
        self._loop.remove_reader(self._channel.fd)

    def _listen(self) -> None:
        """Read on, unless a request is held."""
        if self._held is None and not self._holding:
            self._loop.add_reader(self._channel.fd, self._readable)
        else:
            self._loop.remove_reader(self._channel.fd)

    def _take(self, request: Request, body: memoryview) -> None:
        """Carry out one request."""
        try:
            self._carry_out(request, body)
        except CorruptionError as error:
            _log.error("the kernel asked something odd of disk %s: %s", self._disk.name, error.message)
            if request.opcode not in SILENT:
                self._channel.send(protocol.refusal(request.unique, errno.EINVAL))

    def _done(self) -> None:
        self._changes.batch_done()
        self._ladder.declare()

    def _own(self, needed: int) -> memoryview:
        """The open frame, with room for so many bytes and a descriptor."""
        changes = self._changes
        room = changes.buffer(self, needed) if changes.descriptors_left else None
        if room is None:
            self._ladder.claim(self, b"")
            room = changes.buffer(self, needed)
            assert room is not None, "a fresh frame has room for any request"
        return room

    def _carry_out(self, request: Request, body: memoryview) -> None:
        match request.opcode:
            case Opcode.WRITE:
                self._write(request, body)
            case Opcode.READ:
                self._read(request.unique, body)
            case Opcode.FALLOCATE:
                self._fallocate(request, body)
            case Opcode.FSYNC if request.node == FILE:
                self._host.flush_soon(self, self._disk, request.unique)
            case Opcode.LSEEK:
                self._seek(request.unique, body)
            case _:
                self._channel.send(self._tree.answer(request, body))

    def _write(self, request: Request, body: memoryview) -> None:
        offset, length, content = protocol.content_of(body)
        error = invalid(self._disk, offset, length) or (errno.EIO if len(content) < length else 0)
        if not error and not self._writer.may_touch(offset, length):
            self._hold(request, body, offset, length)
            return
        if not error:
            changes = self._changes
            self._own(length)[:length] = content
            place = changes.free
            changes.free = self.parsed = place + length
            error = self._writer.change(Kind.WRITE, offset, length, place, changes.now_ns())
        self._answer(request, error, protocol.written(request.unique, length))

    def _fallocate(self, request: Request, body: memoryview) -> None:
        zeroes = protocol.zeroes_of(body)
        offset, length = zeroes or (0, 0)
        error = invalid(self._disk, offset, length) if zeroes is not None else errno.EOPNOTSUPP
        if not error and not self._writer.may_touch(offset, length):
            self._hold(request, body, offset, length)
            return
        while not error and length:
            piece = min(length, _ZERO_BYTES)
            self._own(SECTOR_BYTES)
            error = self._writer.change(Kind.ZERO, offset, piece, 0, self._changes.now_ns())
            offset, length = offset + piece, length - piece
        self._answer(request, error, protocol.answer(request.unique))

    def _hold(self, request: Request, body: memoryview, offset: int, length: int) -> None:
        """Carry the request out when its regions are recorded; until then nothing else is read."""
        self._held = (request, memoryview(bytes(body)))
        self._host.record_soon(self, self._disk, offset, length)

    def _answer(self, request: Request, error: int, done: bytes) -> None:
        if error:
            self._ladder.declare()  # before anybody is told of it
        self._channel.send(protocol.refusal(request.unique, error) if error else done)

    def _read(self, unique: int, body: memoryview) -> None:
        offset, length = protocol.range_of(body)
        length = min(length, max(self._disk.size_bytes - offset, 0))
        try:
            content = self._disk.read(offset, length) if length else b""
        except OSError as error:
            _log.error(
                "disk %s can't be read at %d: %s",
                self._disk.name,
                offset,
                error,
                extra=fields(disk=self._disk.name, offset=offset),
            )
            self._channel.send(protocol.refusal(unique, errno.EIO))
            return
        self._channel.send(protocol.answer_head(unique, length), content)

    def _seek(self, unique: int, body: memoryview) -> None:
        _, offset, whence, _ = protocol.fields(protocol.LSEEK, body)
        try:
            found = os.lseek(self._disk.fd, offset, whence) if whence in (os.SEEK_DATA, os.SEEK_HOLE) else offset
            self._channel.send(protocol.answer(unique, struct.pack("=Q", found)))
        except OSError as error:
            self._channel.send(protocol.refusal(unique, error.errno or errno.EINVAL))


def _lasting_memory(size: int) -> memoryview:
    """Memory whose pages are there, and are not taken away.

    A process that is killed while it reads a request into a page that is not there (of a mapped file, as the change
    log's are) leaves that request answered with an error by the kernel; with this it is asked again.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(size))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) != 0:
        _log.warning(
            "memory for requests can't be locked: should the agent be killed, a user of its files may see an error"
        )
    return memoryview(memory)
