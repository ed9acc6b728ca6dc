"""The connection below Microsoft's client: one call, one request.

Three habits of the libraries would send more than was asked for, behind the back of `retry.py`:

- aiohttp sends a PUT again by itself when the service hangs up (`once` gives that error another class, which it leaves
  alone), and for a rewritten position a second request after an uncertain outcome is just what must not happen;
- the client retries a torn body three times, a second apart: so every answer is read to its end in here, where a torn
  one fails once, as what it is;
- the client asks for the page ranges of the whole blob after every read of a page blob: so readers aren't told that it
  is one.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

import aiohttp
from azure.core.pipeline.transport import AioHttpTransport

from replicar.storage.route import STRAIGHT, Fixed, Route

#: Connections a store keeps to the service: four uploads for each of a few machines, and readers.
MAX_CONNECTIONS: Final = 32


class HungUp(aiohttp.ClientConnectionError):
    """The connection ended before the answer did. A class of its own, since aiohttp repeats what ends in its own."""


async def once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once: aiohttp would silently send a PUT a second time when the service hangs up."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise HungUp(type(error).__name__) from error


class OneRequestTransport(AioHttpTransport):  # type: ignore[misc]  # azure.core exports it lazily, so untyped
    """The transport to hand to a client.

    Args:
        trust: whom to believe; None only for plain HTTP.
        route: how connections are made.
        config: `connection_timeout` and `read_timeout`, in seconds.
    """

    session: aiohttp.ClientSession | None

    def __init__(self, trust: ssl.SSLContext | None, route: Route = STRAIGHT, **config: Any) -> None:
        super().__init__(**config)
        self._route = route
        self._trust = trust
        self._opened = False

    async def open(self) -> None:
        # Not at construction, since a session belongs to the loop that runs then. Once closed it stays closed.
        if self.session is None and not self._opened:
            self._opened = True
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=MAX_CONNECTIONS,
                    ssl=self._trust or True,
                    resolver=Fixed(self._route.connect_to) if self._route.connect_to is not None else None,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                middlewares=(once,),
            )
        await super().open()

    async def send(self, request: Any, *, stream: bool = False, proxies: Any = None, **config: Any) -> Any:
        if self._route.proxy is not None:
            config |= {"proxy": self._route.proxy, "proxy_headers": self._route.proxy_headers()}
        response = await super().send(request, stream=False, proxies=None, **config)
        if request.method == "GET":
            response.headers.pop("x-ms-blob-type", None)
        return response
