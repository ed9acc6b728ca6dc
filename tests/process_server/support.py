"""A process server in this process: the real parts on the loopback, with a store and assignments that a test gives."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from process_server.bandwidth import Pace
from process_server.cache import SLOT_BYTES, CacheFile
from process_server.commit import Committer
from process_server.listener import Listener
from process_server.logwriter import LogLimits, Writer
from process_server.machine import Assignment, Machine, Tuning, Workshop
from process_server.recovery import find
from process_server.roster import Roster
from process_server.sealer import Sealer
from process_server.slots import Slots
from replicar.clock import SystemClock
from replicar.control.identity import Identity, Role
from replicar.formats import frame
from replicar.log.reader import LogReader
from replicar.storage.memory import MemoryStore
from replicar.storage.store import PageBlobStore
from replicar.tls import server_context
from tests.mobility_agent.wire_server import Vault
from tests.process_server.sender import Agent

KEY_ID = 7
SMALL_BLOBS = LogLimits(stripes=3, blob_bytes=16 << 20)


@dataclass
class Site:
    """A vault, one process server's identity, one machine's, and what the machine's assignment says."""

    directory: Path
    vault: Vault
    server: Identity
    machine: Identity
    data_key: bytes = field(default_factory=lambda: os.urandom(32))

    @classmethod
    def make(cls, directory: Path) -> Site:
        vault = Vault(directory)
        return cls(
            directory, vault, vault.identity(Role.PROCESS_SERVER, "ps1"), vault.identity(Role.MACHINE, "machine1")
        )

    def assignment(self, *, epoch: int = 1, machine: Identity | None = None) -> Assignment:
        machine = machine or self.machine
        return Assignment(machine.name, Writer(machine.id, epoch, KEY_ID, self.data_key, bytes(40)))

    def agent(self, port: int, machine: Identity | None = None) -> Agent:
        return Agent(machine or self.machine, self.server.id, port)


@dataclass
class Running:
    """A server that runs. `failed` gets the error that ended its committer."""

    port: int
    roster: Roster
    workshop: Workshop
    slots: Slots

    def machine(self, machine_id: uuid.UUID) -> Machine:
        machine = self.roster.find(machine_id)
        assert machine is not None
        return machine

    async def holding_nothing(self) -> None:
        """Wait until every slot is free. One that is being committed goes when that ends, stored or not."""
        while self.slots.free_bytes < self.slots.total_bytes:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    site: Site,
    store: PageBlobStore,
    *,
    cache_slots: int = 16,
    buffers: int = 16,
    tuning: Tuning | None = None,
    assignments: list[Assignment] | None = None,
    cache_path: Path | None = None,
    pace: Pace | None = None,
) -> AsyncIterator[Running]:
    """The parts of a process server around `store`; assigned: the site's machine, unless others are given."""
    await store.ensure_container()
    cache = CacheFile.open(cache_path or site.directory / "cache", cache_slots * SLOT_BYTES)
    found = find(cache)
    slots = Slots(cache.slots, buffers * (4 << 20), next_serial=found.next_serial)
    slots.claim(index for items in found.by_machine.values() for index, _ in items)
    sealer, clock = Sealer(1, pace=pace), SystemClock()
    committer = Committer(cache, slots)
    tuning = tuning or Tuning(segment_age_seconds=0.05, log=SMALL_BLOBS, reopen_seconds=0.05)
    workshop = Workshop(store, cache, slots, committer, sealer, clock, tuning)
    try:
        async with asyncio.TaskGroup() as group:
            roster = Roster(workshop, group, found.by_machine, {})
            listener = Listener(roster.find, slots, clock.monotonic)
            await listener.open("127.0.0.1", 0, server_context(site.server, require_client=True))
            commits = group.create_task(committer.run())
            await roster.apply(assignments if assignments is not None else [site.assignment()])
            try:
                yield Running(listener.port, roster, workshop, slots)
            finally:
                await listener.close()
                await roster.close()
                commits.cancel()
    finally:
        sealer.close()
        cache.close()


async def stored_frames(
    store: PageBlobStore, machine_id: uuid.UUID, data_key: bytes, *, key_id: int = KEY_ID
) -> bytearray:
    """Everything in the log, every chunk opened and every chain link checked: frames, back to back."""
    reader, data = LogReader(store, machine_id, {key_id: data_key}), bytearray()
    async for found in reader.segments():
        run = await reader.read_run(found)
        assert [item.header for _, item in frame.frames_in(run)] == list(found.table.frame_headers)
        data += run
    return data


def memory_store() -> MemoryStore:
    return MemoryStore("test")
