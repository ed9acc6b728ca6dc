"""`Caller`: one call to the config server, from a message to a message; what all parts of `ControlClient` stand on."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import quote

from replicar.clock import Clock
from replicar.control.identity import Identity
from replicar.control.message import Message
from replicar.control.transport import Transport

_Reply = TypeVar("_Reply", bound=Message)


class Caller:
    """Calls by one identity over one transport; raises what `Transport.request` raises."""

    identity: Identity
    _clock: Clock
    _transport: Transport

    async def _get(self, path: str, reply: type[_Reply], *, query: dict[str, str] | None = None) -> _Reply:
        self.identity.check_dates(self._clock.now_ns())
        return reply.from_json(await self._transport.request("GET", path, query=query))

    async def _post(
        self,
        path: str,
        message: Message | None,
        reply: type[_Reply],
        *,
        query: dict[str, str] | None = None,
        wait_seconds: float = 0.0,
    ) -> _Reply:
        return await self._send("POST", path, message, reply, query=query, wait_seconds=wait_seconds)

    async def _put(self, path: str, message: Message, reply: type[_Reply]) -> _Reply:
        return await self._send("PUT", path, message, reply)

    async def _send(
        self,
        method: str,
        path: str,
        message: Message | None,
        reply: type[_Reply],
        *,
        query: dict[str, str] | None = None,
        wait_seconds: float = 0.0,
    ) -> _Reply:
        self.identity.check_dates(self._clock.now_ns())
        body = message.to_json() if message is not None else b""
        data = await self._transport.request(method, path, body=body, query=query, wait_seconds=wait_seconds)
        return reply.from_json(data)


def machine_path(name: str) -> str:
    """Where a machine is in the API."""
    return f"/machines/{quote(name, safe='')}"
