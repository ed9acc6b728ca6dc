"""The cache in use: read back when memory is short, taken up after a death, damaged, or refused by the disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from pathlib import Path

import pytest

from process_server.cache import PAGE_BYTES, SLOT_BYTES
from process_server.machine import MachineState, Tuning
from replicar.control.identity import Role
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
        running(site, store, cache_slots=32, buffers=2, tuning=TUNING) as server,
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
            await server.holding_nothing()
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def test_a_byte_damaged_in_the_cache_is_asked_for_again_and_never_uploaded(site: Site) -> None:
    store = GatedStore()
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=32, buffers=1, tuning=TUNING) as server,
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


async def test_a_part_of_the_cache_that_cannot_be_read_is_asked_for_again_and_nothing_behind_it_is_skipped(
    site: Site,
) -> None:
    """The file's end, cut off, stands in for a bad sector: the kernel gives nothing back for those bytes either."""
    store = GatedStore()
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=32, buffers=1, tuning=TUNING) as server,
    ):
        agent, last = await received_only(site, store, server, 30)
        machine = server.machine(agent.machine_id)
        assert machine.stream is not None
        cold = [slot for slot in machine.stream.slots if slot.buffer is None]
        os.truncate(site.directory / "cache", cold[-2].index * SLOT_BYTES + PAGE_BYTES + 100_000)
        store.gate.set()
        await agent.run(until_stored=last)
        assert machine.counters.frames > 31  # some of them twice
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


@pytest.mark.needs_root
async def test_a_full_disk_under_the_cache_is_survived_and_what_is_in_memory_is_stored(
    site: Site, tmp_path: Path
) -> None:
    """A real disk that promised space and has none: all that was preallocated is punched out, and taken by others."""
    store, mount = GatedStore(), tmp_path / "small"
    mount.mkdir()
    if await _command("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", mount):
        pytest.skip("no mounting here")
    try:
        async with (
            asyncio.timeout(STORY_SECONDS),
            running(site, store, cache_slots=8, cache_path=mount / "cache", tuning=TUNING) as server,
        ):
            hole = ("--punch-hole", "--offset", "0", "--length", str(8 * SLOT_BYTES))
            assert not await _command("fallocate", *hole, mount / "cache")
            _fill_up(mount / "filler")
            agent = site.agent(server.port)
            agent.begin()
            await agent.run(until_stored=agent.fill(40, size=1 << 20))
            error = server.workshop.committer.error
            assert error is not None
            assert "is full" in error.message
            (mount / "filler").unlink()
            while server.workshop.committer.error is not None:
                await asyncio.sleep(0.01)
            store.gate.clear()
            last = agent.fill(3)
            sending = asyncio.create_task(agent.run())
            while agent.received < last:  # durable again
                await asyncio.sleep(0.01)
            assert agent.stored < last
            store.gate.set()
            while agent.stored < last:
                await asyncio.sleep(0.01)
            sending.cancel()
    finally:
        assert not await _command("umount", mount)
    assert await stored_frames(store, agent.machine_id, site.data_key) == agent.everything


async def _command(*words: str | Path) -> int:
    return await (await asyncio.create_subprocess_exec(*words)).wait()


def _fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


async def test_a_greedy_machine_leaves_room_in_the_cache_for_a_modest_one(site: Site) -> None:
    store = GatedStore()
    modest = site.vault.identity(Role.MACHINE, "modest")
    both = [site.assignment(), site.assignment(machine=modest)]
    async with (
        asyncio.timeout(STORY_SECONDS),
        running(site, store, cache_slots=10, buffers=4, tuning=TUNING, assignments=both) as server,
    ):
        greedy, other = site.agent(server.port), site.agent(server.port, modest)
        while any(machine.state is not MachineState.RUNNING for machine in server.roster.machines()):
            await asyncio.sleep(0.01)
        store.gate.clear()  # storage stands still, so nothing is given back
        for agent in (greedy, other):
            agent.begin()
        lasts = greedy.fill(60, size=1 << 20), other.fill(5)
        sending = [asyncio.create_task(greedy.run())]
        while not server.slots.waiting:
            await asyncio.sleep(0.01)
        sending.append(asyncio.create_task(other.run()))
        while other.received < lasts[1]:
            await asyncio.sleep(0.01)
        assert greedy.received < lasts[0]
        store.gate.set()
        while (greedy.stored, other.stored) != lasts:
            await asyncio.sleep(0.01)
        for task in sending:
            task.cancel()
    for agent in (greedy, other):
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
