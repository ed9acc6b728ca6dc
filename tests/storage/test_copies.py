"""What every page-blob store promises of copies that the service makes, asked of each as in test_conformance."""

from __future__ import annotations

import asyncio

import pytest

from replicar.errors import ConflictError, PermanentError
from replicar.storage import CopySource, PageBlobStore, is_missing
from replicar.storage.outcomes import answer_error, copied
from tests.storage.test_conformance import MIB, PAGE, pattern, store

__all__ = ["store"]


async def test_a_copy_is_what_the_snapshot_holds_and_asking_again_looks_at_it(store: PageBlobStore) -> None:
    await store.create("a", MIB)
    await store.put_pages("a", PAGE, pattern(2 * PAGE))
    source = CopySource("a", await store.snapshot("a"))
    await store.put_pages("a", 0, pattern(PAGE, 9))
    while not await store.copy("some/copy", source):
        await asyncio.sleep(0.1)
    assert await store.read("some/copy", 0, MIB) == bytes(PAGE) + pattern(2 * PAGE) + bytes(MIB - 3 * PAGE)
    await store.put_pages("some/copy", 0, pattern(PAGE, 3))
    assert await store.copy("some/copy", source)
    assert await store.read("some/copy", 0, PAGE) == pattern(PAGE, 3), "what was written to it stays"


async def test_a_copy_is_made_of_what_is_there_and_over_nothing_else(store: PageBlobStore) -> None:
    await store.create("a", MIB)
    source = CopySource("a", await store.snapshot("a"))
    await store.create("b", MIB)
    with pytest.raises(ConflictError):
        await store.copy("b", source)
    await store.delete_snapshot("a", source.snapshot)
    with pytest.raises(PermanentError) as raised:
        await store.copy("c", source)
    assert is_missing(raised.value)
    assert [info.name for info in await store.list("c")] == []


def test_a_copy_that_the_service_gave_up_is_told_from_one_that_is_under_way() -> None:
    assert [copied("success", "c", "b"), copied("pending", "c", "b")] == [True, False]
    for status in ("failed", "aborted"):
        with pytest.raises(PermanentError, match="gave up the copy") as raised:
            copied(status, "c", "b")
        assert raised.value.hint
    error = answer_error(409, "PendingCopyOperation", {}, doing="delete the blob", container="c", blob="b")
    assert type(error).__name__ == "TransientError", "it ends by itself"
