"""A served disk as a file: the kernel's requests answered out of the sealed log and the overlay.

Reads are tasks, since they wait for storage; writes and zeros go to the overlay at once. The kernel itself bounds what
is under way (see `protocol.init`). The file is for a loop device, which asks in whole sectors; a write of anything else
is refused.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import mmap
import os
import struct
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from recovery.export.disk import ServedDisk
from replicar.errors import CorruptionError, ReplicarError
from replicar.formats.frame import SECTOR_BYTES
from replicar.fuse import mount, protocol
from replicar.fuse.protocol import FILE, SILENT, Opcode, Request, Tree
from replicar.observe.logs import fields

#: The file's name in its directory.
NAME: Final = "disk"
#: Requests taken from the kernel before others on the event loop have their turn.
BATCH: Final = 16

_log = logging.getLogger(__name__)


class DiskFile:
    """One disk's file, from `open` to `aclose`.

    Args:
        directory: its directory, which is made, and is its own.
    """

    def __init__(self, disk: ServedDisk, directory: Path, *, time_ns: int) -> None:
        self.path = directory / NAME
        self._disk, self._directory = disk, directory
        self._tree = Tree(NAME, disk.size_bytes, owner=os.geteuid(), group=os.getegid(), time_ns=time_ns)
        self._fd = -1
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._received = memoryview(mmap.mmap(-1, protocol.MAX_REQUEST_BYTES))

    def open(self) -> None:
        """Show the file.

        Raises:
            PermanentError: it can't be; see `mount`.
        """
        self._fd = mount.mount(self._directory)
        self._loop.add_reader(self._fd, self._readable)

    async def aclose(self) -> None:
        """Take the file away, also from who uses it still."""
        if self._fd < 0:
            return
        # Its users' questions, of which unmounting may be the last, are answered meanwhile.
        await asyncio.to_thread(mount.unmount, self._directory, lazily=True)
        self._loop.remove_reader(self._fd)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        os.close(self._fd)
        self._fd = -1
        self._directory.rmdir()

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                count = os.readv(self._fd, [self._received])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # the request was taken back
                self._loop.remove_reader(self._fd)  # ENODEV: it is unmounted
                return
            data = self._received[:count]
            request = protocol.read_request(data)
            try:
                self._carry_out(request, data[request.body :])
            except CorruptionError as error:
                _log.error("the kernel asked something odd of disk %s: %s", self._disk.name, error.message)
                if request.opcode not in SILENT:
                    self._send(protocol.refusal(request.unique, errno.EINVAL))

    def _carry_out(self, request: Request, body: memoryview) -> None:
        unique, tree = request.unique, self._tree
        match request.opcode:
            case Opcode.READ:
                _, offset, length, *_ = protocol.fields(protocol.READ, body)
                self._begin(self._read(unique, offset, length))
            case Opcode.WRITE:
                _, offset, length, *_ = protocol.fields(protocol.WRITE, body)
                content = body[protocol.WRITE.size : protocol.WRITE.size + length]
                error = self._change(offset, length, content)
                written = struct.pack("=II", length, 0)
                self._send(protocol.refusal(unique, error) if error else protocol.answer(unique, written))
            case Opcode.FALLOCATE:
                _, offset, length, mode, _ = protocol.fields(protocol.FALLOCATE, body)
                kinds = (protocol.PUNCH_HOLE, protocol.ZERO_RANGE)
                zeroing = mode & protocol.KEEP_SIZE and mode & ~protocol.KEEP_SIZE in kinds
                error = self._change(offset, length, None) if zeroing else errno.EOPNOTSUPP
                self._send(protocol.refusal(unique, error) if error else protocol.answer(unique))
            case Opcode.FSYNC if request.node == FILE:
                self._begin(self._flush(unique))
            case Opcode.INIT:
                self._send(protocol.init(unique, body))
            case Opcode.LOOKUP:
                self._send(tree.lookup(unique, body))
            case Opcode.GETATTR:
                self._send(tree.attributes(unique, request.node))
            case Opcode.OPEN | Opcode.OPENDIR:
                self._send(tree.opened(unique, request.node))
            case Opcode.READDIR:
                _, offset, size, *_ = protocol.fields(protocol.READ, body)
                self._send(tree.listing(unique, offset, size))
            case Opcode.STATFS:
                self._send(tree.space(unique))
            case Opcode.FSYNC | Opcode.FLUSH | Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.DESTROY | Opcode.ACCESS:
                self._send(protocol.answer(unique))
            case silent if silent in SILENT:
                pass
            case _:
                self._send(protocol.refusal(unique, errno.ENOSYS))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, unique: int, offset: int, length: int) -> None:
        length = min(length, max(self._disk.size_bytes - offset, 0))
        start = offset // SECTOR_BYTES * SECTOR_BYTES
        end = min(-(-(offset + length) // SECTOR_BYTES) * SECTOR_BYTES, self._disk.size_bytes)
        try:
            content = await self._disk.read(start, end - start) if length else bytearray()
        except (ReplicarError, OSError) as error:
            words = error.message if isinstance(error, ReplicarError) else str(error)
            _log.error(
                "disk %s can't be read at %d: %s",
                self._disk.name,
                offset,
                words,
                extra=fields(disk=self._disk.name, offset=offset),
            )
            self._send(protocol.refusal(unique, errno.EIO))
            return
        self._send(protocol.answer_head(unique, length), memoryview(content)[offset - start : offset - start + length])

    async def _flush(self, unique: int) -> None:
        try:
            await self._disk.flush()
        except OSError:
            self._send(protocol.refusal(unique, errno.EIO))
            return
        self._send(protocol.answer(unique))

    def _change(self, offset: int, length: int, content: memoryview | None) -> int:
        """Write, or make zeros; an error number, 0 if it is done."""
        if not self._disk.is_writable:
            return errno.EROFS
        if (offset | length) % SECTOR_BYTES or not length or offset + length > self._disk.size_bytes:
            return errno.EINVAL
        try:
            if content is None:
                self._disk.zero(offset, length)
            else:
                self._disk.write(offset, content)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _send(self, *parts: bytes | memoryview) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # taken back, or unmounted: nobody waits for it
                raise
