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
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from recovery.export.disk import ServedDisk
from replicar.errors import CorruptionError, ReplicarError
from replicar.formats.frame import SECTOR_BYTES
from replicar.fuse import mount, protocol
from replicar.fuse.channel import Channel, Silence
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
        self._channel = Channel(-1, memoryview(mmap.mmap(-1, protocol.MAX_REQUEST_BYTES)))
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Show the file.

        Raises:
            PermanentError: it can't be; see `mount`.
        """
        self._channel.fd = mount.mount(self._directory)
        self._loop.add_reader(self._channel.fd, self._readable)

    async def aclose(self) -> None:
        """Take the file away, also from who uses it still."""
        if self._channel.fd < 0:
            return
        # Its users' questions, of which unmounting may be the last, are answered meanwhile.
        await asyncio.to_thread(mount.unmount, self._directory, lazily=True)
        self._loop.remove_reader(self._channel.fd)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        os.close(self._channel.fd)
        self._channel.fd = -1
        self._directory.rmdir()

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                received = self._channel.receive()
            except OSError as error:
                _log.error("disk %s is no longer shown at %s: %s", self._disk.name, self.path, error.strerror)
                received = Silence.UNMOUNTED
            if received is Silence.UNMOUNTED:
                self._loop.remove_reader(self._channel.fd)
            if isinstance(received, Silence):
                return
            request, body = received
            try:
                self._carry_out(request, body)
            except CorruptionError as error:
                _log.error("the kernel asked something odd of disk %s: %s", self._disk.name, error.message)
                if request.opcode not in SILENT:
                    self._channel.send(protocol.refusal(request.unique, errno.EINVAL))

    def _carry_out(self, request: Request, body: memoryview) -> None:
        unique = request.unique
        match request.opcode:
            case Opcode.READ:
                self._begin(self._read(unique, *protocol.range_of(body)))
            case Opcode.WRITE:
                offset, length, content = protocol.content_of(body)
                error = self._change(offset, length, content)
                self._channel.send(protocol.refusal(unique, error) if error else protocol.written(unique, length))
            case Opcode.FALLOCATE:
                zeroes = protocol.zeroes_of(body)
                error = self._change(*zeroes, None) if zeroes is not None else errno.EOPNOTSUPP
                self._channel.send(protocol.refusal(unique, error) if error else protocol.answer(unique))
            case Opcode.FSYNC if request.node == FILE:
                self._begin(self._flush(unique))
            case _:
                self._channel.send(self._tree.answer(request, body))

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
            self._channel.send(protocol.refusal(unique, errno.EIO))
            return
        self._channel.send(
            protocol.answer_head(unique, length), memoryview(content)[offset - start : offset - start + length]
        )

    async def _flush(self, unique: int) -> None:
        try:
            await self._disk.flush()
        except OSError:
            self._channel.send(protocol.refusal(unique, errno.EIO))
            return
        self._channel.send(protocol.answer(unique))

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
