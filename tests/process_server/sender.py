"""A small agent: real frames over real TLS, everything kept until it is stored, sent again when it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from replicar.control.identity import Identity
from replicar.errors import ReplicarError
from replicar.formats import frame, wire
from replicar.formats.frame import Flag, Kind
from replicar.formats.record import Disk, Gap, pack_record
from replicar.formats.wire import Ack, Hello, Message, Refusal, Resend, Welcome
from replicar.tls import Role, client_context, server_name

START_NS = 1_790_000_000_000_000_000


def write_frame(machine_id: uuid.UUID, first_sequence: int, writes: Iterable[bytes], *, disk: int = 0) -> bytes:
    """A frame of writes, one after the other on the disk."""
    payload, table = bytearray(), bytearray()
    for number, data in enumerate(writes):
        sequence = first_sequence + number
        table += frame.describe(
            Kind.WRITE,
            disk=disk,
            offset=(sequence % 4096) * 4096,
            length=len(data),
            time_ns=START_NS + (sequence & 0xFFFF_FFFF) * 1000,
            place=len(payload),
        )
        payload += data
    return frame.build_frame(machine_id, first_sequence, bytes(table), bytes(payload))


def opening_frame(machine_id: uuid.UUID, first_sequence: int) -> bytes:
    """What a log that begins, or begins anew, says first: the disks, and a gap."""
    disk = pack_record(Disk(0, "disk0", 16 << 20))
    gap = pack_record(Gap("initial replication"))
    table = frame.describe(Kind.DISK, length=len(disk), time_ns=START_NS)
    table += frame.describe(Kind.GAP, length=len(gap), place=len(disk), flags=Flag.GAP_BEGIN, time_ns=START_NS)
    return frame.build_frame(machine_id, first_sequence, table, disk + gap)


@dataclass
class Agent:
    """Frames by first sequence, kept until stored; `sent` remembers the digest-free truth of all that ever was.

    `mangle` may change a frame's bytes on their way (once, by its first sequence), as an accident would.
    """

    identity: Identity
    server_id: uuid.UUID
    port: int = 0
    frames: dict[int, bytes] = field(default_factory=dict)
    everything: bytearray = field(default_factory=bytearray)
    next_sequence: int = 1
    trimmed_to: int = 1
    received: int = 0
    stored: int = 0
    mangle: dict[int, bytes] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    hello_first: int | None = None
    connections: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def machine_id(self) -> uuid.UUID:
        return self.identity.id

    def write(self, *writes: bytes) -> int:
        """Capture one frame; returns the sequence of its last descriptor."""
        return self.add(write_frame(self.machine_id, self.next_sequence, writes))

    def fill(self, frames: int, *, size: int = 64 << 10, compressible: bool = True) -> int:
        """Capture some frames of about `size` bytes each."""
        last, size = 0, -(-size // 1024) * 1024  # both halves whole sectors
        for _ in range(frames):
            half = os.urandom(size // 2)
            last = self.write(half + (bytes(size // 2) if compressible else os.urandom(size // 2)))
        return last

    def begin(self, *, incarnation: int = 0) -> int:
        """The stream's first frame; with a later incarnation, of a log that was lost and begun anew."""
        if incarnation:
            self.next_sequence = (incarnation << frame.INCARNATION_SHIFT) + 1
            self.frames.clear()
            self.trimmed_to = self.next_sequence
        return self.add(opening_frame(self.machine_id, self.next_sequence))

    def add(self, data: bytes) -> int:
        header = frame.read_header(data)
        assert header is not None
        self.frames[header.first_sequence] = data
        self.everything += data
        self.next_sequence = header.next_sequence
        return header.last_sequence

    async def run(self, *, until_stored: int | None = None, retry_seconds: float = 0.05) -> None:
        """Connect, send, and connect again, until everything up to `until_stored` is stored (or for ever)."""
        while until_stored is None or self.stored < until_stored:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ConnectionError):
                await self.converse(until_stored=until_stored)
            if until_stored is None or self.stored < until_stored:
                await asyncio.sleep(retry_seconds)

    async def converse(self, *, until_stored: int | None = None) -> Refusal | None:
        """One connection, until it ends or everything is stored; a refusal is returned."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.port,
            ssl=client_context(self.identity),
            server_hostname=server_name(Role.PROCESS_SERVER, self.server_id),
        )
        self.connections += 1
        session = wire.AgentSession()
        first = self.hello_first or self.trimmed_to
        writer.write(session.hello(Hello(self.machine_id, first, self.next_sequence)))
        position: int | None = None
        pending: asyncio.Task[bytes] = asyncio.create_task(reader.read(65536))
        try:
            while until_stored is None or self.stored < until_stored:
                if pending.done():
                    data = pending.result()
                    if not data:
                        return None
                    for message in session.receive(data):
                        self.messages.append(message)
                        if isinstance(message, Refusal):
                            self.refusals.append(message)
                            return message
                        if isinstance(message, Welcome | Resend):
                            position = message.next_sequence
                        if isinstance(message, Welcome):
                            self._trim(message.stored_sequence)
                        if isinstance(message, Ack):
                            self.received = message.received_sequence
                            self._trim(message.stored_sequence)
                    pending = asyncio.create_task(reader.read(65536))
                elif position is not None and position in self.frames:
                    data = self.frames[position]
                    header = frame.read_header(data)
                    assert header is not None
                    writer.write(self.mangle.pop(position, data))
                    drained = asyncio.create_task(writer.drain())
                    # A server that does not read for a while must still be heard.
                    await asyncio.wait([drained, pending], return_when=asyncio.FIRST_COMPLETED)
                    while not drained.done() and not pending.done():
                        await asyncio.wait([drained, pending], return_when=asyncio.FIRST_COMPLETED)
                    if not drained.done():
                        drained.cancel()
                    position = header.next_sequence
                else:
                    await asyncio.wait([pending], timeout=0.02)
            return None
        finally:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, ReplicarError):
                await pending
            writer.transport.abort()

    def _trim(self, stored: int) -> None:
        self.stored = max(self.stored, stored)
        ends = sorted(self.frames)
        for first in ends[: max(0, bisect_left(ends, stored + 1))]:
            header = frame.read_header(self.frames[first])
            assert header is not None
            if header.last_sequence <= stored:
                del self.frames[first]
                self.trimmed_to = header.next_sequence
