"""One page blob that is rewritten in place, by one writer at a time, whatever late requests may still arrive.

After a time-out a write may land later, over newer bytes. So every write here asks that the blob's sequence number be
what this writer last raised it to. After an outcome that nobody knows (of a write that was cancelled, too) the number
is raised before anything else is written, whoever writes next, and the late one is refused by the store. A new writer
takes the lease from the old one and raises the number: from then on the old one is refused, with whatever it still had
under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, Self

from replicar.errors import FencedError, TransientError
from replicar.storage.store import PageBlobStore, Pages, outcome_is_certain

#: Times that a page is written whose outcome is not known, or that the number was raised under, before it is an error.
TRIES: Final = 8


class FencedBlob:
    """A blob that is this writer's. Make it with `take`. Several writes may be under way at once, to places apart.

    All methods raise FencedError when somebody else has taken the blob, and what else a store raises.
    """

    def __init__(self, store: PageBlobStore, name: str, lease_id: str, number: int) -> None:
        self.name = name
        self._store, self._lease_id, self._number = store, lease_id, number
        self._raising = asyncio.Lock()
        self._is_doubtful = False  # a write may still land

    @classmethod
    async def take(cls, store: PageBlobStore, name: str) -> Self:
        """Become the blob's only writer."""
        await store.break_lease(name)
        lease_id = await store.acquire_lease(name)
        return cls(store, name, lease_id, await store.bump_sequence_number(name, lease_id=lease_id))

    async def put(self, offset: int, data: Pages) -> None:
        """Write pages; when this returns they are there, and no earlier write of ours can come over them."""
        for attempt in range(TRIES):
            await self._settle()
            number, last = self._number, attempt == TRIES - 1
            try:
                await self._store.put_pages(
                    self.name, offset, data, lease_id=self._lease_id, if_sequence_number_lt=number + 1
                )
                return
            except FencedError:
                async with self._raising:
                    if self._number == number or last:
                        raise
            except TransientError as error:
                if outcome_is_certain(error):
                    raise
                self._doubt(number)
                if last:
                    raise
            except asyncio.CancelledError:
                self._doubt(number)
                raise

    def _doubt(self, number: int) -> None:
        """A write under `number` may still land, unless the number was raised meanwhile."""
        self._is_doubtful |= self._number == number

    async def _settle(self) -> None:
        """Raise the number if a write may still land."""
        async with self._raising:
            if self._is_doubtful:
                self._number = await self._store.bump_sequence_number(self.name, lease_id=self._lease_id)
                self._is_doubtful = False

    async def release(self) -> None:
        """Let go of the blob: anybody may write to it, or import it, now."""
        await self._store.release_lease(self.name, self._lease_id)

    async def snapshot(self, metadata: Mapping[str, str]) -> str:
        """Keep what the blob holds now, while nothing is written to it; returns the snapshot's id.

        A request for it that arrives late is refused when the blob has changed.
        """
        etag = (await self._store.properties(self.name)).etag
        return await self._store.snapshot(self.name, metadata=metadata, lease_id=self._lease_id, if_etag=etag)

    async def delete(self) -> None:
        """Remove the blob, and its snapshots, which can't be without it."""
        for info in await self._store.snapshots(self.name):
            if info.name == self.name and info.snapshot is not None:
                await self._store.delete_snapshot(self.name, info.snapshot)
        await self._store.delete(self.name, lease_id=self._lease_id)
