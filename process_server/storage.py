"""The container the logs lie in: made at the very first start, and never again by itself.

A container that was there and is gone held everybody's recovery points. Making an empty one in its place would hide
that, so this server remembers that it saw it, reports it missing, and waits for somebody to bring it back.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

from replicar.clock import Clock
from replicar.control.files import PUBLIC_MODE, read_file, write_file
from replicar.errors import PermanentError, ReplicarError
from replicar.storage.store import PageBlobStore
from replicar.storage.target import StorageTarget

SEEN_FILE: Final = "container.json"
CHECK_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 5.0


class Container:
    """Sees that the container is there. `looked` is set after the first look, `error` is what is wrong with it."""

    def __init__(self, store: PageBlobStore, directory: Path, target: StorageTarget, clock: Clock) -> None:
        self.looked = asyncio.Event()
        self.error: ReplicarError | None = None
        self._store = store
        self._file = directory / SEEN_FILE
        # A connection string names the account itself, and is a secret; the container's name has to do then.
        self._place = {"endpoint": target.endpoint, "container": target.container}
        self._clock = clock

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            try:
                await self._look()
                self.error = None
            except ReplicarError as error:
                self.error = error
            self.looked.set()
            await self._clock.sleep(RETRY_SECONDS if self.error is not None else CHECK_SECONDS)

    async def _look(self) -> None:
        if await self._store.container_exists():
            if not self._was_seen():
                self._remember()
        elif self._was_seen():
            raise PermanentError(
                f"the container {self._place['container']} at {self._place['endpoint'] or 'the account'} is gone",
                hint="restore it (soft delete), or check the account; to begin with an empty one, stop this server, "
                f"remove {self._file} and enrol the machines again",
                **self._place,
            )
        else:
            await self._store.ensure_container()
            self._remember()

    def _was_seen(self) -> bool:
        if not self._file.exists():
            return False
        try:
            seen: object = json.loads(read_file(self._file, what="the container that was seen"))
        except ValueError:
            return False
        return seen == self._place

    def _remember(self) -> None:
        write_file(self._file, (json.dumps(self._place) + "\n").encode(), mode=PUBLIC_MODE)
