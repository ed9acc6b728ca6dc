"""The HTTP end at which Prometheus asks: `GET /metrics`, answered from the parts' own counters at that moment.

Off until `metrics_listen` names an address; a port alone means this machine alone. There is neither TLS nor a password,
as is usual there: a page names machines and says how they are, and never holds a key or a byte of theirs. Whoever
listens on other addresses has a proxy or a firewall in front.

A port that can't be had keeps no part from its work, since protecting comes before being watched: it is said in the
log, and tried again until it can; Prometheus notices by itself that nobody answers.

What is promised: a scrape changes nothing and waits for nothing but the registry's own thread, so it can't hold the
data path up for longer than the page takes to write. Connections are few and short-lived by a limit.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import AfterValidator, Field

from replicar.errors import PermanentError, ReplicarError
from replicar.observe.exposition import CONTENT_TYPE, Page

if TYPE_CHECKING:
    from aiohttp import web

PATH: Final = "/metrics"
LOOPBACK: Final = "127.0.0.1"
#: Connections at once; Prometheus keeps one.
MAX_CONNECTIONS: Final = 16
KEEP_ALIVE_SECONDS: Final = 75.0
SHUTDOWN_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 30.0

_log = logging.getLogger(__name__)

Collect = Callable[[], Awaitable[Page]]


def parse_listen(text: str) -> tuple[str, int] | None:
    """`9464`, `host:9464` or `[ipv6]:9464` as (host, port); None for "".

    Raises:
        ValueError: it is none of these.
    """
    if not text:
        return None
    host, separator, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else -1
    if not 0 <= number <= 65535 or bool(separator) != bool(bare) or (":" in bare) != (bare != host):
        raise ValueError(f"{text!r} is no port, and no host:port")
    return bare or LOOPBACK, number


def _checked(text: str) -> str:
    parse_listen(text)
    return text


#: The setting, as every part has it.
MetricsListen = Annotated[
    str,
    AfterValidator(_checked),
    Field(description="where Prometheus may ask: a port of this machine, or host:port; empty: nowhere"),
]


class Endpoint:
    """Serves a part's metrics; an asynchronous context manager. `port` is the one it listens on, 0 while it is off.

    Args:
        listen: the setting.
        collect: makes the page of one scrape.
        retry_seconds: between tries to listen where that was not possible.
    """

    def __init__(self, listen: str, collect: Collect, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self.port = 0
        self._address = parse_listen(listen)
        self._collect = collect
        self._stack = AsyncExitStack()
        self._runner: web.AppRunner | None = None
        self._retry_seconds = retry_seconds
        self._trying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Listen, if the setting says where; a place that can't be had is said in the log, and tried again."""
        if self._address is None:
            return self
        from aiohttp import web  # it takes a while to import, and is not asked for by most

        app = web.Application()
        app.router.add_get(PATH, self._answer)
        runner = web.AppRunner(
            app, access_log=None, keepalive_timeout=KEEP_ALIVE_SECONDS, shutdown_timeout=SHUTDOWN_SECONDS
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        self._runner = runner
        if not await self._listen(runner, *self._address):
            self._trying = asyncio.get_running_loop().create_task(self._try_again(runner, *self._address))
        return self

    async def _listen(self, runner: web.AppRunner, host: str, port: int) -> bool:
        from aiohttp import web

        site = web.TCPSite(runner, host, port, backlog=MAX_CONNECTIONS)
        try:
            await site.start()
        except OSError as error:
            await site.stop()
            _log.error("%s", _refused(error, host, port))
            return False
        self.port = int(runner.addresses[0][1])
        _log.info("metrics are at http://%s:%d%s", f"[{host}]" if ":" in host else host, self.port, PATH)
        return True

    async def _try_again(self, runner: web.AppRunner, host: str, port: int) -> None:
        while True:
            await asyncio.sleep(self._retry_seconds)
            if await self._listen(runner, host, port):
                return

    async def __aexit__(self, *_: object) -> None:
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        await self._stack.aclose()

    async def _answer(self, _: web.Request) -> web.Response:
        from aiohttp import web

        assert self._runner is not None
        assert self._runner.server is not None
        if len(self._runner.server.connections) > MAX_CONNECTIONS:
            response = web.Response(status=503, text=f"{MAX_CONNECTIONS} connections are open here already\n")
            response.force_close()
            return response
        try:
            text = (await self._collect()).render()
        except ReplicarError as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})


def _refused(error: OSError, host: str, port: int) -> PermanentError:
    if error.errno == errno.EADDRINUSE:
        return PermanentError(
            f"metrics_listen: port {port} on {host} is taken",
            hint="stop what listens there, or set another `metrics_listen`",
            host=host,
            port=port,
        )
    return PermanentError(
        f"metrics_listen: can't listen on {host}:{port}: {error.strerror or error}",
        hint="name an address of this machine, or a port alone",
        host=host,
        port=port,
    )
