"""The listening socket and the connections that came of it.

A connection counts from the end of its TLS handshake on: what never gets that far (a port scan, a load balancer's look)
is bounded by time and by the process's open files, and a connection that was never told to a protocol ends unheard.

A machine may have a few connections at a time, a newer one beside those it replaces; more are refused, so that one
machine's certificate can't take everybody's place.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Final

from process_server.ingest import Connection
from process_server.machine import MachineFinder
from process_server.slots import Slots
from replicar.errors import LimitError, PermanentError, TransientError

#: Each costs some 100 KiB while idle; the most machines one process server is meant for is a few hundred.
MAX_CONNECTIONS: Final = 4096
MAX_CONNECTIONS_PER_MACHINE: Final = 4
HANDSHAKE_SECONDS: Final = 10.0
#: How long a connection that was told to go may take.
GOODBYE_SECONDS: Final = 2.0
BACKLOG: Final = 512


class Listener:
    """Accepts agents. `port` is the one it really listens on."""

    def __init__(self, find: MachineFinder, slots: Slots, now: Callable[[], float]) -> None:
        self.port = 0
        self._find, self._slots, self._now = find, slots, now
        self._connections: dict[Connection, None] = {}  # oldest first
        self._by_peer: Counter[uuid.UUID] = Counter()
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._server: asyncio.Server | None = None

    @property
    def connections(self) -> int:
        """How many stand now."""
        return len(self._connections)

    async def open(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """Listen; port 0 takes a free one.

        Raises:
            PermanentError: the port is taken, or the address is not this machine's.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                self._connection,
                host,
                port,
                ssl=context,
                backlog=BACKLOG,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=GOODBYE_SECONDS,
            )
        except OSError as error:
            raise _refused(error, host, port) from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Accept nobody more, tell everybody to go, and give them a moment to hear it."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.refuse(
                TransientError("this process server is shutting down", hint="the agent tries again by itself")
            )
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._nobody.wait()
        except TimeoutError:
            pass

    def _connection(self) -> Connection:
        return Connection(self._find, self._slots, self._now, self._came, self._gone)

    def _came(self, connection: Connection, peer: uuid.UUID) -> None:
        """A connection stands. Raises LimitError when there are too many."""
        self._connections[connection] = None
        self._by_peer[peer] += 1
        self._nobody.clear()
        if len(self._connections) > MAX_CONNECTIONS:
            raise LimitError(
                f"{MAX_CONNECTIONS} connections are open here already", hint="spread the machines over process servers"
            )
        if self._by_peer[peer] > MAX_CONNECTIONS_PER_MACHINE:
            raise LimitError(
                f"machine {peer} has {MAX_CONNECTIONS_PER_MACHINE} connections here already",
                hint="do several agents share one identity? Stop all but one",
            )

    def _gone(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.pop(connection, None)
        assert connection.peer is not None
        self._by_peer[connection.peer.id] -= 1
        if not self._by_peer[connection.peer.id]:
            del self._by_peer[connection.peer.id]
        if not self._connections:
            self._nobody.set()


def _refused(error: OSError, host: str, port: int) -> PermanentError:
    if error.errno == errno.EADDRINUSE:
        message, hint = f"port {port} is taken", "stop what listens there, or set another `port`; agents are told of it"
    elif error.errno == errno.EACCES:
        message, hint = f"port {port} is not allowed to this user", "choose a `port` above 1023"
    else:
        message, hint = f"can't listen on {host}:{port}: {error.strerror or error}", "check `listen_host`"
    return PermanentError(message, hint=hint, host=host, port=port)
