"""Storage that is slow, away, lost, or somebody else's by now: agents wait or are told, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from process_server.cache import SLOT_BYTES
from process_server.machine import MachineState, Tuning
from process_server.stream import AHEAD_SEGMENTS
from replicar.control.identity import Role
from replicar.errors import FencedError, PermanentError
from replicar.storage.memory import MemoryStore
from replicar.storage.store import BlobInfo, Pages
from tests.process_server.sender import Agent
from tests.process_server.stores import GatedStore
from tests.process_server.support import SMALL_BLOBS, Site, memory_store, running, stored_frames

STORY_SECONDS = 30


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


async def test_a_full_cache_stops_the_agent_and_lets_it_go_on_and_loses_nothing(site: Site) -> None:
    store = GatedStore()
    async with asyncio.timeout(STORY_SECONDS), running(site, store, cache_slots=4, buffers=2) as server:
        agent = site.agent(server.port)
        agent.begin()
        last = agent.fill(60, size=1 << 20)
        machine = server.machine(agent.machine_id)
        while machine.state is not MachineState.RUNNING:
            await asyncio.sleep(0.01)
        store.gate.clear()
        sending = asyncio.create_task(agent.run(until_stored=last))
        while not server.slots.waiting:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        full = machine.counters.bytes_received
        assert full <= server.slots.total_bytes < len(agent.everything)
        await asyncio.sleep(0.3)
        assert machine.counters.bytes_received == full
        assert agent.received < last
        store.gate.set()
        await sending
        assert machine.counters.resends == 0
    assert agent.connections == 1
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


def _busy(agent: Agent) -> asyncio.Task[None]:
    """The agent sends far more than may be under way; storage was shut before."""
    return asyncio.create_task(agent.run(until_stored=agent.fill(44, size=1 << 20)))


async def test_receiving_waits_for_storing_to_catch_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("process_server.receiver.PATIENCE_SECONDS", 1000.0)
    store, tuning = GatedStore(), Tuning(uploads=1, log=SMALL_BLOBS)
    async with asyncio.timeout(STORY_SECONDS), running(site, store, tuning=tuning) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=1)
        store.gate.clear()
        sending = _busy(agent)
        counters, held = server.machine(agent.machine_id).counters, -1
        while counters.bytes_received < SLOT_BYTES or counters.bytes_received != held:
            held = counters.bytes_received
            await asyncio.sleep(0.5)
        # Those that wait, and the one that was being filled when it was seen that they are enough.
        assert held <= (tuning.cutting().in_flight + AHEAD_SEGMENTS + 1) * SLOT_BYTES < len(agent.everything)
        assert server.slots.free_bytes > 0
        store.gate.set()
        await sending
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_receiving_goes_on_without_storage_that_stands_still(site: Site) -> None:
    store, tuning = GatedStore(), Tuning(uploads=1, log=SMALL_BLOBS)
    async with asyncio.timeout(STORY_SECONDS), running(site, store, tuning=tuning, cache_slots=32) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=1)
        store.gate.clear()
        sending = _busy(agent)
        while agent.received < agent.next_sequence - 1:
            await asyncio.sleep(0.01)
        assert agent.stored < agent.received
        store.gate.set()
        await sending
    assert agent.connections == 2
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_one_machine_that_fills_the_cache_leaves_the_others_their_turn(site: Site) -> None:
    store = memory_store()
    machines = [site.vault.identity(Role.MACHINE, f"m{number}") for number in range(6)]
    assignments = [site.assignment(machine=machine) for machine in machines]
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, assignments=assignments, cache_slots=4, buffers=1) as server,
    ):
        agents = [site.agent(server.port, machine) for machine in machines]
        for agent in agents:
            agent.begin()
        lasts = [agents[0].fill(40, size=1 << 20), *(agent.fill(5) for agent in agents[1:])]
        await asyncio.gather(*(agent.run(until_stored=last) for agent, last in zip(agents, lasts, strict=True)))
    for agent in agents:
        assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_storage_that_fails_for_a_while_delays_and_loses_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("process_server.pipeline.RETRY_SECONDS", 0.02)
    store = GatedStore()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        last = agent.fill(100)
        machine = server.machine(agent.machine_id)
        while machine.state is not MachineState.RUNNING:
            await asyncio.sleep(0.01)
        store.failures = 12
        sending = asyncio.create_task(agent.run(until_stored=last))
        while machine.health().error is None:
            await asyncio.sleep(0.001)
        await sending
        assert machine.health().error is None
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_fenced_stream_is_refused_for_good_and_holds_nothing(site: Site, tmp_path: Path) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as older:
        agent = site.agent(older.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(5))
        newer_epoch = [site.assignment(epoch=2)]
        async with running(site, store, assignments=newer_epoch, cache_path=tmp_path / "cache2") as newer:
            moved = site.agent(newer.port)
            moved.frames, moved.everything = agent.frames, agent.everything
            moved.next_sequence, moved.trimmed_to = agent.next_sequence, agent.trimmed_to
            last = moved.fill(5)
            agent.next_sequence = moved.next_sequence
            agent.port = older.port
            refusal = None
            while refusal is None or refusal.error != "FencedError":
                refusal = await agent.converse()  # it hears it as soon as the older server tries to write
            await moved.run(until_stored=last)
        machine = older.machine(agent.machine_id)
        assert machine.state is MachineState.FENCED
        assert isinstance(machine.error, FencedError)
        await older.holding_nothing()
    assert await stored_frames(store, agent.machine_id, site.data_key) == moved.everything


async def test_a_hello_waits_for_its_log_and_is_told_what_is_in_the_way(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("process_server.ingest.WELCOME_SECONDS", 0.3)

    class NoContainer(MemoryStore):
        async def ensure_container(self) -> None:
            """Nobody makes it."""

    async with asyncio.timeout(STORY_SECONDS), running(site, NoContainer()) as server:
        refusal = await site.agent(server.port).converse()
        assert refusal is not None
        assert refusal.error == "PermanentError"
        assert "container" in refusal.message


async def test_a_log_that_lost_what_was_stored_is_refused_until_it_is_brought_back(site: Site) -> None:
    class Forgetful(MemoryStore):
        """Shows no blobs while they are `hidden`, as after somebody deleted them; refuses writes to them too."""

        hidden = False

        async def list(self, prefix: str) -> list[BlobInfo]:
            return [] if self.hidden else await super().list(prefix)

        async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
            await super().create(name + "?" * self.hidden, size_bytes, metadata=metadata)

        async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
            return await super().acquire_lease(name + "?" * self.hidden, proposed_id=proposed_id)

        async def delete(self, name: str, *, lease_id: str | None = None) -> None:
            await super().delete(name + "?" * self.hidden, lease_id=lease_id)

        async def put_pages(
            self,
            name: str,
            offset: int,
            data: Pages,
            *,
            lease_id: str | None = None,
            if_sequence_number_lt: int | None = None,
        ) -> None:
            if self.hidden:
                raise PermanentError(f"there is no blob {name}")
            await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)

    store = Forgetful()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(5))
        store.hidden = True
        last = agent.fill(5)
        sending = asyncio.create_task(agent.run(until_stored=last))
        machine = server.machine(agent.machine_id)
        while machine.health().state != MachineState.REFUSING:
            await asyncio.sleep(0.01)
        while server.slots.free_bytes < server.slots.total_bytes:  # a slot that is being committed goes when that ends
            await asyncio.sleep(0.01)
        while not agent.refusals:
            await asyncio.sleep(0.01)
        assert agent.refusals[-1].error == "ConflictError"
        assert [info.name for info in await MemoryStore.list(store, "") if "?" in info.name] == []
        store.hidden = False
        await sending
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_lease_that_somebody_broke_by_hand_costs_a_new_run_and_no_more(site: Site) -> None:
    store = memory_store()
    async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
        agent = site.agent(server.port)
        agent.begin()
        await agent.run(until_stored=agent.fill(5))
        for found in await store.list(""):
            await store.break_lease(found.name)
        await agent.run(until_stored=agent.fill(5))
        assert server.machine(agent.machine_id).state is MachineState.RUNNING
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything
