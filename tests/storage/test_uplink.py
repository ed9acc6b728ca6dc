"""The way up for segments: what it takes for an answer, what it signs, and what it does with connections that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from replicar.errors import FencedError, TransientError
from replicar.storage import outcome_is_certain
from replicar.storage.azure import AzureBlobStore
from replicar.storage.reply import MAX_REPLY_BYTES, NoReplyError, read_reply
from replicar.storage.signing import SharedAccess, SharedKey, string_to_sign

CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"


# --- what is an answer ---


@pytest.mark.parametrize(
    ("data", "status", "keeps"),
    [
        (CREATED, 201, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + CREATED, 201, True),
        (b"HTTP/1.1 201\r\ncontent-length:0\r\n\r\n", 201, True),
        (b"HTTP/1.1 403 No\r\nContent-Length: 3\r\n\r\nwhy", 403, True),
        (b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 201, True),
        (b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\n0\r\n\r\n\r\n0\r\n\r\n", 503, True),
        (b"HTTP/1.1 204 Nothing\r\n\r\n", 204, True),
        (b"HTTP/1.1 201 Created\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 201, False),
        (b"HTTP/1.1 500 Oh\r\n\r\nuntil the end", 500, False),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 999999\r\n\r\nbegins", 500, False),
        (CREATED + b"more than was asked for", 201, False),
    ],
)
def test_an_answer_is_read_to_its_end(data: bytes, status: int, keeps: bool) -> None:
    reply = read_reply(data)
    assert reply is not None
    assert (reply.status, reply.keeps) == (status, keeps)


def test_every_beginning_of_an_answer_asks_for_more() -> None:
    whole = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    for length in range(len(whole)):
        assert read_reply(whole[:length]) is None, length
    assert read_reply(whole) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.0 201 Created\r\n\r\n",
        b"HTTP/1.1 201 Created\r\nno header\r\n\r\n",
        b"HTTP/1.1 201 Created\r\n folded: 1\r\n\r\n",
        b"HTTP/1.1 201 Created\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nlonger\r\n",
        b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n" + b"z" * 300,
        b"x" * MAX_REPLY_BYTES,
    ],
)
def test_what_is_no_answer_is_taken_for_none(data: bytes) -> None:
    with pytest.raises(NoReplyError):
        read_reply(data)


# --- what is signed ---


def test_what_is_signed_is_what_the_service_documents() -> None:
    headers = {"x-ms-range": "bytes=0-511", "x-ms-date": "Sat, 01 Jan 2000 00:00:00 GMT", "host": "h"}
    text = string_to_sign("PUT", "name", "/box/a%20b", {"comp": "page"}, headers, 512)
    assert text == (
        "PUT\n\n\n512\n\n\n\n\n\n\n\n\n"
        "x-ms-date:Sat, 01 Jan 2000 00:00:00 GMT\nx-ms-range:bytes=0-511\n"
        "/name/box/a%20b\ncomp:page"
    )


async def test_a_renewed_credential_is_used_from_the_next_request_on() -> None:
    key, access = AzureNamedKeyCredential("name", "b25l"), AzureSasCredential("?sig=one")
    signed = []
    for _ in range(2):
        headers: dict[str, str] = {}
        assert await SharedKey(key, now=lambda: 0.0).sign("PUT", "/a", {"comp": "page"}, headers, 512) == "comp=page"
        query = await SharedAccess(access).sign("PUT", "/a", {"comp": "page"}, {}, 512)
        signed.append((headers["authorization"], query))
        key.update("name", "dHdv")
        access.update("sig=two")
    assert signed[0][0] != signed[1][0]
    assert [query for _, query in signed] == ["comp=page&sig=one", "comp=page&sig=two"]


# --- connections ---


@dataclass
class Service:
    """A page-blob service as far as Put Page goes; counts connections and requests, and ends connections on request."""

    url: str = ""
    answer: bytes = CREATED
    hangs_up: bool = False  # behind each answer
    listens: bool = True  # to bodies
    connections: int = 0
    bodies: list[bytes] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while not reader.at_eof():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                self.heard.set()
                if self.listens:
                    self.bodies.append(await reader.readexactly(length))
                writer.write(self.answer)
                if self.hangs_up or not self.listens:
                    writer.close()
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[AzureBlobStore]:
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/account"
    store = AzureBlobStore(
        service.url, "box", AzureNamedKeyCredential("account", "b25l"), trust=None, request_timeout_seconds=30.0
    )
    async with server, store:
        yield store
        for writer in service.writers:
            writer.close()


async def test_one_connection_carries_many_requests_one_after_the_other() -> None:
    service = Service()
    async with running(service) as store:
        for number in range(5):
            await store.put_pages("a", 0, bytes([number]) * 512)
    assert service.connections == 1
    assert service.bodies == [bytes([number]) * 512 for number in range(5)]


async def test_requests_at_once_have_connections_of_their_own_and_arrive_whole() -> None:
    service = Service()
    bodies = [bytes([number]) * (1 << 20) for number in range(8)]
    async with running(service) as store:
        await asyncio.gather(*(store.put_pages("a", 0, memoryview(body)) for body in bodies))
    assert sorted(service.bodies) == bodies
    assert 1 < service.connections <= 8


async def test_a_connection_that_ended_while_idle_is_not_used_again() -> None:
    service = Service(hangs_up=True)
    async with running(service) as store:
        await store.put_pages("a", 0, bytes(512))
        await service.writers[0].wait_closed()
        await store.put_pages("a", 0, bytes(512))
    assert service.connections == 2
    assert len(service.bodies) == 2, "nothing is sent twice"


async def test_a_refusal_is_heard_though_the_service_did_not_listen_to_the_end() -> None:
    code = b"x-ms-error-code: LeaseLost\r\n"
    service = Service(answer=b"HTTP/1.1 412 No\r\n" + code + b"Content-Length: 0\r\n\r\n", listens=False)
    async with running(service) as store:
        with pytest.raises((FencedError, TransientError)) as caught:
            await store.put_pages("a", 0, memoryview(bytes(4 << 20)))
    # Where the system throws an answer away that it got before the connection broke, nobody can know; that is said.
    assert isinstance(caught.value, FencedError) or not outcome_is_certain(caught.value)


async def test_a_cancelled_upload_lets_go_of_its_pages_before_it_returns() -> None:
    pages, arrived, go_on = bytearray(32 << 20), bytearray(), asyncio.Event()

    async def reluctant(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        service.heard.set()
        await go_on.wait()
        try:
            while data := await reader.read(1 << 20):
                arrived.extend(data)
        except ConnectionError:
            pass
        writer.close()
        ended.set()

    service, ended = Service(), asyncio.Event()
    service.serve = reluctant  # type: ignore[method-assign]
    async with running(service) as store:
        task = asyncio.create_task(store.put_pages("a", 0, memoryview(pages)))
        await service.heard.wait()
        task.cancel()
        task.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await task
        pages[:] = b"!" * len(pages)  # as whoever reuses the buffer does
        go_on.set()
        async with asyncio.timeout(10):
            await ended.wait()
    assert len(arrived) < len(pages)
    assert not any(arrived)
