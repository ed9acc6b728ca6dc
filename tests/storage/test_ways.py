"""Every way to the service, on a real Azurite: a proxy, a private endpoint, an identity's token, an older interface."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from azure.core.credentials import AccessToken, AzureNamedKeyCredential

from replicar.control.files import write_file
from replicar.errors import PermanentError, ReplicarError, TransientError
from replicar.storage import PageBlobStore, StorageTarget, open_store
from replicar.storage.azure import AzureBlobStore
from replicar.storage.entra import SCOPE
from simulator.azurite import PRIVATE_NAME, Azurite

PAGES = os.urandom(4096)


def target(azurite: Azurite, container: str, **fields: Any) -> StorageTarget:
    return StorageTarget.model_validate(
        {
            "endpoint": azurite.blob_endpoint,
            "account_name": azurite.account_name,
            "account_key": azurite.account_key,
            "authority_file": azurite.authority_file,
            "container": container,
            **fields,
        }
    )


async def use(store: PageBlobStore) -> None:
    """What a process server and a recovery do: both clients below are on the way."""
    await store.ensure_container()
    await store.create("a", 8192)
    lease = await store.acquire_lease("a")
    await store.put_pages("a", 0, PAGES, lease_id=lease)
    assert await store.read("a", 0, 4096) == PAGES
    assert [info.name for info in await store.list("")] == ["a"]
    await store.release_lease("a", lease)


# --- through a proxy ---


@dataclass
class Proxy:
    """A small CONNECT proxy on the loopback: real sockets, bytes both ways. `asked` is what it was asked for."""

    wants: str | None = None
    port: int = 0
    asked: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            verb, place, _ = head.split("\r\n", 1)[0].split(" ")
            self.asked.append(f"{verb} {place}")
            if self.wants is not None and f"proxy-authorization: {self.wants}".lower() not in head.lower():
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            host, port = place.rsplit(":", 1)
            onward, back = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.wait(
                [asyncio.create_task(_pass(reader, back)), asyncio.create_task(_pass(onward, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
            back.close()
        finally:
            writer.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        return  # either side hung up, which is how connections end


@asynccontextmanager
async def proxy(wants: str | None = None) -> AsyncIterator[Proxy]:
    made = Proxy(wants)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


async def test_all_goes_through_the_proxy_and_nothing_past_it(
    azurite: Azurite, container_name: str, tmp_path: Path
) -> None:
    write_file(tmp_path / "proxy", b"user:secret word\n")
    wants = "Basic " + base64.b64encode(b"user:secret word").decode()
    # A name that only the proxy could find: had anything gone past it, it would have failed.
    async with proxy(wants) as between:
        fields = {"proxy": f"http://127.0.0.1:{between.port}", "proxy_credentials_file": tmp_path / "proxy"}
        settings = target(azurite, container_name, **fields)
        assert "secret word" not in repr(settings)
        assert wants not in repr(settings.route())
        async with open_store(settings) as store:
            await use(store)
    assert set(between.asked) == {f"CONNECT 127.0.0.1:{azurite.port}"}
    assert len(between.asked) >= 2, "the client's connection, and the one that pages go by"


async def test_a_proxy_that_refuses_is_said_and_nothing_was_sent(azurite: Azurite, container_name: str) -> None:
    async with proxy("something else") as between:
        settings = target(azurite, container_name, proxy=f"http://127.0.0.1:{between.port}")
        access = settings.access()
        store = AzureBlobStore(
            access.url, container_name, access.credential, trust=settings.trust(), route=settings.route()
        )
        async with store:
            for call in (store.container_exists(), store.put_pages("a", 0, PAGES)):
                with pytest.raises(TransientError) as caught:
                    await call
                assert caught.value.fields["outcome_certain"] or "list" not in str(caught.value)


# --- a private endpoint ---


async def test_a_private_endpoints_address_stands_for_its_name(azurite: Azurite, container_name: str) -> None:
    endpoint = azurite.blob_endpoint.replace("127.0.0.1", PRIVATE_NAME)
    async with open_store(target(azurite, container_name, endpoint=endpoint, connect_to="127.0.0.1")) as store:
        await use(store)


async def test_an_address_that_is_somebody_elses_is_refused_by_the_name(azurite: Azurite, container_name: str) -> None:
    endpoint = azurite.blob_endpoint.replace("127.0.0.1", "other.invalid")
    async with open_store(target(azurite, container_name, endpoint=endpoint, connect_to="127.0.0.1")) as store:
        for call in (store.container_exists(), store.put_pages("a", 0, PAGES)):
            with pytest.raises(PermanentError, match="not to be trusted"):
                await call


# --- an identity ---


class LocalIdentity:
    """A MOCK of Azure's sign-in, which can't be had here: it makes the token itself, without a signature.

    Azurite looks at a token's dates, issuer and addressee, and not at its signature; so what is tried is that tokens
    are asked for, sent and believed on every request, and not who gives them.
    """

    def __init__(self, audience: str = "https://storage.azure.com") -> None:
        self.asked = 0
        self.closed = False
        self._audience = audience

    async def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        assert scopes == (SCOPE,)
        self.asked += 1
        now = int(time.time())
        claims = {
            "aud": self._audience,
            "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
            "iat": now - 60,
            "nbf": now - 60,
            "exp": now + 3600,
            "ver": "1.0",
        }
        parts = [json.dumps({"alg": "RS256", "typ": "JWT"}).encode(), json.dumps(claims).encode(), b"none"]
        token = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
        return AccessToken(token, now + 3600)

    async def close(self) -> None:
        self.closed = True


async def test_an_identitys_token_opens_storage(azurite: Azurite, container_name: str) -> None:
    identity, trust = LocalIdentity(), target(azurite, container_name).trust()
    async with AzureBlobStore(azurite.blob_endpoint, container_name, identity, trust=trust) as store:
        await use(store)
    assert identity.asked <= 2, "a token is kept by each of the two clients"
    assert identity.closed


async def test_a_token_for_somebody_else_is_refused(azurite: Azurite, container_name: str) -> None:
    identity, trust = LocalIdentity("https://vault.azure.net"), target(azurite, container_name).trust()
    async with AzureBlobStore(azurite.blob_endpoint, container_name, identity, trust=trust) as store:
        for call in (store.container_exists(), store.put_pages("a", 0, PAGES)):
            with pytest.raises(PermanentError, match="refuses our credentials"):
                await call


async def test_a_host_without_an_identity_says_so(azurite: Azurite, container_name: str, monkeypatch: Any) -> None:
    for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    named = {"endpoint": azurite.blob_endpoint, "container": container_name, "identity": "workload"}
    with pytest.raises(PermanentError, match="no workload identity"):
        open_store(StorageTarget.model_validate(named))


# --- an older interface ---


@pytest.fixture
async def recorder() -> AsyncIterator[tuple[str, list[Any]]]:
    """A service that writes down the headers and queries of all requests and answers 400: real bytes on the wire."""
    seen: list[Any] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        seen.append((f"{request.method} {request.query_string}", dict(request.headers)))
        return web.Response(status=400)

    runner = web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/account", seen
    await runner.cleanup()


async def test_every_request_speaks_the_version_that_was_set_and_nothing_newer(
    recorder: tuple[str, list[Any]],
) -> None:
    url, seen = recorder
    credential = AzureNamedKeyCredential("account", "c2VjcmV0LXNlY3JldA==")
    async with AzureBlobStore(url, "log", credential, trust=None, api_version="2019-07-07") as store:
        calls = (
            store.ensure_container(),
            store.container_exists(),
            store.create("a", 512, metadata={"x": "y"}),
            store.put_pages("a", 0, bytes(512), lease_id="b", if_sequence_number_lt=3),
            store.clear_pages("a", 0, 512),
            store.read("a", 0, 512),
            store.list("a"),
            store.page_ranges("a"),
            store.properties("a"),
            store.set_metadata("a", {"x": "y"}),
            store.bump_sequence_number("a"),
            store.delete("a"),
            store.acquire_lease("a"),
            store.break_lease("a"),
            store.release_lease("a", "b"),
        )
        for call in calls:
            with pytest.raises(ReplicarError):
                await call
    assert len(seen) == len(calls)
    assert {headers.get("x-ms-version") for _, headers in seen} == {"2019-07-07"}
    # Of later versions: encryption scopes (2019-12-12), tags and tiers on write, structured bodies and CRC64 (2020s).
    newer = {
        *("x-ms-tags", "x-ms-if-tags", "x-ms-access-tier", "x-ms-structured-body", "x-ms-content-crc64"),
        *("x-ms-encryption-scope", "x-ms-version-id", "x-ms-legal-hold", "x-ms-immutability-policy-mode"),
    }
    for what, headers in seen:
        assert not {name.lower() for name in headers} & newer, what
        assert "versions" not in what
        assert "tags" not in what
