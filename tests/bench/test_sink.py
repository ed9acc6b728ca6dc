"""The sink answers what the product's real storage client asks, over real TLS, as storage would, and keeps no data."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from pydantic import SecretStr

from bench.sink import Sink
from process_server.logwriter import LogLimits, LogWriter, Writer
from replicar.clock import SystemClock
from replicar.errors import ConflictError, FencedError, PermanentError
from replicar.formats.logblob import WRAPPED_KEY_BYTES
from replicar.storage.store import PageBlobStore, is_missing
from replicar.storage.target import StorageTarget, open_store

BLOB_BYTES = 1 << 30
PAGE = b"p" * 512


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[Sink]:
    async with Sink(tmp_path / "sink") as running:
        yield running


@pytest.fixture
async def store(sink: Sink) -> AsyncIterator[PageBlobStore]:
    target = StorageTarget(
        endpoint=sink.blob_endpoint,
        account_name=sink.account_name,
        account_key=SecretStr(sink.account_key),
        container="replicar",
        authority_file=sink.authority_file,
    )
    async with open_store(target) as opened:
        yield opened


async def test_a_blob_is_made_once(store: PageBlobStore) -> None:
    assert await store.container_exists()
    await store.ensure_container()
    await store.create("log", BLOB_BYTES, metadata={"writer": "a"})
    with pytest.raises(ConflictError):
        await store.create("log", BLOB_BYTES)
    found = await store.properties("log")
    assert (found.size_bytes, dict(found.metadata), found.leased) == (BLOB_BYTES, {"writer": "a"}, False)


async def test_the_first_page_is_remembered_and_everything_else_is_zeros(store: PageBlobStore) -> None:
    await store.create("log", BLOB_BYTES)
    await store.put_pages("log", 0, PAGE)
    await store.put_pages("log", 512, memoryview(b"x" * (4 << 20)))
    assert await store.read("log", 0, 1024) == PAGE + bytes(512)
    assert await store.read("log", 4096, 100) == bytes(100)
    with pytest.raises(PermanentError):
        await store.read("log", BLOB_BYTES - 512, 1024)


async def test_a_lease_keeps_others_out_until_it_is_broken(store: PageBlobStore) -> None:
    await store.create("log", BLOB_BYTES)
    lease = await store.acquire_lease("log")
    with pytest.raises(FencedError):
        await store.acquire_lease("log")
    with pytest.raises(FencedError):
        await store.put_pages("log", 0, PAGE)
    await store.put_pages("log", 0, PAGE, lease_id=lease)
    assert (await store.properties("log")).leased
    await store.break_lease("log")
    await store.break_lease("log")  # nobody holds it any more, which is fine
    with pytest.raises(FencedError):
        await store.put_pages("log", 0, PAGE, lease_id=lease)
    other = await store.acquire_lease("log")
    await store.release_lease("log", other)
    with pytest.raises(FencedError):
        await store.release_lease("log", other)


async def test_it_lists_the_blobs_of_a_prefix_with_what_is_known_of_them(store: PageBlobStore) -> None:
    for name in ("a/2", "a/1", "b/1"):
        await store.create(name, BLOB_BYTES, metadata={"name": name})
    await store.acquire_lease("a/2")
    found = await store.list("a/")
    assert [(info.name, info.leased, info.metadata["name"]) for info in found] == [
        ("a/1", False, "a/1"),
        ("a/2", True, "a/2"),
    ]
    assert await store.list("c/") == []


async def test_metadata_and_sequence_numbers_can_be_changed_and_blobs_deleted(store: PageBlobStore) -> None:
    await store.create("log", BLOB_BYTES, metadata={"one": "1"})
    await store.set_metadata("log", {"two": "2"})
    assert dict((await store.properties("log")).metadata) == {"two": "2"}
    assert [await store.bump_sequence_number("log") for _ in range(2)] == [1, 2]
    await store.delete("log")
    with pytest.raises(PermanentError) as missing:
        await store.read("log", 0, 512)
    assert is_missing(missing.value)


async def test_the_process_servers_log_writer_works_on_it(store: PageBlobStore) -> None:
    writer = Writer(uuid.uuid4(), epoch=1, key_id=1, data_key=bytes(32), wrapped_key=bytes(WRAPPED_KEY_BYTES))
    log = await LogWriter.open(store, writer, LogLimits(), SystemClock(), keys={1: writer.data_key})
    assert (log.run, log.tail.number) == (1, 0)
    assert log.reserve()
    place = await log.place(1024)
    await log.write(place, memoryview(bytes(1024)))
    await log.close()


async def test_what_it_does_not_know_is_refused_and_not_taken_for_granted(sink: Sink, store: PageBlobStore) -> None:
    await store.create("log", BLOB_BYTES)
    connector = aiohttp.TCPConnector(ssl=sink.certificates.client_context())
    async with aiohttp.ClientSession(connector=connector) as session:
        for query in ("comp=pagelist", "comp=snapshot"):
            async with session.put(f"{sink.blob_endpoint}/replicar/log?{query}", data=b"") as answer:
                assert answer.status == 501


async def test_it_says_at_its_end_what_it_took_and_what_that_cost(sink: Sink, store: PageBlobStore) -> None:
    await store.create("log", BLOB_BYTES)
    for number in range(4):
        await store.put_pages("log", number * (4 << 20), memoryview(bytes(4 << 20)))
    said = await sink.stop()
    assert said["bytes_put"] == 16 << 20
    assert said["requests"] == 5
    assert 0 < said["cpu_seconds"]["total"] < 30
