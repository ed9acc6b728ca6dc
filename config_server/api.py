"""The HTTP side: routes with the roles that may use them, who is asking, and errors as JSON with a status.

One port serves all. The connection is TLS 1.3 with an *optional* client certificate, since a part that is to be
enrolled has none. Every route but the public ones demands one, of a role that may use it, of a party the registry
knows; or a bearer token (see `tokens`), for programs that are no part of Replicar.

An answer may also be a stream of events, which goes on until its caller has enough. Whether he may hear it is asked
again at every sign of life, so that a revoked token or a removed party ends it.

An error travels as `ReplicarError.as_dict()`. Its status is its field `status` where it has one, or follows from its
class; `Retry-After` says when to come back where that is known.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, TypeAlias, get_type_hints

from aiohttp import web

from config_server import parties, tokens
from config_server.bells import Bells
from config_server.enrolment import AttemptLimit
from config_server.events import Events
from config_server.groups import Groups
from config_server.parties import Party
from config_server.registry import RegistryThread
from config_server.troubles import Troubles
from config_server.vault import Vault
from replicar.clock import Clock
from replicar.control.event_stream import MEDIA_TYPE, NOTHING, encode
from replicar.control.identity import Role
from replicar.control.message import Message
from replicar.control.messages import API_PREFIX, MAX_REQUEST_BYTES, Event
from replicar.errors import (
    ConflictError,
    CorruptionError,
    FencedError,
    LimitError,
    PermanentError,
    ReplicarError,
    TransientError,
)
from replicar.tls import peer_identity

#: How long a listener may leave unread what the connection holds, before it is given up.
UNREAD_SECONDS: Final = 60.0

_STATUS: Final[tuple[tuple[type[ReplicarError], int], ...]] = (
    (TransientError, 503),
    (FencedError, 403),
    (ConflictError, 409),
    (LimitError, 429),
    (CorruptionError, 500),
    (PermanentError, 400),
)


@dataclass(frozen=True, slots=True)
class Context:
    """What handlers work on."""

    vault: Vault
    registry: RegistryThread
    bells: Bells
    clock: Clock
    heartbeat_seconds: float
    events: Events
    attempts: AttemptLimit = field(default_factory=AttemptLimit)
    troubles: Troubles = field(default_factory=Troubles)
    groups: Groups = field(default_factory=Groups)


@dataclass(frozen=True, slots=True)
class Call:
    """One request: its body (bounded), its path and query, and who asks (None on the public routes)."""

    body: bytes
    names: dict[str, str]
    query: dict[str, str]
    address: str
    party: Party | None
    by_token: bool = False
    last_event_id: str = ""

    def needs_certificate(self) -> None:
        """Raises:
        PermanentError: who asks has shown a token only, which anybody can have copied.
        """
        if self.by_token:
            raise PermanentError(
                "a certificate is asked for here, not a token", hint="use the `replicar` command", status=403
            )

    def flag(self, name: str) -> bool:
        """A yes or no of the query; no, where it is not there.

        Raises:
            PermanentError: it is neither.
        """
        value = self.query.get(name, "no")
        if value not in ("yes", "no"):
            raise PermanentError(f"{name}={value!r} is neither yes nor no", hint=f"{name}=yes, or nothing", status=400)
        return value == "yes"

    def asking(self) -> Party:
        assert self.party is not None, "this route has roles"
        return self.party


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that goes on: events, and None for a sign of life."""

    events: AsyncGenerator[Event | None]


Handler: TypeAlias = Callable[[Context, Call], Awaitable[Message | Stream]]


