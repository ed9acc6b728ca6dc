"""Listening: what happens in the vault, as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from config_server import parties
from config_server.api import Call, Context, Route, Stream, hold
from config_server.bells import EVERYBODY, Topic
from config_server.rights import PEOPLE
from replicar.control.messages import Event, EventKind
from replicar.errors import LimitError

#: Listeners at once; each costs a connection, and a place in the ring.
MAX_LISTENERS: Final = 256


async def get_events(context: Context, call: Call) -> Stream:
    """Server-sent events from here on, or from behind `Last-Event-ID`; of one machine (`?machine=`), or of all."""
    name = call.query.get("machine")
    if name is not None:
        await context.registry.run(lambda connection: parties.machine_named(connection, name))
    if context.events.listeners >= MAX_LISTENERS:
        raise LimitError(f"{MAX_LISTENERS} listen already", hint="try again in a minute", status=503)
    await context.events.look(context.registry, context.troubles)  # what has changed before that is no news
    return Stream(_told(context, name, context.events.begin(call.last_event_id)))


async def _told(context: Context, machine: str | None, place: int) -> AsyncGenerator[Event | None]:
    events, loop = context.events, asyncio.get_running_loop()
    events.listeners += 1
    try:
        with context.bells.listen(Topic.EVENTS, EVERYBODY) as bell:
            said = loop.time()
            yield None
            while not context.bells.closed:
                found, place = events.since(place)
                for event in found:
                    if machine in (None, event.machine) or event.kind is EventKind.MISSED:
                        said = loop.time()
                        yield event
                if loop.time() - said >= events.alive_seconds:
                    said = loop.time()
                    yield None
                await hold(bell, min(events.look_seconds, max(said + events.alive_seconds - loop.time(), 0.0)))
                await events.look(context.registry, context.troubles)
    finally:
        events.listeners -= 1


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/events", get_events, PEOPLE, query=("machine",), headers=("Last-Event-ID",)),
)
