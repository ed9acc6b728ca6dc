"""The cache in use: read back when memory is short, taken up after a death, damaged, or refused by the disk."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

from process_server.cache import PAGE_BYTES, SLOT_BYTES
from process_server.machine import MachineState, Tuning
from replicar.errors import PermanentError
from tests.process_server.sender import Agent
from tests.process_server.stores import GatedStore
from tests.process_server.support import SMALL_BLOBS, Running, Site, running, stored_frames

STORY_SECONDS = 30
TUNING = Tuning(segment_age_seconds=0.05, uploads=1, log=SMALL_BLOBS, reopen_seconds=0.05)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


async def received_only(site: Site, store: GatedStore, server: Running, frames: int) -> tuple[Agent, int]:
    """An agent whose frames are all in the cache and, but for what was under way, not in storage."""
    agent = site.agent(server.port)
    agent.begin()
    last = agent.fill(frames, size=1 << 20)
    machine = server.machine(agent.machine_id)
    while machine.state is not MachineState.RUNNING:
        await asyncio.sleep(0.01)
    store.gate.clear()
    sending = asyncio.create_task(agent.run())
    while agent.received < last:
        await asyncio.sleep(0.01)
    sending.cancel()
    await asyncio.wait([sending])
    return agent, last


async def test_what_has_left_memory_is_read_back_and_stored(site: Site) -> None:
    store = GatedStore()
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=16, buffers=2, tuning=TUNING) as server,
    ):
        agent, last = await received_only(site, store, server, 40)
        stream = server.machine(agent.machine_id).stream
        assert stream is not None
        assert sum(slot.buffer is None for slot in stream.slots) >= 8
        store.gate.set()
        await agent.run(until_stored=last)
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_restart_takes_up_what_was_received_and_asks_for_none_of_it_again(site: Site) -> None:
    store = GatedStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store, tuning=TUNING) as server:
            agent, last = await received_only(site, store, server, 20)
            for frames in range(3):
                agent.fill(1, size=4096 << frames)
        assert agent.stored == 0
        store.gate.set()
        async with running(site, store, tuning=TUNING) as server:
            agent.port = server.port
            agent.messages.clear()
            await agent.run(until_stored=last + 3)
            counters = server.machine(agent.machine_id).counters
            assert counters.frames == 3
            assert counters.bytes_stored == len(agent.everything)
            assert server.slots.free_bytes == server.slots.total_bytes
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_byte_damaged_in_the_cache_is_asked_for_again_and_never_uploaded(site: Site) -> None:
    store = GatedStore()
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=16, buffers=1, tuning=TUNING) as server,
    ):
        agent, last = await received_only(site, store, server, 30)
        stream = server.machine(agent.machine_id).stream
        assert stream is not None
        cold = [slot for slot in stream.slots if slot.buffer is None]
        with (site.directory / "cache").open("r+b") as file:
            place = cold[-2].index * SLOT_BYTES + PAGE_BYTES + 100_000
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
            os.fsync(file.fileno())
        store.gate.set()
        await agent.run(until_stored=last)
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_damage_in_what_an_earlier_life_received_costs_only_sending_it_again(site: Site) -> None:
    store = GatedStore()
    async with asyncio.timeout(STORY_SECONDS):
        async with running(site, store, tuning=TUNING) as server:
            agent, last = await received_only(site, store, server, 12)
        with (site.directory / "cache").open("r+b") as file:
            file.seek(1 * SLOT_BYTES + PAGE_BYTES + 1_500_000)
            file.write(b"damage")
        store.gate.set()
        async with running(site, store, tuning=TUNING) as server:
            agent.port = server.port
            await agent.run(until_stored=last)
            assert 0 < server.machine(agent.machine_id).counters.frames < 12
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_cache_disk_that_fails_ends_the_server_and_nothing_is_acknowledged_from_then_on(site: Site) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    agent = site.agent(0)
    agent.begin()

    async def serve() -> None:
        store = GatedStore()
        async with asyncio.timeout(STORY_SECONDS), running(site, store) as server:
            agent.port = server.port
            sending = asyncio.create_task(agent.run())
            while not agent.messages:
                await asyncio.sleep(0.01)
            store.gate.clear()
            # The kernel refuses every write beyond this from now on, as a broken disk would.
            resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, before[1]))
            agent.fill(20)
            try:
                await asyncio.sleep(STORY_SECONDS)
            finally:
                sending.cancel()

    try:
        with pytest.raises(ExceptionGroup) as caught:
            await serve()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [error] = caught.value.exceptions
    assert isinstance(error, PermanentError)
    assert "can't write the cache" in error.message
    assert agent.received <= 2
    assert agent.stored == 0
