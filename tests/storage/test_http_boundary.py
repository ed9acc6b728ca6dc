"""What the real client makes of answers that a service in trouble gives, over real sockets: our errors, one request for
one call, and no secret in anything that a log could show."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from replicar.errors import ConflictError, FencedError, PermanentError, ReplicarError, TransientError
from replicar.storage import outcome_is_certain
from replicar.storage.azure import AzureBlobStore

KEY = "c2VjcmV0LXNlY3JldC1zZWNyZXQ="
SIGNATURE = "sv=2024-11-04&sp=rw&sig=TOPSECRETSIGNATURE"

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class Service:
    """A server on a loopback port that answers every request with `answer`, and counts them."""

    url: str = ""
    answer: Answer | None = None
    requests: list[str] = field(default_factory=list)

    def says(self, status: int, code: str = "", **headers: str) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            await request.read()
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(status=status, headers=fields | ({"x-ms-error-code": code} if code else {}))

        self.answer = answer


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        made.requests.append(f"{request.method} {request.query.get('comp', '')}".strip())
        assert made.answer is not None
        return await made.answer(request)

    runner = web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/account"
    yield made
    await runner.cleanup()


def client(url: str, *, seconds: float = 5.0, signature: bool = False) -> AzureBlobStore:
    credential = AzureSasCredential(SIGNATURE) if signature else AzureNamedKeyCredential("account", KEY)
    return AzureBlobStore(url, "box", credential, trust=None, request_timeout_seconds=seconds)


async def failure(store: AzureBlobStore, call: Awaitable[object]) -> ReplicarError:
    async with store:
        with pytest.raises(ReplicarError) as caught:
            await call
    return caught.value


@pytest.mark.parametrize(
    ("status", "certain"),
    [(408, True), (429, True), (500, False), (502, False), (503, True), (504, False)],
)
async def test_a_service_in_trouble_is_transient_and_says_whether_the_write_is_over(
    service: Service, status: int, certain: bool
) -> None:
    service.says(status)
    store = client(service.url)
    error = await failure(store, store.put_pages("a", 0, bytes(512)))
    assert isinstance(error, TransientError)
    assert outcome_is_certain(error) is certain
    assert error.fields["status"] == status
    assert service.requests == ["PUT page"], "the client must not retry by itself"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"x_ms_retry_after_ms": "1500", "Retry_After": "7"}, 1.5),
        ({"retry_after_ms": "250"}, 0.25),
        ({"Retry_After": "Wed, 04 Nov 2026 10:00:09 GMT", "Date": "Wed, 04 Nov 2026 10:00:00 GMT"}, 9.0),
        ({"Retry_After": "99999999"}, 3600.0),
        ({"Retry_After": "soon"}, None),
        ({"Retry_After": "-3"}, None),
        ({}, None),
    ],
)
async def test_how_long_the_service_asks_us_to_wait_is_passed_on(
    service: Service, headers: dict[str, str], seconds: float | None
) -> None:
    service.says(503, "ServerBusy", **headers)
    store = client(service.url)
    error = await failure(store, store.put_pages("a", 0, bytes(512)))
    assert isinstance(error, TransientError)
    assert error.retry_after_seconds == seconds


@pytest.mark.parametrize(
    ("status", "code", "kind", "reason"),
    [
        (400, "InvalidHeaderValue", PermanentError, "refused"),
        (401, "", PermanentError, "forbidden"),
        (403, "AuthenticationFailed", PermanentError, "forbidden"),
        (403, "", PermanentError, "forbidden"),
        (404, "BlobNotFound", PermanentError, "blob_missing"),
        (404, "", PermanentError, "blob_missing"),
        (404, "ContainerNotFound", PermanentError, "container_missing"),
        (409, "BlobAlreadyExists", ConflictError, None),
        (409, "LeaseAlreadyPresent", FencedError, None),
        (409, "SnapshotsPresent", PermanentError, "refused"),
        (409, "ContainerBeingDeleted", TransientError, None),
        (412, "LeaseLost", FencedError, None),
        (412, "LeaseIdMissing", FencedError, None),
        (412, "LeaseIdMismatchWithBlobOperation", FencedError, None),
        (412, "SequenceNumberConditionNotMet", FencedError, None),
        (412, "", FencedError, None),
        (413, "RequestBodyTooLarge", PermanentError, "refused"),
        (416, "InvalidPageRange", PermanentError, "past_end"),
        (501, "NotImplemented", PermanentError, "refused"),
    ],
)
async def test_every_refusal_has_its_place_in_our_tree(
    service: Service, status: int, code: str, kind: type[ReplicarError], reason: str | None
) -> None:
    service.says(status, code, x_ms_request_id="r-1")
    store = client(service.url)
    error = await failure(store, store.put_pages("a", 0, bytes(512)))
    assert type(error) is kind
    assert error.fields.get("reason") == reason
    assert "box" in str(error)
    if kind is not TransientError:
        assert error.hint
    assert len(service.requests) == 1


async def test_a_body_torn_in_half_is_transient_at_once_without_hidden_retries(service: Service) -> None:
    async def half(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(
            status=206, headers={"Content-Length": "1000", "Content-Range": "bytes 0-999/1000"}
        )
        await response.prepare(request)
        await response.write(bytes(500))
        assert request.transport is not None
        request.transport.close()
        return response

    service.answer = half
    store = client(service.url)
    async with asyncio.timeout(1):
        error = await failure(store, store.read("a", 0, 1000))
    assert isinstance(error, TransientError)
    assert len(service.requests) == 1


async def test_a_read_is_one_request_though_it_is_a_page_blob(service: Service) -> None:
    async def whole(request: web.BaseRequest) -> web.StreamResponse:
        headers = {"Content-Range": "bytes 0-511/1024", "x-ms-blob-type": "PageBlob", "ETag": '"1"'}
        return web.Response(status=206, body=bytes(512), headers=headers)

    service.answer = whole
    async with client(service.url) as store:
        assert await store.read("a", 0, 512) == bytes(512)
    assert service.requests == ["GET"]


async def test_an_answer_shorter_than_asked_for_is_never_returned(service: Service) -> None:
    async def short(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=206, body=bytes(100), headers={"Content-Range": "bytes 900-999/1000"})

    service.answer = short
    store = client(service.url)
    error = await failure(store, store.read("a", 900, 512))
    assert isinstance(error, PermanentError)
    assert error.fields["reason"] == "past_end"


async def test_a_service_that_hangs_up_leaves_the_outcome_open(service: Service) -> None:
    async def hang_up(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    service.answer = hang_up
    store = client(service.url)
    error = await failure(store, store.put_pages("a", 0, bytes(512)))
    assert isinstance(error, TransientError)
    assert not outcome_is_certain(error)
    assert len(service.requests) == 1


async def test_a_service_that_never_answers_is_given_up_and_leaves_the_outcome_open(service: Service) -> None:
    async def never(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    service.answer = never
    store = client(service.url, seconds=0.2)
    error = await failure(store, store.put_pages("a", 0, bytes(512)))
    assert isinstance(error, TransientError)
    assert not outcome_is_certain(error)


async def test_a_service_that_does_not_even_read_is_given_up_too() -> None:
    @asynccontextmanager
    async def deaf() -> AsyncIterator[str]:
        release = asyncio.Event()

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's transport reads as well
            await release.wait()
            writer.close()

        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/account"
            release.set()

    async with deaf() as url:
        store = client(url, seconds=0.3)
        async with asyncio.timeout(3):
            error = await failure(store, store.put_pages("a", 0, memoryview(bytes(4 << 20))))
    assert isinstance(error, TransientError)
    assert not outcome_is_certain(error)


async def test_a_service_that_is_not_there_certainly_did_nothing() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    store = client(f"http://127.0.0.1:{port}/account")
    error = await failure(store, store.put_pages("a", 0, bytes(512)))
    assert isinstance(error, TransientError)
    assert outcome_is_certain(error)


async def test_a_cancelled_request_stays_cancelled_and_the_store_still_works(service: Service) -> None:
    async def never(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    service.answer = never
    async with client(service.url) as store:
        task = asyncio.create_task(store.put_pages("a", 0, bytes(512)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        service.says(201)
        await store.put_pages("a", 0, bytes(512))


async def test_no_secret_shows_in_errors_tracebacks_reprs_or_logs(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for answers in (None, 403, 404, 412, 500):
        for signature in (True, False):
            if answers is None:
                service.answer = _broken
            else:
                service.says(answers)
            store = client(service.url, signature=signature)
            error = await failure(store, store.put_pages("a", 0, bytes(512)))
            shown = "".join(traceback.format_exception(error)) + repr(error) + str(error.as_dict()) + repr(store)
            shown += repr(error.__cause__) + repr(error.__context__) + caplog.text
            for secret in (KEY, "TOPSECRETSIGNATURE", "SharedKey"):
                assert secret not in shown, (answers, secret)


async def _broken(request: web.BaseRequest) -> web.StreamResponse:
    """No HTTP at all, which makes the library's own error carry the URL."""
    assert request.transport is not None
    request.transport.write(b"HTTP/1.1 banana\r\n\r\n")
    request.transport.close()
    return web.Response()
