"""One machine that is slow, mad or hostile, and the others beside it: they don't notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from process_server import listener
from process_server.bandwidth import Pace, Schedule
from process_server.logwriter import LogLimits
from process_server.machine import Tuning
from replicar.clock import SystemClock
from replicar.control.identity import Identity, Role
from replicar.formats import wire
from replicar.formats.wire import Hello, Refusal
from replicar.tls import client_context, server_name
from tests.process_server.stores import SlowStore
from tests.process_server.support import Running, Site, memory_store, running, stored_frames

STORY_SECONDS = 30


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


async def connect(site: Site, server: Running, identity: Identity) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(
        "127.0.0.1",
        server.port,
        ssl=client_context(identity),
        server_hostname=server_name(Role.PROCESS_SERVER, site.server.id),
    )


async def test_who_never_finishes_a_handshake_takes_nobodys_place(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 4)
    async with asyncio.timeout(STORY_SECONDS), running(site, memory_store()) as server:
        for _ in range(12):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(3))
        assert not agent.refusals


async def test_a_machine_has_a_few_connections_and_no_more(site: Site) -> None:
    other = site.vault.identity(Role.MACHINE, "other")
    assignments = [site.assignment(), site.assignment(machine=other)]
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, memory_store(), assignments=assignments) as server,
    ):
        held = [await connect(site, server, site.machine) for _ in range(listener.MAX_CONNECTIONS_PER_MACHINE)]
        reader, writer = await connect(site, server, site.machine)
        found = wire.read_message(await reader.read())
        assert found is not None
        assert isinstance(found[0], Refusal)
        assert found[0].error == "LimitError"
        agent = site.agent(server.port, other)
        agent.begin()
        await agent.run(until_stored=agent.fill(3))
        for _, each in (*held, (reader, writer)):
            each.transport.abort()


async def test_a_flood_of_rubbish_and_a_machine_that_never_reads_leave_the_others_alone(site: Site) -> None:
    store = memory_store()
    mad, deaf, well = (site.vault.identity(Role.MACHINE, name) for name in ("mad", "deaf", "well"))
    assignments = [site.assignment(machine=each) for each in (mad, deaf, well)]

    async def rave() -> None:
        rubbish = os.urandom(1 << 20)
        while True:
            with contextlib.suppress(OSError):
                _, writer = await connect(site, server, mad)
                try:
                    writer.write(wire.pack_message(Hello(mad.id, 1, 1)))
                    for _ in range(100):
                        writer.write(rubbish)
                        await writer.drain()
                finally:
                    writer.transport.abort()

    async def ignore() -> None:
        """Send frames for ever and take in no answer, until the server has no more to say to it."""
        agent = site.agent(server.port, deaf)
        agent.begin()
        reader, writer = await connect(site, server, deaf)
        reader._transport.pause_reading()  # type: ignore[attr-defined] # what StreamReader does when nobody reads
        try:
            writer.write(wire.pack_message(Hello(deaf.id, 1, 2)))
            while True:
                agent.fill(1)
                for data in agent.frames.values():
                    writer.write(data)
                agent.frames.clear()
                await writer.drain()
        except OSError:
            return
        finally:
            writer.transport.abort()

    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, assignments=assignments) as server,
    ):
        bad = [asyncio.create_task(rave()), asyncio.create_task(ignore())]
        agent = site.agent(server.port, well)
        agent.begin()
        began, slowest = asyncio.get_running_loop().time(), 0.0
        for _ in range(15):
            await agent.run(until_stored=agent.fill(2))
            now = asyncio.get_running_loop().time()
            began, slowest = now, max(slowest, now - began)
            await asyncio.sleep(0.02)
        assert not agent.refusals
        assert slowest < 5
        for task in bad:
            task.cancel()
        await asyncio.wait(bad)
    assert await stored_frames(store, well.id, site.data_key) == agent.everything


async def test_a_thin_link_is_shared_by_weight_and_a_modest_machine_hardly_waits(site: Site) -> None:
    """Two machines with more than the link takes, weights 3 and 1, and one that writes a little now and then."""
    names = ("heavy", "light", "modest")
    machines = [site.vault.identity(Role.MACHINE, name) for name in names]
    large = LogLimits(stripes=3, blob_bytes=256 << 20)  # rolling over would be in the way
    tuning = Tuning(segment_age_seconds=0.05, log=large, weights={"heavy": 3})
    store = SlowStore(25e6)  # slow enough to be what holds both up, on a busy machine too
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(
            site,
            store,
            cache_slots=64,
            buffers=32,
            tuning=tuning,
            assignments=[site.assignment(machine=each) for each in machines],
        ) as server,
    ):
        heavy, light, modest = (site.agent(server.port, each) for each in machines)
        for agent in (heavy, light, modest):
            agent.begin()
        for agent in (heavy, light):
            agent.fill(600, size=200 << 10, compressible=False)
        sending = [asyncio.create_task(agent.run()) for agent in (heavy, light)]
        counters = [server.machine(each.machine_id).counters for each in (heavy, light)]
        while min(each.bytes_stored for each in counters) < 8 << 20:
            await asyncio.sleep(0.01)
        before = [each.bytes_stored for each in counters]
        waits = []
        while counters[0].bytes_stored - before[0] < 48 << 20:
            began = asyncio.get_running_loop().time()
            await modest.run(until_stored=modest.fill(1))
            waits.append(asyncio.get_running_loop().time() - began)
            await asyncio.sleep(0.05)
        share = (counters[0].bytes_stored - before[0]) / (counters[1].bytes_stored - before[1])
        assert 2 < share < 4.5
        assert sorted(waits)[len(waits) // 2] < 1.5  # sixteen segments that are under way take 2.7 s
        for task in sending:
            task.cancel()
        await asyncio.wait(sending)


async def test_uploads_keep_to_the_schedule(site: Site) -> None:
    clock = SystemClock()
    rate = 4_000_000
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, memory_store(), pace=Pace(Schedule(rate), clock)) as server,
    ):
        agent = site.agent(server.port)
        agent.begin()
        began = clock.monotonic()
        await agent.run(until_stored=agent.fill(16, size=1 << 20, compressible=False))
        seconds = clock.monotonic() - began
        sent = server.machine(agent.machine_id).counters.bytes_uploaded
        # A second's worth is saved up, and the last segment goes out in debt.
        assert seconds >= (sent - rate - (4 << 20)) / rate
        assert seconds < sent / rate + 5
