"""Inline capture: the agent serves the machine's disks over NBD or as files, and a write is journalled, then done, then
answered.

This is the server around its two fronts, `connection` and `fuse.front`: it listens, admits clients, and does their
flushes. A flush (and a write with FUA) is answered when the change log is durable and then the disk is; flushes that
wait together share one round, so a hundred clients cost one fdatasync.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

from mobility_agent.capture.connection import Connection
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.fuse import session
from mobility_agent.capture.fuse.front import FuseFront
from mobility_agent.capture.host import Client
from mobility_agent.gate import Held
from mobility_agent.ladder import Ladder
from replicar.errors import PermanentError
from replicar.nbd.protocol import LOOPBACK, Errno, Tls
from replicar.observe.logs import fields

MAX_CONNECTIONS: Final = 64
#: Where a disk is served: a unix socket's path, or host and port.
Address: TypeAlias = Path | tuple[str, int]

_log = logging.getLogger(__name__)


class InlineCapture:
    """Serves disks while it is entered.

    Every NBD address serves every disk, by its name; a client that names none gets the only disk there is, so a machine
    with several disks wants clients that name theirs.

    Args:
        ladder: log, disks and regions; `ladder.start()` was called.
        listen: by disk name. `addresses` says afterwards where it really is (port 0 takes a free one).
        files: by disk name, what disks are shown as to this machine itself.
        keepers: the directory for the sockets of these files' keepers.
        tls: asks clients for a certificate. Offered at every address; required at those that lead off this machine.
    """

    def __init__(
        self,
        ladder: Ladder,
        listen: Mapping[str, Address],
        *,
        files: Mapping[str, Path] | None = None,
        keepers: Path | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        assert keepers is not None or not files, "a file outlives the agent, so somebody has to keep it"
        self.ladder = ladder
        self.tls = tls
        self.disks: Mapping[str, Disk] = {disk.name: disk for disk in ladder.disks.values()}
        self.exports: Mapping[str, int] = {disk.name: disk.size_bytes for disk in self.disks.values()}
        self.addresses: dict[str, Address] = {}
        self._listen = listen
        self._files, self._keepers = files or {}, keepers
        self._fronts: list[FuseFront] = []
        self._servers: list[asyncio.Server] = []
        self._connections: dict[Connection, None] = {}  # oldest first
        self._waiting: list[tuple[Client, Disk, int]] = []
        self._records: set[asyncio.Task[None]] = set()
        self._flush_wanted = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    def _behind_gate(self) -> list[Held]:
        return [*self._connections, *self._fronts]

    async def __aenter__(self) -> InlineCapture:
        self.ladder.gate.holders = self._behind_gate
        self._flusher = asyncio.get_running_loop().create_task(self._flush_forever())
        try:
            self._show_files()
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
        for front in self._fronts:
            await front.aclose()
        self._fronts.clear()
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
        self._connections[connection] = None
        return True

    def forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    def flush_soon(self, client: Client, disk: Disk, handle: int) -> None:
        self._waiting.append((client, disk, handle))
        self._flush_wanted.set()

    def record_soon(self, client: Client, disk: Disk, offset: int, length: int) -> None:
        task = asyncio.get_running_loop().create_task(self._record(client, disk, offset, length))
        self._records.add(task)  # one a client at most, so MAX_CONNECTIONS bounds it
        task.add_done_callback(self._records.discard)

    async def _record(self, client: Client, disk: Disk, offset: int, length: int) -> None:
        failure: OSError | None = None
        try:
            await self.ladder.touched[disk.index].record(offset, length)
        except OSError as error:
            _log.error(
                "disk %s: a touched region can't be recorded: %s", disk.name, error, extra=fields(disk=disk.name)
            )
            failure = error
        client.recorded(failure)

    def _show_files(self) -> None:
        if self._keepers is None:
            return
        session.settle(self._keepers, set(self._files))
        if self._files:
            self._keepers.mkdir(mode=0o700, exist_ok=True)
        for name, file in self._files.items():
            time_ns = self.ladder.log.now_ns()
            front = FuseFront(self, self.disks[name], file, keeper=self._keepers / name, time_ns=time_ns)
            self._fronts.append(front)
            front.open()

    async def _serve(self, name: str, address: Address) -> None:
        loop = asyncio.get_running_loop()
        try:
            if isinstance(address, Path):
                _remove_stale_socket(address)
                policy = Tls.OFFERED if self.tls is not None else Tls.NONE
                server = await loop.create_unix_server(lambda: Connection(self, policy), address)
                os.chmod(address, stat.S_IRUSR | stat.S_IWUSR)
                self.addresses[name] = address
            else:
                remote = address[0] not in LOOPBACK
                assert self.tls is not None or not remote, "the settings allow no address off this machine without TLS"
                policy = Tls.NONE if self.tls is None else Tls.REQUIRED if remote else Tls.OFFERED
                server = await loop.create_server(lambda: Connection(self, policy), *address)
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
            for client, _, handle in waiting:
                client.answer(handle, error)

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
                _log.error("disk %s can't be made durable: %s", disk.name, error, extra=fields(disk=disk.name))
                self.ladder.flush_failed(disk.index)
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
