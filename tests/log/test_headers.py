"""Wrapped keys in log and index blobs: replaced without a reader noticing, destroyed for good."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import replace

import pytest

from process_server.logwriter import LogLimits, LogWriter, Writer
from replicar.clock import SystemClock
from replicar.errors import CorruptionError, FencedError, PermanentError
from replicar.formats import indexblob, logblob
from replicar.formats.indexblob import IndexHeader, IndexName
from replicar.log import headers
from replicar.log.headers import Rewrapped
from replicar.log.index import open_root, read_index_header
from replicar.log.reader import LogReader
from replicar.storage.memory import MemoryStore
from tests.golden import make_golden, sample
from tests.recovery.log_builder import LogBuilder

MACHINE = uuid.UUID("6d616368-696e-4520-8000-6f6e65000009")
KEYS = {1: os.urandom(32), 2: os.urandom(32)}
FORMS = {1: b"a" * 40, 2: b"b" * 40}


async def a_log(store: MemoryStore) -> LogBuilder:
    """Two runs of two stripes, the second under another data key."""
    await store.ensure_container()
    builder = LogBuilder(
        store, machine_id=MACHINE, key=KEYS[1], key_id=1, wrapped_key=FORMS[1], stripe_count=2, blob_bytes=1 << 20
    )
    builder.begin(65536)
    await builder.seal()
    builder.key, builder.key_id, builder.wrapped_key = KEYS[2], 2, FORMS[2]
    await builder.begin_run()
    builder.write(0, 0, os.urandom(4096))
    await builder.seal()
    return builder


async def forms(store: MemoryStore) -> list[bytes]:
    found = []
    for info in await store.list(logblob.log_prefix(MACHINE)):
        header = logblob.read_header(await store.read(info.name, 0, logblob.HEADER_BYTES))
        if header is not None:
            found.append(header.wrapped_key)
    return found


async def numbers(store: MemoryStore) -> list[int]:
    return [found.number async for found in LogReader(store, MACHINE, KEYS).segments()]


async def test_newly_wrapped_keys_take_the_place_of_the_old_ones_and_nothing_else_changes() -> None:
    store = MemoryStore()
    await a_log(store)
    wanted = {1: b"c" * 40, 2: b"d" * 40}
    assert await headers.rewrap(store, MACHINE, wanted) == Rewrapped(changed=4)
    assert await forms(store) == [wanted[1]] * 2 + [wanted[2]] * 2
    assert await numbers(store) == [1, 2]
    assert await headers.rewrap(store, MACHINE, wanted) == Rewrapped(current=4)
    assert not any(info.leased for info in await store.list(""))


async def test_a_writers_blobs_and_keys_that_nobody_knows_are_left_alone_and_said() -> None:
    store = MemoryStore()
    await a_log(store)
    newest = (await store.list(logblob.log_prefix(MACHINE)))[-1].name
    await store.acquire_lease(newest)
    assert await headers.rewrap(store, MACHINE, {2: b"d" * 40}) == Rewrapped(changed=1, unknown=2, in_use=1)


async def a_writer(store: MemoryStore, epoch: int) -> LogWriter:
    writer = Writer(MACHINE, epoch, 2, KEYS[2], FORMS[2])
    return await LogWriter.open(store, writer, LogLimits(2, 16 << 20), SystemClock(), keys=KEYS)


async def test_a_destroyed_log_leaves_nothing_and_its_writer_is_shut_out_for_good() -> None:
    store = MemoryStore()
    await a_log(store)
    writer = await a_writer(store, 1)
    assert writer.reserve()
    place = await writer.place(1024)
    await store.create(f"machines/{MACHINE}/base/1", 512)  # whatever else there is of it
    await store.create("machines/another/log", 512)
    assert await headers.destroy(store, MACHINE, 2) == 6
    with pytest.raises(PermanentError):  # its blob is gone; and it may make no other
        await writer.write(place, memoryview(bytes(1024)))
    with pytest.raises(FencedError):
        await a_writer(store, 1)
    assert [info.name for info in await store.list("")] == [
        str(headers.tombstone(MACHINE, 2)),
        "machines/another/log",
    ]
    assert await headers.destroy(store, MACHINE, 2) == 0, "done again"
    # A machine of that id that is enrolled again begins anew, in the epoch of the tombstone.
    again = await a_writer(store, 2)
    assert again.tail.number == 0
    assert await numbers(store) == []


async def test_what_a_deleted_blob_held_last_is_no_key() -> None:
    """Soft delete keeps a blob as it was when it was deleted."""

    class Keeping(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[bytes] = []

        async def delete(self, name: str, *, lease_id: str | None = None) -> None:
            self.kept.append(await self.read(name, 0, 512))
            await super().delete(name, lease_id=lease_id)

    store = Keeping()
    await a_log(store)
    await headers.destroy(store, MACHINE, 2)
    assert store.kept == [bytes(512)] * 4


async def an_index(store: MemoryStore, version: int) -> list[IndexName]:
    """The golden index blobs of a version, in storage."""
    await store.ensure_container()
    manifest = json.loads(make_golden.MANIFEST.read_text(encoding="utf-8"))
    names = []
    for entry in manifest["files"]:
        if (entry["format"], entry["version"], entry["verdict"]) == ("index", version, "good"):
            name = indexblob.read_name(entry["about"])
            assert name is not None
            data = make_golden.load(entry)
            await store.create(str(name), len(data))
            await store.put_pages(str(name), 0, data)
            names.append(name)
    return names


async def opened(store: MemoryStore, name: IndexName) -> IndexHeader:
    """The header of an index blob that opens."""
    header = await read_index_header(store, name)
    assert header is not None
    assert (await open_root(store, {sample.KEY_ID: sample.DATA_KEY}, header)).header == header
    return header


async def test_index_blobs_get_the_new_form_too_whoever_has_a_lease_and_open_as_before() -> None:
    store, wanted = MemoryStore(), {sample.KEY_ID: b"c" * 40}
    names = await an_index(store, 2)
    await store.acquire_lease(str(names[0]))  # by a folder that died with its work done
    assert await headers.rewrap(store, sample.MACHINE, wanted) == Rewrapped(changed=len(names))
    assert {(await opened(store, name)).wrapped_key for name in names} == {b"c" * 40}
    assert await headers.rewrap(store, sample.MACHINE, wanted) == Rewrapped(current=len(names))
    assert not any(info.leased for info in await store.list(""))


async def test_of_an_index_header_the_wrapped_key_alone_is_outside_of_the_seal() -> None:
    store = MemoryStore()
    name = (await an_index(store, 2))[0]
    header = await opened(store, name)
    sealed = await store.read(str(name), header.root_offset, header.root_bytes)
    altered: dict[str, object] = {
        "created_ns": header.created_ns + 1,
        "salt": bytes(32),
        "sections": header.sections + 1,
        "key_id": header.key_id + 1,
        "version": 1,
    }
    for field, value in altered.items():
        with pytest.raises(CorruptionError):
            indexblob.open_root(replace(header, **{field: value}), sealed, sample.DATA_KEY)  # type: ignore[arg-type]
    assert indexblob.open_root(replace(header, wrapped_key=b"x" * 40), sealed, sample.DATA_KEY)


async def test_an_index_blob_of_version_1_is_read_and_keeps_its_form_which_is_said() -> None:
    store = MemoryStore()
    names = await an_index(store, 1)
    before = {name: await opened(store, name) for name in names}
    assert await headers.rewrap(store, sample.MACHINE, {sample.KEY_ID: b"c" * 40}) == Rewrapped(sealed=len(names))
    assert {name: await opened(store, name) for name in names} == before
