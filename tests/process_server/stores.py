"""Storage with faults at will, by the rules of the one in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from replicar.errors import TransientError
from replicar.formats.logblob import BlobName
from replicar.storage.memory import MemoryStore
from replicar.storage.store import Pages


class SlowStore(MemoryStore):
    """Storage behind a thin link: one upload at a time, each at so many bytes a second."""

    def __init__(self, bytes_per_second: float) -> None:
        super().__init__()
        self.seconds_per_byte = 1 / bytes_per_second
        self._link = asyncio.Lock()

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        async with self._link:
            await asyncio.sleep(len(data) * self.seconds_per_byte)
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)


class GatedStore(MemoryStore):
    """Storage that can be shut, as an account that throttles to a standstill, or fail for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = 0

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise TransientError("storage is away", retry_after_seconds=0.01)
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)


class LateStore(MemoryStore):
    """Creations that a server asked for before it died land late: each right before somebody else creates a blob."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[BlobName] = []

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        while self.late:
            await super().create(str(self.late.pop()), size_bytes, metadata={"writer": "dead"})
        await super().create(name, size_bytes, metadata=metadata)
