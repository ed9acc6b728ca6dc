"""The process server as a running thing: everything opened in order, and closed in the other.

While it runs: group commit, heartbeats, a status file, and one task per machine, all in one task group. An error of the
cache ends it (agents keep everything that is not stored, and a supervisor or a person sees the exit status); storage
that is away, or a config server that is, does not.

On SIGTERM: accept nobody, tell agents to come back later, make durable what came, upload what is pending for a bounded
time, give the leases back. What is left over waits in the cache. After SIGKILL the next start takes up where this one
was, leases and all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

from process_server import assignments
from process_server.bandwidth import Pace
from process_server.cache import CacheFile
from process_server.commit import Committer
from process_server.control import Control
from process_server.exposed import page
from process_server.health import ServerHealth, error_data, stored_before
from process_server.level import LOOK_SECONDS
from process_server.listener import Listener
from process_server.machine import Workshop
from process_server.pipeline import first_error
from process_server.recovery import find
from process_server.roster import Roster
from process_server.sealer import Sealer
from process_server.settings import Settings
from process_server.slots import Slots
from process_server.storage import Container
from process_server.vitals import Host, Vitals, read_host
from replicar.clock import Clock
from replicar.control.client import ControlClient
from replicar.control.files import PUBLIC_MODE, make_directory, write_file
from replicar.control.identity import Identity, Role
from replicar.control.messages import ProcessServerAssignment
from replicar.errors import PermanentError, ReplicarError
from replicar.observe import logs
from replicar.observe.endpoint import Endpoint
from replicar.observe.exposition import Page
from replicar.storage.retry import RetryTally
from replicar.storage.store import PageBlobStore
from replicar.storage.target import open_store
from replicar.tls import reload_certificate, server_context

CACHE_FILE: Final = "cache"
PORT_FILE: Final = "port"
STATUS_SECONDS: Final = 1.0
#: Of so many machines; of more it comes more rarely, since looking at a thousand every second takes a tenth of a core.
STATUS_MACHINES: Final = 200
#: What SIGTERM leaves for uploads; the rest stays in the cache.
DRAIN_SECONDS: Final = 10.0
#: Machines are opened when the container was looked at, or after so long in any case.
CONTAINER_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


class ProcessServer:
    """A process server from start to end.

    Args:
        store: instead of the one the settings name.
        host: reads what the kernel counts of this host.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        *,
        store: PageBlobStore | None = None,
        host: Callable[[], Host] = read_host,
    ) -> None:
        self.settings = settings
        self.roster: Roster | None = None
        self._clock = clock
        self._store = store
        self._errors: dict[str, Callable[[], ReplicarError | None]] = {}
        self._told: dict[str, str] = {}
        self._status_error: ReplicarError | None = None
        self._host = host
        self._vitals = Vitals(host)
        self._retries = RetryTally()

    async def run(self, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serve until `stop` is set.

        Args:
            ready: told the port once agents can connect.

        Raises:
            PermanentError: what the settings ask for can't be had, or the cache failed.
        """
        settings, directory = self.settings, self.settings.directory
        make_directory(directory)
        identity = _identity(directory)
        async with AsyncExitStack() as stack:
            cache = await asyncio.to_thread(CacheFile.open, directory / CACHE_FILE, settings.cache_bytes)
            stack.callback(cache.close)
            found = await asyncio.to_thread(find, cache)
            slots = Slots(cache.slots, settings.buffers_bytes, next_serial=found.next_serial)
            slots.claim(index for items in found.by_machine.values() for index, _ in items)
            pace, uploads = Pace(settings.bandwidth.schedule(), self._clock), settings.uploads_per_machine
            sealer = Sealer(settings.compression_level, uploads=uploads, pace=pace, now=self._clock.monotonic)
            stack.callback(sealer.close)
            store = self._store or open_store(settings.storage, clock=self._clock, tally=self._retries)
            await stack.enter_async_context(store)
            client = await stack.enter_async_context(ControlClient(identity, clock=self._clock))
            committer = Committer(cache, slots)
            workshop = Workshop(store, cache, slots, committer, sealer, self._clock, settings.tuning())
            try:
                async with asyncio.TaskGroup() as group:
                    self.roster = Roster(workshop, group, found.by_machine, stored_before(directory))
                    await self._serve(group, workshop, client, stop, ready)
            except BaseExceptionGroup as errors:
                raise first_error(errors) from None

    async def _serve(
        self,
        group: asyncio.TaskGroup,
        workshop: Workshop,
        client: ControlClient,
        stop: asyncio.Event,
        ready: Callable[[int], None],
    ) -> None:
        settings, roster, directory = self.settings, self.roster, self.settings.directory
        assert roster is not None
        context = server_context(client.identity, require_client=True)
        listener = Listener(roster.find, workshop.slots, self._clock.monotonic)
        await listener.open(settings.listen_host, settings.port, context)
        background: list[asyncio.Task[None]] = []
        try:
            write_file(directory / PORT_FILE, f"{listener.port}\n".encode(), mode=PUBLIC_MODE)
            commits = group.create_task(workshop.committer.run(), name="commit")
            container = Container(workshop.store, directory, settings.storage, self._clock)
            background.append(group.create_task(container.run(), name="container"))
            with suppress(TimeoutError):
                async with asyncio.timeout(CONTAINER_SECONDS):
                    await container.looked.wait()
            last = assignments.load(directory)
            if last is not None:
                await roster.apply(assignments.read_assignments(last.assignments), final=False)
            control = Control(
                client,
                directory,
                health=lambda: self._health(workshop, listener.port),
                apply=self._apply,
                renewed=lambda renewed: reload_certificate(context, renewed),
                heartbeat_seconds=settings.heartbeat_seconds,
                clock=self._clock,
            )
            self._errors = {
                "config server": lambda: control.error,
                "storage": lambda: container.error,
                "status file": lambda: self._status_error,
                "cache": lambda: workshop.committer.error,
            }
            background.append(group.create_task(control.run(), name="control"))
            background.append(group.create_task(self._report(workshop, listener.port), name="status"))
            background.append(group.create_task(self._choose(workshop), name="level"))

            async def collect() -> Page:
                health = self._health(workshop, listener.port)
                return page(health, workshop, connections=listener.connections, retries=self._retries.failures)

            async with Endpoint(settings.metrics_listen, collect):
                ready(listener.port)
                await stop.wait()
        finally:
            await listener.close()
        await self._drain(workshop, roster)
        for task in background:
            task.cancel()
        last_health = self._health(workshop, listener.port)  # while the machines still know how far they are
        await roster.close()
        commits.cancel()
        try:
            last_health.save(directory)
        except PermanentError as error:
            _log.warning("the last status can't be written: %s", error)  # it is a lower bound, and an older one will do

    async def _drain(self, workshop: Workshop, roster: Roster) -> None:
        _log.info("stopping: storing what is pending, for %d s at most; the rest stays in the cache", DRAIN_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await workshop.committer.flushed()
                await roster.drain()

    async def _apply(self, messages: tuple[ProcessServerAssignment, ...]) -> None:
        assert self.roster is not None
        await self.roster.apply(assignments.read_assignments(messages))

    def _health(self, workshop: Workshop, port: int) -> ServerHealth:
        assert self.roster is not None
        errors = {part: error_data(look()) for part, look in self._errors.items()}
        return ServerHealth(
            time_ns=self._clock.now_ns(),
            host=self.settings.advertised_host(),
            port=port,
            cache_bytes=workshop.slots.total_bytes,
            cache_bytes_free=workshop.slots.free_bytes,
            cache_level=str(workshop.slots.level),
            upload_limit=workshop.sealer.gate.rate,
            compression_level=workshop.sealer.level,
            machines=tuple(machine.health() for machine in self.roster.machines()),
            errors={part: data for part, data in errors.items() if data is not None},
            signals=self._vitals.signals(workshop.slots.free_bytes, workshop.slots.total_bytes),
        )

    async def _choose(self, workshop: Workshop) -> None:
        """See now and then how hard to compress."""
        while True:
            workshop.sealer.look(self._host())
            await self._clock.sleep(LOOK_SECONDS)

    async def _report(self, workshop: Workshop, port: int) -> None:
        """Write the status file, and say on the log when an error comes or goes."""
        while True:
            health = self._health(workshop, port)
            pending = sum(machine.pending_bytes for machine in health.machines)
            stored = sum(machine.counters.bytes_stored for machine in health.machines)
            self._vitals.sample(self._clock.monotonic(), pending, stored)
            try:
                await asyncio.to_thread(health.save, self.settings.directory)
                self._status_error = None
            except PermanentError as error:  # a full disk, say: the cache has its space, so the data path goes on
                self._status_error = error
            self._tell(health)
            await self._clock.sleep(STATUS_SECONDS * max(1.0, len(health.machines) / STATUS_MACHINES))

    def _tell(self, health: ServerHealth) -> None:
        errors = dict(health.errors)
        named: dict[str, dict[str, str]] = {}
        for machine in health.machines:
            if machine.error is not None:
                errors[f"machine {machine.name}"] = machine.error
                named[f"machine {machine.name}"] = {"machine": machine.name, "machine_id": str(machine.machine_id)}
        now = {part: str(error["message"]) for part, error in errors.items()}
        for part, message in now.items():
            if self._told.get(part) != message:
                hint = errors[part]["hint"]
                facts = {name: value for name, value in errors[part].items() if name != "message" and value}
                extra = logs.fields(**{**facts, **named.get(part, {})})
                _log.warning("%s: %s%s", part, message, f"; {hint}" if hint else "", extra=extra)
        for part in self._told.keys() - now.keys():
            _log.info("%s: well again", part)
        self._told = now


def _identity(directory: Path) -> Identity:
    identity = Identity.load(directory)
    if identity.role is not Role.PROCESS_SERVER:
        raise PermanentError(
            f"{directory} holds the identity of a {identity.role}",
            hint="enrol this process server into a directory of its own: `process-server enrol --help`",
            path=str(directory),
        )
    return identity
