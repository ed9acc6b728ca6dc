"""Wrapped keys in log blobs: replaced without a reader noticing, destroyed for good."""

from __future__ import annotations

import os
import uuid

import pytest

from process_server.logwriter import LogLimits, LogWriter, Writer
from replicar.clock import SystemClock
from replicar.errors import FencedError, PermanentError
from replicar.formats import logblob
from replicar.log import headers
from replicar.log.headers import Rewrapped
from replicar.log.reader import LogReader
from replicar.storage.memory import MemoryStore
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
