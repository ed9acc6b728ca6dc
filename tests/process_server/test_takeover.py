"""Taking a log over: torn ends, ends that were cut off or put back, and what another server knew to be stored."""

from __future__ import annotations

import asyncio
import copy
import os
from dataclasses import replace
from pathlib import Path

import pytest

from process_server.cache import PAGE_BYTES, SLOT_BYTES
from process_server.machine import Machine, MachineState, Tuning
from replicar.errors import ConflictError
from replicar.formats.logblob import BlobName
from replicar.log.reader import LogReader
from replicar.log.tail import Stored
from replicar.storage.memory import MemoryStore
from replicar.storage.store import Pages
from tests.process_server.sender import Agent
from tests.process_server.stores import GatedStore, LateStore
from tests.process_server.support import KEY_ID, SMALL_BLOBS, Running, Site, running, stored_frames

STORY_SECONDS = 30
ONE_BY_ONE = Tuning(segment_age_seconds=0.05, uploads=1, log=SMALL_BLOBS, reopen_seconds=0.05)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


class TearingStore(MemoryStore):
    """Once `torn` is set, a Put Page writes all but its second page and never answers: its writer dies at it."""

    def __init__(self) -> None:
        super().__init__()
        self.torn = False
        self.tears = asyncio.Semaphore(0)

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        if not self.torn or len(data) <= 4 * 512:
            await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)
            return
        view = memoryview(data)
        await super().put_pages(name, offset, view[:512], lease_id=lease_id)
        await super().put_pages(name, offset + 1024, view[1024:], lease_id=lease_id)
        self.tears.release()
        await asyncio.Event().wait()


async def walked(site: Site, store: MemoryStore) -> int:
    """The last segment that a walk over tables finds."""
    reader = LogReader(store, site.machine.id, {KEY_ID: site.data_key})
    async for _ in reader.segments():
        pass
    return reader.tail.number


@pytest.mark.parametrize("cache", ["kept", "lost"])
async def test_uploads_torn_by_a_death_are_not_taken_for_stored(site: Site, tmp_path: Path, cache: str) -> None:
    store = TearingStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store) as server:
            agent = site.agent(server.port)
            agent.begin()
            await agent.run(until_stored=agent.fill(3))
            before = await walked(site, store)
            store.torn = True
            last = agent.fill(12, size=1 << 20)
            sending = asyncio.create_task(agent.run())
            for _ in range(3):
                await store.tears.acquire()
            acknowledged = agent.stored
            sending.cancel()
            await asyncio.wait([sending])
        assert await walked(site, store) >= before + 3, "the tables of the torn segments are sound"
        assert agent.stored == acknowledged < last

        store.torn = False
        path = tmp_path / ("cache" if cache == "kept" else "another")
        async with running(site, store, cache_path=path) as server:
            agent.port = server.port
            await agent.run(until_stored=last)
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def _stored_by(server: Running, agent: Agent) -> Stored:
    health = server.machine(agent.machine_id).health()
    return Stored(health.stored_segment, health.stored_sequence, bytes.fromhex(health.stored_digest))


async def _state(machine: Machine, *states: MachineState) -> None:
    while machine.state not in states:
        await asyncio.sleep(0.01)


