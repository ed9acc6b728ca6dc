"""The config server's API without HTTP: requests go from the real client to the real handlers over the world's network.

`ControlTransport` stands for `replicar.control.transport.Transport`, `ControlService` for aiohttp's application. Who
asks is who the asking process is; its certificate's serial goes along, so that the registry refuses what it has
revoked.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

from config_server import operator_routes, part_routes, parties, upkeep_routes
from config_server.api import _STATUS, Call, Context, Route
from replicar.control.message import Message
from replicar.control.transport import ANSWER_SECONDS, CONNECT_SECONDS, Transport
from replicar.errors import PermanentError, ReplicarError
from replicar.tls import PeerIdentity
from simulator.world.network import VirtualNetwork
from simulator.world.processes import Process, current

_ROUTES: Final = [
    (route, tuple(route.path.strip("/").split("/")))
    for route in part_routes.ROUTES + operator_routes.ROUTES + upkeep_routes.ROUTES
]
_Answer = tuple[int, bytes, dict[str, str]]


class ControlService:
    """A running config server, as requests find it; `services` of all of them by address."""

    def __init__(self, process: Process, context: Context) -> None:
        self.process = process
        self.context = context

    async def answer(
        self, method: str, path: str, body: bytes, query: Mapping[str, str], peer: PeerIdentity | None
    ) -> _Answer:
        """What the API says, as status, body and headers."""
        try:
            route, names = _find(method, path)
            party = None
            if route.roles is not None:
                if peer is None or peer.role not in route.roles:
                    raise PermanentError(f"may not {method} {path}", status=403)
                asking = peer
                party = await self.context.registry.run(lambda connection: parties.authorise(connection, asking))
            call = Call(body=body, names=names, query=dict(query), address="", party=party)
            reply = await route.handler(self.context, call)
            assert isinstance(reply, Message), "no part of the world listens to events"
            return 200, reply.to_json(), {}
        except ReplicarError as error:
            status = error.fields.get("status") or next(code for cls, code in _STATUS if isinstance(error, cls))
            retry = getattr(error, "retry_after_seconds", None) or error.fields.get("retry_after_seconds")
            return int(status), json.dumps(error.as_dict(), default=str).encode(), _retry_after(retry)


class ControlTransport(Transport):
    """See the module. `network` and `services` are the world's, set while it stands."""

    network: VirtualNetwork
    services: dict[str, ControlService]

    def __init__(self, address: str, context: ssl.SSLContext, *, server_hostname: str | None) -> None:
        super().__init__(address, context, server_hostname=server_hostname)
        self._open = False

    async def __aenter__(self) -> Transport:
        self._open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, str] | None = None,
        wait_seconds: float = 0.0,
    ) -> bytes:
        assert self._open, "use the client as an asynchronous context manager"
        process = current()
        assert process is not None, "only processes ask"
        try:
            async with asyncio.timeout(wait_seconds + ANSWER_SECONDS):
                service = await self._reach(process)
                peer = None
                if (who := process.identity) is not None:
                    peer = PeerIdentity(who.role, who.id, getattr(who, "serial", ""))
                status, data, headers = await self._answered(
                    process, service, service.answer(method, path, body or b"", query or {}, peer)
                )
        except (OSError, TimeoutError) as error:
            raise self._failure(error) from error
        if status != 200:
            self._raise_answer(status, data, headers)
        return data

    async def _reach(self, process: Process) -> ControlService:
        network, here, there = self.network, process.machine.name, self.host
        async with asyncio.timeout(CONNECT_SECONDS):
            await network._journey(here, there)
        service = self.services.get(there)
        if service is None or not service.process.alive:
            raise ConnectionRefusedError(111, "Connection refused")
        return service

    async def _answered(self, process: Process, service: ControlService, work: Any) -> _Answer:
        """The answer, once its way back is open."""
        network, loop = self.network, asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def done(task: asyncio.Task[_Answer]) -> None:
            if not answer.done() and not task.cancelled():
                answer.set_result(task.result())

        task: asyncio.Task[_Answer] = loop.create_task(work, context=service.process.context.copy())
        task.add_done_callback(done)
        waiting = _Waiting(task, answer)
        process.ends[waiting] = service.process.ends[waiting] = None
        try:
            found = await answer
        finally:
            process.ends.pop(waiting, None)
            service.process.ends.pop(waiting, None)
            if not task.done():
                task.cancel()
        while not network.is_open(self.host, process.machine.name):
            await asyncio.sleep(0.5)
        await asyncio.sleep(network.way(self.host, process.machine.name).delay_seconds)
        return found


class _Waiting:
    """A request under way: ends with whichever side dies."""

    def __init__(self, task: asyncio.Task[_Answer], answer: asyncio.Future[_Answer]) -> None:
        self._task, self._answer = task, answer

    def process_died(self) -> None:
        if not self._answer.done():
            self._answer.set_exception(ConnectionResetError(104, "Connection reset by peer"))
            self._answer.exception()  # seen, even if nobody waits any more


def _find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    parts = path.strip("/").split("/")
    for route, pattern in _ROUTES:
        if route.method == method and len(pattern) == len(parts):
            names: dict[str, str] = {}
            for wanted, given in zip(pattern, parts, strict=True):
                if wanted.startswith("{"):
                    names[wanted.strip("{}")] = unquote(given)
                elif wanted != given:
                    break
            else:
                return route, names
    raise PermanentError(f"no {method} {path} in this API", status=404)


def _retry_after(seconds: object) -> dict[str, str]:
    return {"Retry-After": str(int(seconds))} if isinstance(seconds, int | float) and seconds else {}
