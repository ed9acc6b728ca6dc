"""A blob's only writer: a write whose outcome nobody knows never lands over a later one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from recovery.replica.fenced import FencedBlob
from replicar.errors import ReplicarError, TransientError
from replicar.storage import MemoryStore
from replicar.storage.store import Pages

PAGE = 512


class Late(MemoryStore):
    """While it is `away` it answers nothing; what it was asked to write may still be carried out (`land`)."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.late: list[Callable[[], Awaitable[None]]] = []

    async def put_pages(self, name: str, offset: int, data: Pages, **options: Any) -> None:
        content, write = bytes(data), super().put_pages

        async def land() -> None:
            await write(name, offset, content, **options)

        if self.is_away:
            self.late.append(land)
            await asyncio.sleep(0.05)
            raise TransientError("no answer", outcome_certain=False)
        await land()

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        if self.is_away:
            raise TransientError("no answer", outcome_certain=False)
        return await super().bump_sequence_number(name, lease_id=lease_id)


@pytest.mark.parametrize("how", ["given up", "cancelled"])
async def test_a_write_that_was_given_up_does_not_land_over_the_next(how: str) -> None:
    store = Late()
    await store.ensure_container()
    await store.create("blob", 4 * PAGE)
    blob = await FencedBlob.take(store, "blob")
    store.is_away = True
    writing = asyncio.create_task(blob.put(0, b"old".ljust(PAGE)))
    if how == "cancelled":
        await asyncio.sleep(0.01)
        writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    store.is_away = False
    await blob.put(0, b"new".ljust(PAGE))
    for land in store.late:
        with pytest.raises(ReplicarError):
            await land()
    assert await store.read("blob", 0, PAGE) == b"new".ljust(PAGE)