async def test_another_server_finds_out_that_a_log_was_put_back_to_an_older_state(site: Site, tmp_path: Path) -> None:
    store = MemoryStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store) as server:
            agent = site.agent(server.port)
            agent.begin()
            await agent.run(until_stored=agent.fill(3))
            older = copy.deepcopy(store._blobs)
            await agent.run(until_stored=agent.fill(3))
            known = await _stored_by(server, agent)
        newer, store._blobs = store._blobs, older

        assignment = replace(site.assignment(), stored=known)
        async with running(site, store, cache_path=tmp_path / "another", assignments=[assignment]) as server:
            machine = server.machine(agent.machine_id)
            await _state(machine, MachineState.REFUSING)
            assert machine.error is not None
            assert isinstance(machine.error, ConflictError)
            assert f"segment {known.number} was stored" in machine.error.message
            agent.port = server.port
            last = agent.fill(2)
            refusal = await agent.converse(until_stored=last)
            assert refusal is not None
            assert refusal.error == "ConflictError"
            store._blobs = newer  # somebody brings it back
            await agent.run(until_stored=last)
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_another_server_finds_out_that_segments_were_replaced(site: Site, tmp_path: Path) -> None:
    store = MemoryStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store) as server:
            agent = site.agent(server.port)
            agent.begin()
            await agent.run(until_stored=agent.fill(3))
            known = await _stored_by(server, agent)
        assignment = replace(site.assignment(), stored=replace(known, digest=bytes(32)))
        async with running(site, store, cache_path=tmp_path / "another", assignments=[assignment]) as server:
            machine = server.machine(agent.machine_id)
            await _state(machine, MachineState.REFUSING)
            assert machine.error is not None
            assert f"segment {known.number} is not the one that was reported as stored" in machine.error.message


async def test_what_the_config_server_says_late_still_counts(site: Site, tmp_path: Path) -> None:
    store = MemoryStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store) as server:
            agent = site.agent(server.port)
            agent.begin()
            await agent.run(until_stored=agent.fill(2))
            older = copy.deepcopy(store._blobs)
            await agent.run(until_stored=agent.fill(2))
            known = await _stored_by(server, agent)
            # What is known already changes nothing for a machine that runs.
            machine = server.machine(agent.machine_id)
            await server.roster.apply([replace(site.assignment(), stored=known)])
            assert server.machine(agent.machine_id) is machine
            assert machine.state is MachineState.RUNNING
        store._blobs = older
        async with running(site, store, cache_path=tmp_path / "another") as server:
            await _state(server.machine(agent.machine_id), MachineState.RUNNING)
            await server.roster.apply([replace(site.assignment(), stored=known)])
            await _state(server.machine(agent.machine_id), MachineState.REFUSING)


async def test_an_agent_that_comes_back_while_damage_is_being_cut_out_is_told_where_to_go_on(site: Site) -> None:
    """It used to be welcomed behind the damage, and what it sent there was stored with a hole before it."""
    store = GatedStore()
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=16, buffers=1, tuning=ONE_BY_ONE) as server,
    ):
        agent = site.agent(server.port)
        agent.begin()
        last = agent.fill(30, size=1 << 20)
        machine = server.machine(agent.machine_id)
        await _state(machine, MachineState.RUNNING)
        store.gate.clear()
        sending = asyncio.create_task(agent.run())
        while agent.received < last:
            await asyncio.sleep(0.01)
        stream = machine.stream
        assert stream is not None
        cold = [slot for slot in stream.slots if slot.buffer is None]
        with (site.directory / "cache").open("r+b") as file:
            file.seek(cold[-2].index * SLOT_BYTES + PAGE_BYTES + 100_000)
            file.write(os.urandom(16))
        store.gate.set()
        while machine._damage is None:
            await asyncio.sleep(0)
        store.gate.clear()  # the log can't be opened again for a while
        connections = agent.connections
        last = agent.fill(3)
        while agent.connections == connections or machine._agent is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        store.gate.set()
        while agent.stored < last:
            await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.wait([sending])
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_dead_servers_late_creation_does_not_end_its_successors_service(site: Site, tmp_path: Path) -> None:
    store = LateStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store) as server:
            agent = site.agent(server.port)
            agent.begin()
            await agent.run(until_stored=agent.fill(3))
        store.late = [BlobName(site.machine.id, 1, 2, 0)]  # it had asked for its next run when it died
        async with running(site, store, cache_path=tmp_path / "another") as server:
            agent.port = server.port
            await agent.run(until_stored=agent.fill(3))
            machine = server.machine(site.machine.id)
            assert (machine.state, machine.error) == (MachineState.RUNNING, None)
        assert not store.late
        assert await stored_frames(store, site.machine.id, site.data_key) == agent.everything
