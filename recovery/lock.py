"""One folder at a time: a lease on a blob, and when its holder was last alive.

The holder says so (`beat`) with every step. Whoever finds the lease taken goes away, unless its holder was silent for
STALE_SECONDS: then it died, the lease is broken, and should it be alive after all, its next `beat` is refused and it
stops. That spares double work; what keeps a point's bytes safe from two folders at once is that each gives up only what
a fold in storage gave up long before (see `folding`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from replicar.clock import Clock
from replicar.errors import ConflictError, FencedError, ReplicarError
from replicar.formats import indexblob
from replicar.storage.store import PAGE_BYTES, PageBlobStore

STALE_SECONDS: Final = 300
_NS: Final = 1_000_000_000


class FoldLock:
    """The right to fold a machine's log; see the module."""

    def __init__(
        self, store: PageBlobStore, machine_id: uuid.UUID, clock: Clock, random: Callable[[int], bytes]
    ) -> None:
        self._store, self._clock = store, clock
        self._name = f"{indexblob.index_prefix(machine_id)}lock"
        self._id = str(uuid.UUID(bytes=random(16), version=4))
        self._machine_id = machine_id

    async def take(self) -> None:
        """
        Raises:
            FencedError: somebody else is at work.
        """
        with suppress(ConflictError):  # it is there already
            await self._store.create(self._name, PAGE_BYTES)
        try:
            await self._store.acquire_lease(self._name, proposed_id=self._id)
        except FencedError as error:
            seen = (await self._store.properties(self._name)).metadata.get("beat_ns", "0")
            beat_ns = int(seen) if seen.isascii() and seen.isdigit() else 0
            if self._clock.now_ns() - beat_ns < STALE_SECONDS * _NS:
                raise FencedError(
                    f"the log of machine {self._machine_id} is being folded by somebody else",
                    hint=f"nothing to do; if it died, its hold ends {STALE_SECONDS} seconds after its last step",
                    machine_id=str(self._machine_id),
                ) from error
            await self._store.break_lease(self._name)
            await self._store.acquire_lease(self._name, proposed_id=self._id)
        await self.beat()

    async def beat(self) -> None:
        """Say that we are alive.

        Raises:
            FencedError: somebody took over.
        """
        metadata = {"beat_ns": str(self._clock.now_ns())}
        await self._store.set_metadata(self._name, metadata, lease_id=self._id)

    async def release(self) -> None:
        """Give it back; whatever stands in the way, it ends by itself."""
        with suppress(ReplicarError):
            await self._store.release_lease(self._name, self._id)
