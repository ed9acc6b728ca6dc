"""The real emulator behind an HTTPS service that is in trouble: faults by a seed, request by request.

Whatever is passed on reaches Azurite as it was sent (the signature holds), and Azurite's own rules decide. Each fault
and what must survive it:

    ERROR           500, nothing was done                   the same again, and all is well
    ERROR_AFTER     500, and all was done                   the same again changes nothing
    BUSY            503 with a pause to keep                nothing was done, and the pause is kept
    SLOW            done late, answered late                others are not held up
    HALF            done, and half of an answer comes       as ERROR_AFTER; half a body is no body
    HANG_UP         nothing was done, and no answer comes   nobody can know that, so as ERROR_AFTER
    LATE            no answer comes; done some seconds on   even behind an acknowledged repeat, a death, another writer
    LOST_LEASE      412, nothing was done                   the writer stands still, for good, and another one goes on

`landed` counts LATE writes that the service took in the end, `refused` those that came too late for their lease.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from bench.certificates import HOST, Certificates
from simulator.azurite import ACCOUNT_NAME, Azurite
from tests.process_server.faults.page_record import PageRecord

#: Headers that belong to one connection, not to the request.
_HOP = ("Connection", "Host", "Keep-Alive", "Transfer-Encoding")
_OWN: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_LATEST_SECONDS: Final = 4.0
_SLOW_SECONDS: Final = 0.5


class Fault(Enum):
    """See the module."""

    NONE = auto()
    ERROR = auto()
    ERROR_AFTER = auto()
    BUSY = auto()
    SLOW = auto()
    HALF = auto()
    HANG_UP = auto()
    LATE = auto()
    LOST_LEASE = auto()


#: How often out of a hundred, for writing and for everything else. LOST_LEASE comes only when it is due.
_WEATHER: Final = {
    True: {Fault.ERROR: 3, Fault.ERROR_AFTER: 4, Fault.BUSY: 3, Fault.SLOW: 6, Fault.HALF: 4, Fault.LATE: 6},
    False: {Fault.ERROR: 1, Fault.BUSY: 1, Fault.SLOW: 3, Fault.HALF: 1, Fault.HANG_UP: 1, Fault.LATE: 1},
}


class RoughStorage:
    """The service, as an asynchronous context manager; calm to begin with.

    Args:
        directory: for certificates.
        draw: what the weather is made from.
    """

    def __init__(self, azurite: Azurite, directory: Path, draw: Random) -> None:
        self.record = PageRecord()
        self.calm = True
        self.due: list[Fault] = []  # what the next writes get, whatever the weather
        self.seen: Counter[Fault] = Counter()
        self.landed = self.refused = 0
        self._upstream = URL(azurite.blob_endpoint).origin()
        self._trust = str(azurite.authority_file)
        self._certificates = Certificates.make(directory)
        self._draw = draw
        self._late: set[asyncio.Task[None]] = set()
        self._port = 0

    @property
    def endpoint(self) -> str:
        return f"https://{HOST}:{self._port}/{ACCOUNT_NAME}"

    @property
    def authority_file(self) -> Path:
        return self._certificates.authority

    async def settled(self) -> None:
        """Return when nothing is on its way any more that nobody waits for."""
        while self._late:
            await asyncio.wait(self._late)

    async def __aenter__(self) -> Self:
        import ssl

        trust = ssl.create_default_context(cafile=self._trust)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trust, limit=0), auto_decompress=False, skip_auto_headers=_OWN
        )
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0, ssl_context=self._certificates.server_context()).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read()
        fault = self._fault(request)
        self.seen[fault] += 1
        if fault is Fault.ERROR:
            return _says(500, "InternalError")
        if fault is Fault.BUSY:
            return _says(503, "ServerBusy", **{"x-ms-retry-after-ms": "150"})
        if fault is Fault.LOST_LEASE:
            return _says(412, "LeaseLost")
        if fault is Fault.HANG_UP:
            return _hang_up(request)
        if fault is Fault.LATE:
            task = asyncio.create_task(self._pass_on_late(request, body, self._draw.uniform(0.05, _LATEST_SECONDS)))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            return _hang_up(request)
        if fault is Fault.SLOW:
            await asyncio.sleep(self._draw.uniform(0, _SLOW_SECONDS))
        answer = await self._pass_on(request, body)
        if fault is Fault.SLOW:
            await asyncio.sleep(self._draw.uniform(0, _SLOW_SECONDS))
        if fault is Fault.ERROR_AFTER:
            return _says(500, "InternalError")
        if fault is Fault.HALF:
            return await _half(request, answer)
        return answer

    def _fault(self, request: web.BaseRequest) -> Fault:
        writes = request.method == "PUT" and request.query.get("comp") == "page"
        if writes and self.due:
            return self.due.pop(0)
        if self.calm or request.query.get("restype") == "container":
            return Fault.NONE
        luck = self._draw.randrange(100)
        for fault, share in _WEATHER[writes].items():
            if luck < share and (fault is not Fault.LATE or request.method == "PUT"):
                return fault
            luck -= share
        return Fault.NONE

    async def _pass_on_late(self, request: web.BaseRequest, body: bytes, seconds: float) -> None:
        await asyncio.sleep(seconds)
        answer = await self._pass_on(request, body)
        if answer.status == 412:
            self.refused += 1
        elif answer.status < 300:
            self.landed += 1

    async def _pass_on(self, request: web.BaseRequest, body: bytes) -> web.Response:
        headers = CIMultiDict(request.headers)
        for name in _HOP:
            headers.popall(name, None)
        url = self._upstream.join(URL(request.raw_path, encoded=True))
        async with self._session.request(request.method, url, headers=headers, data=body) as answer:
            data = await answer.read()
            if answer.status == 201 and request.query.get("comp") == "page":
                # Noted before anybody hears of it, so that the record has the service's own order.
                offset = int((request.headers.get("x-ms-range") or request.headers["Range"])[6:].partition("-")[0])
                self.record.wrote(request.path.split("/", 3)[3], offset, body)
            told = CIMultiDict(answer.headers)
            for name in _HOP:
                told.popall(name, None)
            if request.method != "HEAD":
                told.popall("Content-Length", None)
            return web.Response(status=answer.status, headers=told, body=data)


def _says(status: int, code: str, **headers: str) -> web.Response:
    return web.Response(status=status, headers={"x-ms-error-code": code, **headers})


def _hang_up(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _half(request: web.BaseRequest, answer: web.Response) -> web.StreamResponse:
    """Head and half of the body, or half of the head where there is no body; then the line is cut."""
    body = answer.body if isinstance(answer.body, bytes) else b""
    if request.transport is None:
        return answer
    if not body:
        request.transport.write(f"HTTP/1.1 {answer.status} Cre".encode())
        request.transport.close()
        return web.Response()
    headers = CIMultiDict(answer.headers)
    headers["Content-Length"] = str(len(body))
    torn = web.StreamResponse(status=answer.status, headers=headers)
    with suppress(ConnectionError):
        await torn.prepare(request)
        await torn.write(body[: len(body) // 2])
    request.transport.close()
    return torn
