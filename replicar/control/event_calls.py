"""Events over the config server's API, as they happen; a part of `ControlClient`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from replicar.control.caller import Caller
from replicar.control.event_stream import MEDIA_TYPE, EventReader
from replicar.control.messages import Event


class EventCalls(Caller):
    """Listening to the config server."""

    def events(
        self, machine: str | None = None, *, after: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[Event | None]]:
        """What happens from here on, of one machine or of all; None now and then, while nothing does.

        Once the context is entered nothing is missed: look at the state then, and listen afterwards. It ends when the
        config server does.

        Args:
            after: the id of the last event that was heard; what came since is told first, or `missed`.

        Raises:
            TransientError: the config server is away, or has become silent.
            PermanentError: there is no such machine; or the server is too old to tell events.
        """
        return self._events(machine, after)

    @asynccontextmanager
    async def _events(self, machine: str | None, after: str) -> AsyncIterator[AsyncIterator[Event | None]]:
        self.identity.check_dates(self._clock.now_ns())
        headers = {"Accept": MEDIA_TYPE, **({"Last-Event-ID": after} if after else {})}
        query = {"machine": machine} if machine is not None else {}
        async with self._transport.stream("/events", query=query, headers=headers) as pieces:
            yield _read(pieces)


async def _read(pieces: AsyncIterator[bytes]) -> AsyncIterator[Event | None]:
    reader = EventReader()
    async for piece in pieces:
        for event in reader.take(piece):
            yield event
