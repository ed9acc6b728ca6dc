"""Serves disks of a view over NBD: at a Unix socket, or at an address of TCP, elsewhere than on this machine with TLS.

Every address serves every disk by its name; a client that names none gets the only disk there is. A flush on one
connection covers what any connection was told is done, so clients may use several.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from recovery.export.connection import Connection
from recovery.export.disk import ServedDisk
from replicar.errors import PermanentError
from replicar.nbd.protocol import LOOPBACK, Tls

MAX_CONNECTIONS: Final = 64
#: Bytes of reads that are under way or not fetched, of all connections together.
UNDER_WAY_BYTES: Final = 64 << 20
#: A Unix socket's path, or host and port (0: a free one).
Address: TypeAlias = Path | tuple[str, int]

_log = logging.getLogger(__name__)


class ExportServer:
    """Serves while it is entered; `address` says where.

    It closes its disks at the end, and an overlay that is kept is durable then.

    Args:
        disks: at least one, each with a name of its own.
        tls: asks clients for a certificate. Offered at any address; required where one leads off this machine.
    """

    def __init__(
        self,
        disks: Sequence[ServedDisk],
        address: Address,
        *,
        tls: ssl.SSLContext | None = None,
        under_way_bytes: int = UNDER_WAY_BYTES,
    ) -> None:
        self.disks: Mapping[str, ServedDisk] = {disk.name: disk for disk in disks}
        assert len(self.disks) == len(disks) > 0, "disks have names of their own"
        self.address = address
        self.tls = tls
        self._limit, self._under_way = under_way_bytes, 0
        self._waiting: deque[Connection] = deque()
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> ExportServer:
        try:
            if isinstance(self.address, Path):
                await self._listen_at(self.address)
            else:
                await self._listen_on(*self.address)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Serve nobody any more, and close the disks.

        Raises:
            PermanentError: an overlay that should be kept may not be durable.
        """
        if self._server is not None:
            self._server.close()
            self._server = None
            if isinstance(self.address, Path):
                self.address.unlink(missing_ok=True)
        await asyncio.gather(*(connection.aclose() for connection in list(self._connections)))
        failed: list[str] = []
        for disk in self.disks.values():
            try:
                await disk.aclose()
            except OSError as error:
                failed.append(f"disk {disk.name}: {error.strerror or error}")
        if failed:
            raise PermanentError(
                f"what was written over {'; '.join(failed)}",
                hint="the overlay may lack what was written since its last flush; look for errors of its disk",
            )

    # --- what connections ask ---

    def admit(self, connection: Connection) -> bool:
        if len(self._connections) >= MAX_CONNECTIONS:
            _log.warning("more than %d NBD connections: one is refused", MAX_CONNECTIONS)
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        with contextlib.suppress(ValueError):
            self._waiting.remove(connection)

    def take(self, connection: Connection, length: int) -> bool:
        if self._under_way and self._under_way + length > self._limit:
            if connection not in self._waiting:
                self._waiting.append(connection)
            return False
        self._under_way += length
        return True

    def give_back(self, length: int) -> None:
        self._under_way -= length
        for _ in range(len(self._waiting)):
            self._waiting.popleft().resume()

    # --- addresses ---

    async def _listen_at(self, path: Path) -> None:
        _remove_stale(path)
        policy = Tls.OFFERED if self.tls is not None else Tls.NONE
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: Connection(self, policy), str(path))
            os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        except OSError as error:
            raise _cant_listen(str(path), error) from error

    async def _listen_on(self, host: str, port: int) -> None:
        remote = host not in LOOPBACK
        if remote and self.tls is None:
            raise PermanentError(
                f"disks are not served at {host} without TLS: whoever reaches it could read them",
                hint="give certificate, key and authority for TLS, or serve at a Unix socket or at 127.0.0.1",
            )
        policy = Tls.REQUIRED if remote else Tls.OFFERED if self.tls is not None else Tls.NONE
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: Connection(self, policy), host, port)
        except OSError as error:
            raise _cant_listen(f"{host}:{port}", error) from error
        self.address = (host, int(self._server.sockets[0].getsockname()[1]))


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens at; what is anything else stays, and is in the way."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return


def _cant_listen(where: str, error: OSError) -> PermanentError:
    return PermanentError(
        f"disks can't be served at {where}: {error.strerror or error}",
        hint="another export may be there; choose another address, in a directory that is yours",
        address=where,
    )
