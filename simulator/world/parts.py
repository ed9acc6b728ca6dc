"""The product's parts as processes of the world: the real services, started as their command lines start them.

What is put in their place is below them: the clock, the randomness, storage's connection, and the way of a request to
the config server (`control`). Numbers are small where only size would cost: a cache of four slots, change logs of
4 MiB, blobs that are full after three segments.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from pydantic import ByteSize, SecretStr

from config_server.api import Context
from config_server.bells import Bells
from config_server.events import Events
from config_server.registry import RegistryThread
from config_server.rounds import ROUND_SECONDS, Rounds
from config_server.timed import Timed
from config_server.troubles import Troubles
from config_server.vault import REGISTRY_FILE, Vault
from mobility_agent.service import Service
from mobility_agent.settings import AgentSettings, DiskSettings
from process_server.cache import SLOT_BYTES
from process_server.service import ProcessServer
from process_server.settings import Settings as ServerSettings
from process_server.vitals import Host
from replicar.clock import Clock
from replicar.storage.limits import LimitedStore
from replicar.storage.retry import RetryingStore, RetryPolicy
from replicar.storage.target import StorageTarget
from simulator.world.blobs import CONTAINER, BlobClient, BlobService
from simulator.world.control import ControlService
from simulator.world.processes import Process

MIB: Final = 1 << 20
NBD_PORT: Final = 10809
SERVER_PORT: Final = 9443
#: What reports come after when nothing happens; news travel at once.
HEARTBEAT_SECONDS: Final = 20.0
#: Of the config server, for the audit of what it does by the clock.
CONFIG_SERVER_ID: Final = uuid.UUID(int=1, version=4)
#: As the product's, with a shorter end: a story is a minute long.
RETRIES: Final = RetryPolicy(attempts=4, base_seconds=0.25, longest_seconds=5.0, deadline_seconds=30.0)
_TARGET: Final = StorageTarget(
    container=CONTAINER, endpoint="https://world.blob.example", shared_access_signature=SecretStr("sig=none")
)


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """What differs between the machines of two stories."""

    disks: tuple[str, ...] = ("root",)
    journal_files: int = 2
    audit_bytes_per_second: int = 256 << 10
    mark_every_seconds: int = 0
    seed_bytes_per_second: int = 0
    copy_free_space: bool = True


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """The same of process servers."""

    cache_slots: int = 4
    buffers: int = 4
    segment_age_seconds: float = 0.2
    stripes: int = 2
    uploads: int = 4
    compression_level: int = 1


@dataclass(slots=True)
class RunningAgent:
    """An agent while it runs; `service` is there from its start, `stop` asks it to end in good order."""

    process: Process
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    service: Service | None = None


async def run_agent(running: RunningAgent, plan: AgentPlan, clock: Clock, seed: int) -> None:
    """What `mobility-agent run` does."""
    running.service = Service(
        _agent_settings(running.process.machine.directory, plan), clock=clock, randomness=_draw(seed)
    )
    await running.service.run(running.stop)


async def run_server(
    process: Process, plan: ServerPlan, clock: Clock, blobs: BlobService, stop: asyncio.Event, seed: int
) -> None:
    """What `process-server run` does."""
    limited = LimitedStore(BlobClient(blobs), clock=clock)
    store = RetryingStore(limited, clock=clock, random=_draw(seed), policy=RETRIES)
    settings = _server_settings(process.machine.directory, process.machine.name, plan)
    await ProcessServer(settings, clock, store=store, host=Host).run(stop, lambda port: None)


async def run_config(
    process: Process, clock: Clock, services: dict[str, ControlService], listening: Callable[[ControlService], None]
) -> None:
    """What `config-server run` does, without its door."""
    directory = process.machine.directory / "vault"
    vault = Vault.load(directory)
    async with RegistryThread(directory / REGISTRY_FILE) as registry:
        bells = Bells()
        events = Events(bells, clock)  # nobody listens
        context = Context(
            vault=vault, registry=registry, bells=bells, clock=clock, heartbeat_seconds=HEARTBEAT_SECONDS, events=events
        )
        service = services[process.machine.name] = ControlService(process, context)
        listening(service)
        rounds = Rounds(registry, vault, bells, clock, CONFIG_SERVER_ID)
        await Timed("the rounds", ROUND_SECONDS, rounds.go, Troubles(), clock).run()


@lru_cache(maxsize=64)
def _agent_settings(directory: Path, plan: AgentPlan) -> AgentSettings:
    disks = tuple(
        DiskSettings(name=name, path=directory / f"{name}.img", nbd=f"127.0.0.1:{NBD_PORT + number}")
        for number, name in enumerate(plan.disks)
    )
    return AgentSettings(
        directory=directory / "state",
        disks=disks,
        journal_bytes=ByteSize(plan.journal_files * 4 * MIB),
        journal_file_bytes=ByteSize(4 * MIB),
        seed_bytes_per_second=ByteSize(plan.seed_bytes_per_second) if plan.seed_bytes_per_second else None,
        audit_bytes_per_second=ByteSize(plan.audit_bytes_per_second),
        mark_every_seconds=plan.mark_every_seconds,
        copy_free_space=plan.copy_free_space,
    )


@lru_cache(maxsize=64)
def _server_settings(directory: Path, name: str, plan: ServerPlan) -> ServerSettings:
    return ServerSettings(
        directory=directory / "state",
        listen_host="0.0.0.0",  # noqa: S104 - of the world's network
        port=SERVER_PORT,
        advertise_host=name,
        cache_bytes=plan.cache_slots * SLOT_BYTES,
        buffers_bytes=plan.buffers * 4 * MIB,
        compression_level=plan.compression_level,
        segment_age_seconds=plan.segment_age_seconds,
        uploads_per_machine=plan.uploads,
        log_stripes=plan.stripes,
        log_blob_bytes=16 * MIB,
        storage=_TARGET,
    )


def _draw(seed: int) -> random.Random:
    return random.Random(seed)
