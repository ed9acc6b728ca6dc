"""A mapped file of the agent's beside its log: changed by stores, durable when somebody says so.

When the kernel can't write a page it says so once, keeps the page readable, and takes it for clean: the next sync
succeeds without having written it, and a power cut brings back what was there before. So a sync that failed is not
simply tried again. Before the next one, and before the file is closed, every page is stored to, byte for byte as it is,
which makes all of them dirty; what the kernel was told then it writes, or fails anew.

A process that is killed in between takes that debt with it, and its successor finds pages that only look durable. So
whoever opens such a file stores again whatever may have changed since the last checkpoint.

Weak: storing to a page that is a hole gives it a block; after a failed sync a sparse file is none any more.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from typing import Final

PAGE_BYTES: Final = 4096


class MappedFile:
    """See the module. Takes the descriptor over; whoever has views of `mapping` lets them go before `close`.

    All methods run on one thread, the one that stores.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.mapping = mmap.mmap(fd, size)
        self._size = size
        self._syncing = threading.Lock()  # held by whoever the kernel may tell of what it could not write
        self._dropped = False

    def store_again(self, start: int = 0, end: int | None = None) -> None:
        """Have the pages of bytes [start, end) written by the next sync, whatever became of them."""
        for at in range(start // PAGE_BYTES * PAGE_BYTES, self._size if end is None else end, PAGE_BYTES):
            self.mapping[at] = self.mapping[at]

    def sync(self) -> None:
        """Make durable what was stored until now.

        Raises:
            OSError: it can't be; nothing may rest on what was stored since the last sync that succeeded.
        """
        self._pay()
        self._sync()

    async def sync_aside(self) -> None:
        """The same, on another thread.

        Raises:
            OSError: as `sync`.
        """
        self._pay()
        await asyncio.to_thread(self._sync)

    def close(self) -> None:
        """Durably, and in any case.

        Raises:
            OSError: it is closed, and not durable.
        """
        try:
            with self._syncing:  # one whose caller was cancelled may still be told what this one has to know
                self._pay()
            self._sync()
        finally:
            self.mapping.close()
            os.close(self.fd)

    def _pay(self) -> None:
        if self._dropped:
            self._dropped = False
            self.store_again()

    def _sync(self) -> None:
        with self._syncing:
            try:
                os.fdatasync(self.fd)
            except OSError:
                self._dropped = True
                raise
