"""A small process server that speaks the real wire protocol over real TLS and does what a test tells it to.

It keeps the frames it was sent, in order, as a process server's cache does, and says what the test wants said: so
that silence, repeats, refusals and lies can be had at will. The real process server is met in the end-to-end tests.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from config_server.authority import Authority
from replicar.clock import SystemClock
from replicar.control.identity import Identity, Role, new_key, signing_request
from replicar.control.messages import AgentAssignment
from replicar.errors import CorruptionError
from replicar.formats import frame, wire
from replicar.formats.wire import Ack, Hello, Message, Refusal, Resend, Welcome
from replicar.tls import Role as PeerRole, peer_identity, server_context


class Vault:
    """An authority and the identities it vouches for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.create("test", SystemClock().now_ns())

    def identity(self, role: Role, name: str, *, party_id: uuid.UUID | None = None, incarnation: int = 0) -> Identity:
        """A new identity, saved in its own directory."""
        party_id, key_pem = party_id or uuid.uuid4(), new_key()
        issued = self.authority.issue(signing_request(key_pem), role, party_id, SystemClock().now_ns())
        return Identity(
            id=party_id,
            role=role,
            name=name,
            config_server="127.0.0.1:1",
            vault="test",
            vault_id=uuid.UUID(int=1),
            incarnation=incarnation,
            certificate_pem=issued.pem,
            authority_pem=self.authority.certificate_pem,
            key_pem=key_pem,
        ).save(self.directory / f"{name}-{uuid.uuid4().hex[:6]}")


class WireServer:
    """See the module. The attributes are what a test sets or looks at.

    `store_all` acknowledges everything received as stored too. `refusal` answers HELLO with an error. `wanted` is what
    WELCOME asks for (None: what follows the last frame). `on_frame` may return a message to send instead of keeping
    the frame. `silent` says nothing after WELCOME. While `reading` is clear nothing is read.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.frames: list[frame.Frame] = []
        self.hellos: list[Hello] = []
        self.peers: list[uuid.UUID] = []
        self.stored = 0
        self.store_all = False
        self.wanted: int | None = None
        self.refusal: Refusal | None = None
        self.silent = False
        self.on_frame: Callable[[frame.Frame], Message | None] | None = None
        self.reading = asyncio.Event()
        self.reading.set()
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def next_sequence(self) -> int:
        return self.frames[-1].header.next_sequence if self.frames else 0

    @property
    def connections(self) -> int:
        return len(self.hellos)

    def assignment(self, *, epoch: int = 1) -> AgentAssignment:
        return AgentAssignment(epoch=epoch, process_server_id=self.identity.id, host="127.0.0.1", port=self.port)

    def say(self, message: Message) -> None:
        """Send a message over every open connection."""
        for writer in self._writers:
            writer.write(wire.pack_message(message))

    def hang_up(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def received(self, sequence: int, *, seconds: float = 20.0) -> None:
        """Return when everything up to `sequence` came."""
        async with asyncio.timeout(seconds):
            while self.next_sequence <= sequence:
                await asyncio.sleep(0.005)

    async def connected(self, count: int, *, seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while self.connections < count:
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[WireServer]:
        context = server_context(self.identity, require_client=True)
        server = await asyncio.start_server(self._accepted, "127.0.0.1", port, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.hang_up()
            self.reading.set()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._converse(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the agent hung up, or we did
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = peer_identity(writer.get_extra_info("ssl_object"))
        assert peer.role is PeerRole.MACHINE
        data = b""
        while (found := wire.read_message(data)) is None:
            data += await _some(reader)
        hello, end = found
        assert isinstance(hello, Hello)
        assert end == len(data), "frames before WELCOME"
        self.peers.append(peer.id)
        self.hellos.append(hello)
        if self.refusal is not None:
            writer.write(wire.pack_message(self.refusal))
            await writer.drain()
            return
        wanted = self.wanted if self.wanted is not None else self.next_sequence or hello.first_sequence
        writer.write(wire.pack_message(Welcome(wanted, self.stored)))
        await self._receive(reader, writer)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = bytearray()
        while True:
            await self.reading.wait()
            data += await _some(reader)
            while (header := frame.read_header(data)) is not None and len(data) >= header.frame_bytes:
                raw = bytes(data[: header.frame_bytes])
                del data[: header.frame_bytes]
                try:
                    found = frame.read_frame(raw)
                except CorruptionError as error:
                    writer.write(wire.pack_message(Resend(header.first_sequence, error.message)))
                    continue
                assert found is not None
                self._take(found, writer)

    def _take(self, found: frame.Frame, writer: asyncio.StreamWriter) -> None:
        answer = self.on_frame(found) if self.on_frame is not None else None
        if answer is not None:
            writer.write(wire.pack_message(answer))
            return
        first = found.header.first_sequence
        anew = first > self.next_sequence and frame.begins_anew(found.table)
        if self.frames and first != self.next_sequence and not anew:
            return  # what was under way before a repeat
        self.frames.append(found)
        if self.store_all:
            self.stored = found.header.last_sequence
        if not self.silent:
            writer.write(wire.pack_message(Ack(found.header.last_sequence, self.stored)))


async def _some(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(1 << 20)
    if not data:
        raise asyncio.IncompleteReadError(b"", None)
    return data
