"""The config server as a running thing: one process, one port, one registry; ends cleanly when told to.

It renews its own certificate, there being nobody else to ask, and takes a lock on the vault's directory, since bells
ring within one process only: a second server on the same vault would leave long polls asleep.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from aiohttp import web

from config_server import data_keys, parties, routes
from config_server.api import Context, application
from config_server.bells import Bells
from config_server.events import Events
from config_server.exposed import page
from config_server.registry import RegistryThread
from config_server.rounds import ROUND_SECONDS, Rounds
from config_server.settings import ENVIRONMENT_PREFIX, Settings
from config_server.takeover import CHECK_SECONDS, Takeover
from config_server.timed import Timed
from config_server.troubles import Troubles
from config_server.vault import IDENTITY_DIRECTORY, REGISTRY_FILE, SETTINGS_FILE, Vault
from replicar.clock import Clock
from replicar.control.identity import Identity
from replicar.errors import PermanentError, ReplicarError
from replicar.observe.endpoint import Endpoint
from replicar.observe.exposition import Page
from replicar.tls import reload_certificate, server_context

#: How often the server looks whether its own certificate is due.
RENEW_CHECK_SECONDS: Final = 3600.0
#: Longer than clients keep an idle connection, so that it is they who close it.
KEEP_ALIVE_SECONDS: Final = 75.0
SHUTDOWN_SECONDS: Final = 5.0
LOCK_FILE: Final = "lock"

_log = logging.getLogger(__name__)


class ConfigServer:
    """A config server from start to end; an asynchronous context manager. `port` is the one it really listens on."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._stack = AsyncExitStack()
        self.vault = Vault.load(settings.directory)
        self._identity = Identity.load(settings.directory / IDENTITY_DIRECTORY)
        self._tls: ssl.SSLContext | None = None
        self.bells = Bells()
        self.troubles = Troubles()
        self.events = Events(self.bells, clock)
        self.registry = RegistryThread(settings.directory / REGISTRY_FILE, self.events.take)
        self.port = settings.port

    async def __aenter__(self) -> ConfigServer:
        """Listen.

        Raises:
            PermanentError: the port is taken or not allowed, or another server has the vault.
        """
        async with AsyncExitStack() as stack:
            descriptor = lock(self._settings.directory)
            stack.callback(os.close, descriptor)
            await stack.enter_async_context(self.registry)
            await self.registry.run(lambda connection: data_keys.wrap_anew(connection, self.vault))
            await self.renew_certificate()
            self._tls = server_context(self._identity, require_client=False)
            context = Context(
                vault=self.vault,
                registry=self.registry,
                bells=self.bells,
                clock=self._clock,
                heartbeat_seconds=self._settings.heartbeat_seconds,
                troubles=self.troubles,
                events=self.events,
            )
            runner = web.AppRunner(
                application(context, routes.ALL),
                access_log=None,
                handler_cancellation=True,  # a long poll ends with its connection
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                shutdown_timeout=SHUTDOWN_SECONDS,
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await self._listen(runner)

            async def collect() -> Page:
                now_ns, held = self._clock.now_ns(), self.bells.listening
                return await self.registry.run(
                    lambda connection: page(connection, self.troubles, now_ns, held_requests=held)
                )

            await stack.enter_async_context(Endpoint(self._settings.metrics_listen, collect))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def renew_certificate(self) -> bool:
        """Renew the server's own certificate if it is due; connections made from then on see the new one."""
        now_ns = self._clock.now_ns()
        if not self._identity.is_due(now_ns):
            return False
        identity = self._identity
        certificate = self.vault.authority.issue(identity.signing_request(), identity.role, identity.id, now_ns)
        await self.registry.run(lambda connection: parties.record_certificate(connection, identity.id, certificate))
        self._identity = identity.renewed(certificate.pem)
        if self._tls is not None:
            reload_certificate(self._tls, self._identity)
        _log.info("renewed the config server's own certificate")
        return True

    def keepers(self) -> tuple[Timed, ...]:
        """What is done by the clock, beside answering; each one's `run` is the caller's to run.

        The certificate has months to be renewed in, so what stands in the way is met again an hour later.
        """
        after = self._settings.takeover_seconds
        work: list[tuple[str, float, Callable[[], Awaitable[object]]]] = [
            ("the certificate's renewal", RENEW_CHECK_SECONDS, self.renew_certificate),
            ("the rounds", ROUND_SECONDS, self.rounds().go),
        ]
        if after:
            work.append(("takeover", min(CHECK_SECONDS, after), self.takeover().look))
        return tuple(Timed(*each, self.troubles, self._clock) for each in work)

    def rounds(self) -> Rounds:
        """Thresholds, the server's own jobs, drills."""
        return Rounds(self.registry, self.vault, self.bells, self._clock, self._identity.id)

    def takeover(self) -> Takeover:
        """What moves machines off dead process servers."""
        seconds = self._settings.takeover_seconds
        return Takeover(self.registry, self.bells, self._clock, self._identity.id, seconds)

    async def _listen(self, runner: web.AppRunner) -> None:
        listen, port = self._settings.listen, self._settings.port
        site = web.TCPSite(runner, listen, port, ssl_context=self._tls)
        try:
            await site.start()
        except OSError as error:
            raise _refused(error, listen, port) from error
        self.port = int(runner.addresses[0][1])


async def run(settings: Settings, clock: Clock, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
    """Serve until `stop` is set; `ready` is told the port once it listens.

    Raises:
        PermanentError: the vault can't be opened or the port not be had.
    """
    async with ConfigServer(settings, clock) as server:
        try:
            async with asyncio.TaskGroup() as group:
                keepers = [group.create_task(each.run(), name=each.part) for each in server.keepers()]
                ready(server.port)
                await stop.wait()
                for keeper in keepers:
                    keeper.cancel()
        except* ReplicarError as errors:
            raise errors.exceptions[0] from None


def lock(directory: Path) -> int:
    """Take the vault's lock, which is held until the descriptor is closed.

    Raises:
        PermanentError: a config server runs on the vault.
    """
    path = directory / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise PermanentError(
            f"another config server runs on the vault in {directory}",
            hint="stop that one first, or use another vault's directory",
            path=str(directory),
        ) from None
    return descriptor


def _refused(error: OSError, listen: str, port: int) -> PermanentError:
    setting = f"`--port`, {ENVIRONMENT_PREFIX}PORT or `port` in {SETTINGS_FILE}"
    where: dict[str, object] = {"listen": listen, "port": port}
    if error.errno == errno.EADDRINUSE:
        hint = f"stop what listens there (`ss -ltnp 'sport = :{port}'` names it), or choose another port by {setting}"
        return PermanentError(f"port {port} on {listen} is taken", hint=hint, **where)
    if error.errno == errno.EACCES:
        hint = f"ports below 1024 want root or CAP_NET_BIND_SERVICE; choose another by {setting}"
        return PermanentError(f"port {port} may not be used by this user", hint=hint, **where)
    return PermanentError(
        f"can't listen on {listen}:{port}: {error.strerror or error}",
        hint=f"check the settings `listen` and `port` ({setting})",
        **where,
    )
