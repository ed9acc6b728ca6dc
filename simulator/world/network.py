"""The network between machines: who listens where, and what stands between two of them.

A machine's name is its address; `127.0.0.1` is the machine that asks. Between every two machines, in each direction, is
a `Way` with a delay, a rate, and whether anything passes at all: what does not pass is not lost but late, as TCP makes
it, unless the connection is reset meanwhile. Connections themselves are in `connections`.

TLS is left out: the names that it would verify are compared, the bytes go as they are. The handshakes, certificates and
records are tried by the tests that use sockets.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from simulator.world.connections import End, Pipe, Shown
from simulator.world.loop import VirtualLoop
from simulator.world.processes import Machine, Process, current

#: How often a connection that can't be made is tried again below, as TCP repeats its SYN.
_AGAIN_SECONDS: Final = 0.5
#: A silent connection to a machine that is gone ends by itself after so long.
KEEPALIVE_SECONDS: Final = 60.0
_HERE: Final = ("127.0.0.1", "localhost", "::1")
Factory = Callable[[], asyncio.BaseProtocol]


@dataclass(slots=True)
class Way:
    """From one machine to another."""

    delay_seconds: float = 0.0005
    bytes_per_second: float = 100e6
    is_open: bool = True


class Server:
    """A listening port, as asyncio shows one."""

    def __init__(self, network: VirtualNetwork, process: Process, factory: Factory, port: int, *, tls: bool) -> None:
        self.process, self.factory, self.port, self.tls = process, factory, port, tls
        self.sockets = (self,)
        self._network = network
        process.ends[self] = None

    def getsockname(self) -> tuple[str, int]:
        return self.process.machine.name, self.port

    def close(self) -> None:
        self.process.ends.pop(self, None)
        self._network.closed(self)

    async def wait_closed(self) -> None:
        """It is closed at once."""

    def process_died(self) -> None:
        self._network.closed(self)


class VirtualNetwork:
    """All machines' network.

    Args:
        randomness: draws delays, and into what pieces a stream falls.
        note: told what happens, for the trace.
    """

    def __init__(self, loop: VirtualLoop, randomness: random.Random, note: Callable[[str], None]) -> None:
        self.loop = loop
        self.randomness = randomness
        self.note = note
        self.machines: dict[str, Machine] = {}
        self.ends: dict[End, None] = {}
        self._ways: dict[tuple[str, str], Way] = {}
        self._servers: dict[tuple[str, int], Server] = {}
        self._next_port = 40000

    def way(self, source: str, target: str) -> Way:
        return self._ways.setdefault((source, target), Way())

    def is_open(self, source: str, target: str) -> bool:
        return source == target or self.way(source, target).is_open

    # --- what faults do ---

    def shut(self, source: str, target: str) -> None:
        """Nothing passes from here to there until `reopen`."""
        self.way(source, target).is_open = False

    def reopen(self, source: str, target: str) -> None:
        """What was held up goes on."""
        way = self.way(source, target)
        way.is_open, way.delay_seconds, way.bytes_per_second = True, Way().delay_seconds, Way().bytes_per_second
        for end in list(self.ends):
            if end.process.machine.name == source and end.peer.process.machine.name == target:
                end.out.pump()

    def reset(self, one: str, other: str, *, one_side: bool = False) -> int:
        """Connections between the two break; with `one_side` only `one` learns of it now. How many there were."""
        found = [
            end
            for end in list(self.ends)
            if end.process.machine.name == one and end.peer.process.machine.name == other and not end.is_closed
        ]
        for end in found:
            end.break_off(ConnectionResetError(104, "Connection reset by peer"))
            if not one_side:
                end.peer.break_off(ConnectionResetError(104, "Connection reset by peer"))
        return len(found)

    # --- what the loop asks ---

    async def listen(self, factory: Factory, host: str, port: int, **options: Any) -> Server:
        process = current()
        assert process is not None, "only processes listen"
        if not port:
            self._next_port += 1
            port = self._next_port
        key = (process.machine.name, port)
        if key in self._servers:
            raise OSError(98, "Address already in use")
        server = self._servers[key] = Server(self, process, factory, port, tls=options.get("ssl") is not None)
        return server

    def closed(self, server: Server) -> None:
        key = (server.process.machine.name, server.port)
        if self._servers.get(key) is server:  # else a later process listens there
            del self._servers[key]

    async def connect(
        self, factory: Factory, host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        process = current()
        assert process is not None, "only processes connect"
        source, target = process.machine.name, process.machine.name if host in _HERE else host
        if target not in self.machines:
            raise OSError(113, f"No route to host {host}")
        tls = options.get("ssl") is not None
        for _ in range(3 if tls else 1):  # the handshakes' journeys
            await self._journey(source, target)
        server = self._servers.get((target, port))
        if server is None:
            raise ConnectionRefusedError(111, "Connection refused")
        if tls:
            _verify(server, options.get("server_hostname"))
        accepted: asyncio.Future[End] = self.loop.create_future()
        ours = End(self, process, factory())
        self.loop.call_soon(self._accept, server, ours, accepted, context=server.process.context)
        try:
            theirs = await accepted
        except asyncio.CancelledError:
            ours.is_closed = True
            raise
        ours.begin(theirs, _shown(server.process) if tls else None)
        return ours, ours.protocol

    def _accept(self, server: Server, client: End, accepted: asyncio.Future[End]) -> None:
        if client.is_closed or accepted.done():
            return
        process = server.process
        if (process.machine.name, server.port) not in self._servers or not process.alive:
            accepted.set_exception(ConnectionRefusedError(111, "Connection refused"))
            return
        end = End(self, process, server.factory())
        client.peer, end.peer = end, client
        client.out, end.out = Pipe(self, client, end), Pipe(self, end, client)
        end.begin(client, _shown(client.process) if server.tls else None)
        accepted.set_result(end)

    async def _journey(self, source: str, target: str) -> None:
        """There and back, when the ways are open and somebody is there."""
        there, back = self.way(source, target), self.way(target, source)
        await asyncio.sleep((there.delay_seconds + back.delay_seconds) * self.randomness.uniform(0.8, 1.5))
        while not (self.is_open(source, target) and self.is_open(target, source) and self.machines[target].is_up):
            await asyncio.sleep(_AGAIN_SECONDS)


def _verify(server: Server, name: str | None) -> None:
    identity = server.process.identity
    if not server.tls:
        raise ssl.SSLError(1, "WRONG_VERSION_NUMBER")
    if name is not None and (identity is None or identity.dns_name != name):
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: Hostname mismatch")


def _shown(process: Process) -> Shown:
    """What a process's certificate says of it."""
    identity = process.identity
    return Shown(
        {"subjectAltName": (("DNS", identity.dns_name),), "serialNumber": getattr(identity, "serial", "")}
        if identity is not None and isinstance(identity.id, uuid.UUID)
        else None
    )
