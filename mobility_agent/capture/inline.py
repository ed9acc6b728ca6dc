"""Inline capture: the agent serves the machine's disks over NBD, and a write is journalled, then done, then answered.

This is the server around `connection`: it listens, admits clients, and does their flushes. A flush (and a write with
FUA) is answered when the change log is durable and then the disk is; flushes that wait together share one round, so a
hundred clients cost one fdatasync.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

from mobility_agent.capture.connection import Connection
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.nbd import Errno
from mobility_agent.ladder import Ladder
from replicar.errors import PermanentError

MAX_CONNECTIONS: Final = 64
#: Where a disk is served: a unix socket's path, or host and port.
Address: TypeAlias = Path | tuple[str, int]

_log = logging.getLogger(__name__)


class InlineCapture:
    """Serves disks over NBD while it is entered.

    Every address serves every disk, by its name; a client that names none gets the only disk there is, so a machine
    with several disks wants clients that name theirs.

    Args:
        ladder: log, disks and regions; `ladder.start()` was called.
        listen: by disk name. `addresses` says afterwards where it really is (port 0 takes a free one).
    """

    def __init__(self, ladder: Ladder, listen: Mapping[str, Address]) -> None:
        self.ladder = ladder
        self.disks: Mapping[str, Disk] = {disk.name: disk for disk in ladder.disks.values()}
        self.exports: Mapping[str, int] = {disk.name: disk.size_bytes for disk in self.disks.values()}
        self.addresses: dict[str, Address] = {}
        self._listen = listen
        self._servers: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._waiting: list[tuple[Connection, Disk, int]] = []
        self._records: set[asyncio.Task[None]] = set()
        self._flush_wanted = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> InlineCapture:
        self._flusher = asyncio.get_running_loop().create_task(self._flush_forever())
        try:
            for name, address in self._listen.items():
                await self._serve(name, address)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Take no more requests. What was acknowledged is in the log, and durable if its client asked for that."""
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.close()
        self._servers.clear()
        for address in self.addresses.values():
            if isinstance(address, Path):
                address.unlink(missing_ok=True)
        tasks = [*self._records, *([self._flusher] if self._flusher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def admit(self, connection: Connection) -> bool:
        if len(self._connections) >= MAX_CONNECTIONS:
            _log.warning("more than %d NBD connections: one is refused", MAX_CONNECTIONS)
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def flush_soon(self, connection: Connection, disk: Disk, handle: int) -> None:
        """Answer `handle` once log and disk are durable."""
        self._waiting.append((connection, disk, handle))
        self._flush_wanted.set()

    def record_soon(self, connection: Connection, disk: Disk, offset: int, length: int) -> None:
        """Have a range recorded as touched, then let `connection` go on."""
        task = asyncio.get_running_loop().create_task(self._record(connection, disk, offset, length))
        self._records.add(task)  # one a connection at most, so MAX_CONNECTIONS bounds it
        task.add_done_callback(self._records.discard)

    async def _record(self, connection: Connection, disk: Disk, offset: int, length: int) -> None:
        failure: OSError | None = None
        try:
            await self.ladder.touched[disk.index].record(offset, length)
        except OSError as error:
            _log.error("disk %s: a touched region can't be recorded: %s", disk.name, error)
            failure = error
        connection.recorded(failure)

    async def _serve(self, name: str, address: Address) -> None:
        loop = asyncio.get_running_loop()
        try:
            if isinstance(address, Path):
                _remove_stale_socket(address)
                server = await loop.create_unix_server(lambda: Connection(self), address)
                os.chmod(address, stat.S_IRUSR | stat.S_IWUSR)
                self.addresses[name] = address
            else:
                server = await loop.create_server(lambda: Connection(self), *address)
                self.addresses[name] = server.sockets[0].getsockname()[:2]
        except OSError as error:
            raise PermanentError(
                f"disk {name} can't be served at {_text(address)}: {error.strerror or error}",
                hint="is another agent or NBD server using that address? set another one for this disk",
                disk=name,
                address=_text(address),
            ) from None
        self._servers.append(server)

    async def _flush_forever(self) -> None:
        while True:
            await self._flush_wanted.wait()
            self._flush_wanted.clear()
            waiting, self._waiting = self._waiting, []
            error = await self._flush({disk.index: disk for _, disk, _ in waiting}.values())
            for connection, _, handle in waiting:
                connection.answer(handle, error)

    async def _flush(self, disks: Iterable[Disk]) -> int:
        try:
            await self.ladder.log.sync()
        except OSError as error:
            _log.error("the change log can't be made durable: %s", error)
            return Errno.EIO
        for disk in list(disks):
            try:
                await asyncio.to_thread(disk.flush)
            except OSError as error:
                # The kernel may have dropped pages it could not write, so any of the disk may differ from the stream.
                _log.error("disk %s can't be made durable: %s", disk.name, error)
                self.ladder.distrust(disk.index, 0, disk.size_bytes)
                self.ladder.declare()
                return Errno.EIO
        return 0


def _remove_stale_socket(path: Path) -> None:
    """A socket nobody listens on is left by a killed agent; one that answers is somebody's, and stays theirs."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _text(address: Address) -> str:
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"
