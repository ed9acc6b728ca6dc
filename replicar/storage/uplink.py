"""The way up for segments: Put Page alone, over kept connections of its own, past everything that costs.

Microsoft's client takes about two milliseconds of Python for a request, whatever its size, and an event loop's TLS
copies each byte three times more than a socket's does. With segments of 3 MiB that was a third of all that a process
server spent. So the one request that carries the bytes goes its own way; every other one stays with the client.

    asyncio side      a lane (see `lanes`), a connection (kept, or made here), the head, signed
    a lane's thread   all of `line`: TLS, the body, the answer

What is promised: one call sends one request, at most once. A connection that never came to be is `NotConnectedError`,
so nothing was sent; after any other failure the request may have been carried out. A call that is cancelled returns
when its thread no longer looks at the pages, which takes no longer than hanging up does.

Weak: a service that closes an idle connection at the very moment when it is used again looks like one that died over
the request; the retry that follows writes the same bytes. So idle ones are let go of before services usually do.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final
from urllib.parse import quote, urlsplit

from replicar.storage.lanes import Lanes
from replicar.storage.line import Line
from replicar.storage.reply import Reply
from replicar.storage.route import STRAIGHT, Route
from replicar.storage.signing import Signer
from replicar.storage.store import Pages

#: Requests under way at once: the most that one machine may have, or four for each of some.
MAX_LANES: Final = 32
CONNECT_SECONDS: Final = 10.0
#: Azure closes idle connections after a minute or more, and some balancers in front of it earlier.
MAX_IDLE_SECONDS: Final = 30.0


class NotConnectedError(OSError):
    """No connection came to be, so nothing was sent."""


class Uplink:
    """Puts pages into blobs of one container.

    Args:
        account_url: as `AzureBlobStore` takes it.
        trust: None for plain HTTP.
        version: of the service's interface.
        route: how connections are made.
        request_seconds: when a request is given up, from its first byte on; waiting for a lane is not counted.
    """

    def __init__(
        self,
        account_url: str,
        container: str,
        signer: Signer,
        *,
        trust: ssl.SSLContext | None,
        version: str,
        request_seconds: float,
        route: Route = STRAIGHT,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urlsplit(account_url)
        assert parts.hostname is not None
        self._host, self._is_tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._place, self._path = parts.netloc, f"{parts.path.rstrip('/')}/{container}"
        self._signer, self._version, self._route = signer, version, route
        self._trust = (trust or ssl.create_default_context()) if self._is_tls else None
        self._seconds, self._now = request_seconds, now
        self._lanes = Lanes(MAX_LANES)
        self._threads = ThreadPoolExecutor(MAX_LANES, thread_name_prefix="upload")
        self._idle: list[Line] = []  # the one used last is the last
        self._is_closed = False

    async def put_pages(
        self, name: str, offset: int, data: Pages, lease_id: str | None, if_sequence_number_lt: int | None
    ) -> Reply:
        """Send one Put Page; whatever the service answers.

        Raises:
            NotConnectedError: nothing was sent.
            OSError: there was no answer. `ssl.SSLCertVerificationError` for a service that is not to be trusted.
        """
        async with self._lanes.one():
            async with asyncio.timeout(self._seconds):  # it may have to ask for a token
                head = await self._head(name, offset, len(data), lease_id, if_sequence_number_lt)
            line = self._kept() or await self._connected()
            try:
                reply = await self._in_thread(line, head, data)
            except TimeoutError:
                self._lanes.timed_out()
                line.close()
                raise
            except BaseException:
                line.close()
                raise
            self._lanes.answered()
            self._keep(line, reply)
            return reply

    async def close(self) -> None:
        """Let go of all connections. What is under way ends by itself."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        self._threads.shutdown(wait=False)

    async def _head(
        self, name: str, offset: int, length: int, lease_id: str | None, if_sequence_number_lt: int | None
    ) -> bytes:
        headers = {
            "x-ms-page-write": "update",
            "x-ms-range": f"bytes={offset}-{offset + length - 1}",
            "x-ms-version": self._version,
        }
        if lease_id is not None:
            headers["x-ms-lease-id"] = lease_id
        if if_sequence_number_lt is not None:
            headers["x-ms-if-sequence-number-lt"] = str(if_sequence_number_lt)
        path = f"{self._path}/{quote(name, safe='~/')}"
        query = await self._signer.sign("PUT", path, {"comp": "page"}, headers, length)
        lines = [f"PUT {path}?{query} HTTP/1.1", f"host: {self._place}", f"content-length: {length}"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    async def _in_thread(self, line: Line, head: bytes, data: Pages) -> Reply:
        future = asyncio.get_running_loop().run_in_executor(self._threads, line.put, head, data, self._seconds)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            line.abort()
            while not future.done():  # however often we are told to go: the thread reads what others would reuse
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # looked at, so that nobody reports it as forgotten
            raise

    async def _connected(self) -> Line:
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                hop, port = self._route.first_hop(self._host, self._port)
                places = await loop.getaddrinfo(hop, port, type=socket.SOCK_STREAM)
                for family, kind, protocol, _, address in places:
                    plain = socket.socket(family, kind, protocol)
                    plain.setblocking(False)
                    try:
                        await loop.sock_connect(plain, address)
                        await self._route.through(plain, self._host, self._port)
                    except OSError as error:
                        plain.close()
                        failure = error
                    except BaseException:
                        plain.close()
                        raise
                    else:
                        return Line(plain, self._trust, self._host)
        except OSError as error:  # a name that is none, or TimeoutError
            failure = error
        raise NotConnectedError(type(failure).__name__) from None

    def _kept(self) -> Line | None:
        """A kept connection that is fit for use; those that are not are let go of."""
        while self._idle:
            line = self._idle.pop()
            if self._now() - line.idle_since < MAX_IDLE_SECONDS and line.is_alive:
                return line
            line.close()
        return None

    def _keep(self, line: Line, reply: Reply) -> None:
        if not reply.keeps or self._is_closed:
            line.close()
            return
        line.idle_since = self._now()
        self._idle.append(line)
        if self._now() - self._idle[0].idle_since >= MAX_IDLE_SECONDS:
            self._idle.pop(0).close()