@dataclass(frozen=True, slots=True)
class Route:
    """A way in; `roles` None means public. `request` is what its body holds, `query`, `headers` what is read there."""

    method: str
    path: str
    handler: Handler
    roles: frozenset[Role] | None
    request: type[Message] | None = None
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether its answer goes on."""
        return get_type_hints(self.handler)["return"] is Stream

    @property
    def reply(self) -> type[Message]:
        """What its answer holds, or is made of where it goes on."""
        found = get_type_hints(self.handler)["return"]
        assert isinstance(found, type)
        if found is Stream:
            return Event
        assert issubclass(found, Message)
        return found


def application(context: Context, routes: Iterable[Route]) -> web.Application:
    """The routes as an aiohttp application; long polls end when it shuts down."""
    app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[_errors])
    for route in routes:
        app.router.add_route(route.method, API_PREFIX + route.path, _handler(context, route))

    async def end_polls(_: web.Application) -> None:
        context.bells.close()

    app.on_shutdown.append(end_polls)
    return app


async def hold(bell: asyncio.Event, seconds: float) -> bool:
    """Wait for a bell, at most for `seconds`; whether it rang. A held request costs a timer and an event."""
    try:
        async with asyncio.timeout(seconds):
            await bell.wait()
    except TimeoutError:
        return False
    bell.clear()
    return True


def _handler(context: Context, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        party = None
        if route.roles is not None:
            party = await _authorised(context, request, route.roles)
        call = Call(
            body=await request.read(),
            names=dict(request.match_info),
            query=dict(request.query),
            address=request.remote or "",
            party=party,
            by_token="Authorization" in request.headers,
            last_event_id=request.headers.get("Last-Event-ID", ""),
        )
        reply = await route.handler(context, call)
        if isinstance(reply, Stream):
            return await _stream(context, request, route, reply)
        return web.Response(body=reply.to_json(), content_type="application/json")

    return handle


async def _stream(context: Context, request: web.Request, route: Route, stream: Stream) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"})
    await response.prepare(request)
    async with aclosing(stream.events) as events:
        async for event in events:
            if event is None and route.roles is not None:
                try:
                    await _authorised(context, request, route.roles)
                except ReplicarError:
                    break  # asked again, he is told why
            try:
                async with asyncio.timeout(UNREAD_SECONDS):
                    await response.write(encode(event) if event is not None else NOTHING)
            except TimeoutError:
                assert request.transport is not None, "a connection that is gone ends the handler"
                request.transport.abort()
                return response
    await response.write_eof()
    return response


async def _authorised(context: Context, request: web.Request, roles: frozenset[Role]) -> Party:
    bearer = request.headers.get("Authorization")
    if bearer is not None:
        now_ns = context.clock.now_ns()
        party = await context.registry.run(lambda connection: tokens.authorise(connection, bearer, now_ns))
        _check_role(request, party.role, roles)
        return party
    transport = request.transport
    peer = peer_identity(transport.get_extra_info("ssl_object") if transport is not None else None)
    _check_role(request, peer.role, roles)
    return await context.registry.run(lambda connection: parties.authorise(connection, peer))


def _check_role(request: web.Request, role: Role, roles: frozenset[Role]) -> None:
    if role not in roles:
        raise PermanentError(
            f"a {role} may not {request.method} {request.path}",
            hint=f"use the identity of: {', '.join(sorted(roles))}",
            status=403,
        )


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ReplicarError as error:
        return _answer(error)
    except web.HTTPRequestEntityTooLarge:
        return _answer(
            LimitError(f"a request of more than {MAX_REQUEST_BYTES} bytes", hint="report less at once", status=413)
        )
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
        hint = "the two parts may be of different versions: compare `--version` on both"
        return _answer(
            PermanentError(f"no {request.method} {request.path} in this API", hint=hint, status=error.status_code)
        )


def _answer(error: ReplicarError) -> web.Response:
    status = error.fields.get("status") or next(code for cls, code in _STATUS if isinstance(error, cls))
    retry = getattr(error, "retry_after_seconds", None) or error.fields.get("retry_after_seconds")
    headers = {"Retry-After": str(int(retry))} if retry else None
    body = json.dumps(error.as_dict(), default=str).encode()
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
