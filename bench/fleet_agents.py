"""Many light agents in one process: `python -m bench.fleet_agents --identities DIRECTORY ... NAMES`.

Each is an agent as far as the wire can tell: its own certificate, TLS 1.3, HELLO, frames of captured writes with the
times of their capture, RESEND honoured, ACK read, everything kept until it is *stored*, a new connection when one ends.
What it has not got is a disk: a write is captured when its time has come, from a pool of mixed data. What lies in its
log counts from then on, so a server that does not read makes it older, as a real one would.

One that is *greedy* captures as much as its log holds, always. Every log is bounded; a modest one that is full is
counted, since its machine would have lost order there.

Prints `fleet: N connected` when all stream, begins at SIGUSR1, stops capturing at SIGUSR2, and ends when all that was
captured is stored, with one JSON object about it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import ssl
import time
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import uvloop

from bench import data as content, writes
from replicar.control.identity import Identity
from replicar.errors import ReplicarError
from replicar.formats import frame, record, wire
from replicar.formats.frame import Flag, Kind
from replicar.formats.wire import Ack, Hello, Refusal, Resend, Welcome
from replicar.memory import keep_memory
from replicar.tls import Role, client_context, server_name
from simulator import workloads
from simulator.workloads import Workload

WRITE_BYTES: Final = 4096
#: Bytes that an agent holds until they are stored.
LOG_BYTES: Final = 16 << 20
#: The greedy one always has as many; with less, its own log and not the server would be what holds it up.
GREEDY_LOG_BYTES: Final = 128 << 20
GREEDY_FRAME_BYTES: Final = 512 << 10
DISK_BYTES: Final = 1 << 40
#: What a machine's application does; the places are drawn once, and every frame takes some that follow each other.
WORKLOAD: Final = Workload(workloads.Kind.UNIFORM, block_bytes=(WRITE_BYTES,))
PLACES: Final = 8192
DATA_BYTES: Final = 16 << 20
#: Pauses between connections, drawn evenly, so that a thousand agents are not one wave.
RECONNECT_SECONDS: Final = (0.2, 1.5)
#: Connections that one process begins at once.
HANDSHAKES: Final = 8


class LightAgent(asyncio.Protocol):
    """One machine; the protocol of whichever connection it has."""

    def __init__(
        self, identity: Identity, pool: memoryview, places: Sequence[int], frame_bytes: int, draw: random.Random
    ) -> None:
        self.machine_id = identity.id
        self.identity = identity
        self.frame_bytes = frame_bytes
        self.log_bytes = LOG_BYTES
        self.captured_bytes = self.full = self.connections = self.resends = 0
        self.streaming = asyncio.Event()
        self.lost = asyncio.Event()
        self.refusal = ""
        self._pool, self._places, self._draw = pool, places, draw
        self._log: deque[tuple[int, int, bytes]] = deque()  # first and next sequence, the frame
        self._held = 0
        self._next = 1
        self._position = 0
        self._session = wire.AgentSession()
        self._transport: asyncio.Transport | None = None
        self._can_write = False
        self._open()

    @property
    def is_stored(self) -> bool:
        return not self._log

    @property
    def has_room(self) -> bool:
        return self._held < self.log_bytes

    def capture(self) -> None:
        """A frame of writes happens now."""
        count = self.frame_bytes // WRITE_BYTES
        start = self._draw.randrange((DATA_BYTES - self.frame_bytes) // WRITE_BYTES) * WRITE_BYTES
        now = time.time_ns()
        first = self._draw.randrange(len(self._places) - count)
        table = b"".join(
            frame.describe(
                Kind.WRITE,
                offset=offset,
                length=WRITE_BYTES,
                time_ns=now,
                place=index * WRITE_BYTES,
            )
            for index, offset in enumerate(self._places[first : first + count])
        )
        self._add(table, self._pool[start : start + count * WRITE_BYTES], count)
        self.captured_bytes += self.frame_bytes
        self._send()

    def _open(self) -> None:
        disk = record.pack_record(record.Disk(0, "disk", DISK_BYTES))
        gap = record.pack_record(record.Gap("initial replication"))
        now = time.time_ns()
        table = frame.describe(Kind.DISK, length=len(disk), time_ns=now)
        table += frame.describe(Kind.GAP, length=len(gap), place=len(disk), flags=Flag.GAP_BEGIN, time_ns=now)
        self._add(table, disk + gap, 2)

    def _add(self, table: bytes, payload: bytes | memoryview, count: int) -> None:
        data = frame.build_frame(self.machine_id, self._next, table, payload)
        self._log.append((self._next, self._next + count, data))
        self._next += count
        self._held += len(data)

    def _send(self) -> None:
        """Hand over what follows, as long as the connection takes it."""
        if not self._can_write or self._transport is None or not self._position:
            return
        for first, following, data in self._log:
            if first < self._position:
                continue
            self._transport.write(data)
            self._position = following
            if self._is_paused():
                return

    def _is_paused(self) -> bool:
        return not self._can_write  # a write may have changed it

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._session, self._position, self._can_write = wire.AgentSession(), 0, True
        self.connections += 1
        first = self._log[0][0] if self._log else self._next
        self._transport.write(self._session.hello(Hello(self.machine_id, first, self._next)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.streaming.clear()
        self.lost.set()

    def pause_writing(self) -> None:
        self._can_write = False

    def resume_writing(self) -> None:
        self._can_write = True
        self._send()

    def data_received(self, data: bytes) -> None:
        for message in self._session.receive(data):
            if isinstance(message, Refusal):
                self.refusal = f"{message.error}: {message.message}"
            elif isinstance(message, Welcome | Resend):
                self._position = message.next_sequence
                self.resends += isinstance(message, Resend)
                self.streaming.set()
            if isinstance(message, Welcome | Ack):
                self._trim(message.stored_sequence)
        self._send()

    def _trim(self, stored: int) -> None:
        while self._log and self._log[0][1] <= stored + 1:
            self._held -= len(self._log.popleft()[2])

    async def stay(self, port: int, server_id: uuid.UUID, gate: asyncio.Semaphore) -> None:
        """Connect, and again whenever the connection ends."""
        loop, trust = asyncio.get_running_loop(), client_context(self.identity)
        while True:
            self.lost.clear()
            try:
                async with gate:
                    await loop.create_connection(
                        lambda: self,
                        "127.0.0.1",
                        port,
                        ssl=trust,
                        server_hostname=server_name(Role.PROCESS_SERVER, server_id),
                    )
                await self.lost.wait()
            except (OSError, ssl.SSLError, ReplicarError) as error:
                self.refusal = str(error)
            await asyncio.sleep(self._draw.uniform(*RECONNECT_SECONDS))


async def modest(agent: LightAgent, seconds: float, stop: asyncio.Event, draw: random.Random) -> None:
    """A frame every so many seconds, beginning anywhere within the first."""
    loop = asyncio.get_running_loop()
    due = loop.time() + draw.uniform(0, seconds)
    while not stop.is_set():
        await asyncio.sleep(max(0.0, due - loop.time()))
        due += seconds
        if agent.has_room:
            agent.capture()
        else:
            agent.full += 1


async def greedy(agent: LightAgent, stop: asyncio.Event) -> None:
    """As much as the log holds."""
    while not stop.is_set():
        while agent.has_room and not stop.is_set():
            agent.capture()
            await asyncio.sleep(0)
        await asyncio.sleep(0.005)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """All agents of this process, from their connections to the last of their bytes being stored."""
    draw, pool = random.Random(options.seed), content.mixed(DATA_BYTES)
    places = list(writes.places(WORKLOAD, DISK_BYTES, PLACES))
    agents = [
        LightAgent(Identity.load(options.identities / name), pool, places, options.frame_kib << 10, draw)
        for name in options.names
    ]
    if options.greedy:
        agents[0].frame_bytes, agents[0].log_bytes = GREEDY_FRAME_BYTES, GREEDY_LOG_BYTES
    begin, stop, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, begin.set)
    loop.add_signal_handler(signal.SIGUSR2, stop.set)
    gate = asyncio.Semaphore(HANDSHAKES)
    staying = [asyncio.create_task(agent.stay(options.port, options.server_id, gate)) for agent in agents]
    for agent in agents:
        await agent.streaming.wait()
    print(f"fleet: {len(agents)} connected", flush=True)
    await begin.wait()
    for agent in agents:
        agent.connections = 0 if agent.streaming.is_set() else -1  # what follows is counted
    writing = [
        asyncio.create_task(
            greedy(agent, stop) if options.greedy and agent is agents[0] else modest(agent, options.seconds, stop, draw)
        )
        for agent in agents
    ]
    await stop.wait()
    await asyncio.gather(*writing)
    print("fleet: stopped", flush=True)
    while not all(agent.is_stored for agent in agents):  # noqa: ASYNC110 - a thousand events would be no better
        await asyncio.sleep(0.05)
    for task in staying:
        task.cancel()
    return {
        "captured_bytes": sum(agent.captured_bytes for agent in agents),
        "greedy_bytes": agents[0].captured_bytes if options.greedy else 0,
        "greedy": agents[0].machine_id.int if options.greedy else 0,
        "full": sum(agent.full for agent in agents),
        "connections": sum(max(0, agent.connections) for agent in agents),
        "resends": sum(agent.resends for agent in agents),
        "refusals": sorted({agent.refusal for agent in agents if agent.refusal})[:3],
    }


def main() -> None:
    """The process; see the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet_agents", description=__doc__)
    parser.add_argument("--identities", type=Path, required=True)
    parser.add_argument("--server-id", type=uuid.UUID, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--frame-kib", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="between two frames of a modest one")
    parser.add_argument("--greedy", action="store_true", help="the first one is")
    parser.add_argument("names", nargs="+")
    keep_memory()
    print(json.dumps(uvloop.run(run(parser.parse_args()))), flush=True)


if __name__ == "__main__":
    main()
