"""What storage was given, watched from inside the service: the promises that are about every single write there.

- A place that was written holds these bytes for good: writing others there breaks the log's first rule.
- Once a newer run has its header, nothing new may be added to an older one: that would be a second writer.
- No salt is used for two segments of different content: their keys, and so their nonces, would be the same.
- An agent trims its log only up to where the segments that storage has are without a hole.

It reads the plain headers of segments and nothing else of the product's.
"""

from __future__ import annotations

import uuid
from bisect import insort
from collections.abc import Mapping

from replicar.errors import CorruptionError
from replicar.formats import frame, logblob, sections
from replicar.formats.segment import Position
from replicar.storage.memory import MemoryStore
from replicar.storage.store import PAGE_BYTES, Pages


class Ledger:
    """Takes note of every write. `violations` are what broke a promise, in words."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.segments = 0
        self.freed = 0  # how often something of a log was cleared or deleted
        self.copy: MemoryStore | None = None
        self._reached: dict[uuid.UUID, int] = {}
        self._spans: dict[uuid.UUID, list[Position]] = {}
        self._newest: dict[uuid.UUID, tuple[int, int]] = {}
        self._salts: dict[bytes, tuple[int, int, int, bytes]] = {}

    def wrote(self, name: str, offset: int, before: bytes, data: bytes) -> None:
        """`data` replaced `before`."""
        blob = logblob.read_name(name)
        if blob is None:
            return
        run = (blob.epoch, blob.run)
        if before == data:
            return
        if any(before):
            self.violations.append(f"{name} at {offset} was written again with other bytes")
        newest = self._newest.get(blob.machine_id, (0, 0))
        if not offset:
            self._newest[blob.machine_id] = max(newest, run)
        elif run < newest:
            self.violations.append(f"{name} at {offset} was written after run {newest} had begun")
        if offset:
            self._segment(blob.machine_id, name, offset, data)

    def keep_copy(self) -> None:
        """Have a copy of all log blobs from here on, of which nothing is ever given up: what the stream really was."""
        self.copy = MemoryStore("copy")
        self.copy._blobs = {}

    def stored_until(self, machine_id: uuid.UUID) -> int:
        """The last sequence before the first hole of the chain, in which the newest run has the say from where it
        begins: what an older one had behind a hole there is nothing any more."""
        if machine_id in self._reached:
            return self._reached[machine_id]
        chain: dict[int, Position] = {}
        run = (0, 0)
        for position in self._spans.get(machine_id, ()):
            if (position.epoch, position.run) != run:
                run = (position.epoch, position.run)
                chain = {number: known for number, known in chain.items() if number < position.number}
            chain[position.number] = position
        reached = 0
        for number, position in enumerate(chain.values(), 1):
            first = position.first_sequence
            if position.number != number or (first > reached + 1 and not frame.may_begin_anew(first)):
                break
            reached = max(reached, position.last_sequence)
        self._reached[machine_id] = reached
        return reached

    def _segment(self, machine_id: uuid.UUID, name: str, offset: int, data: bytes) -> None:
        try:
            header = sections.read_header(data)
        except CorruptionError:
            header = None
        if header is None:
            self.violations.append(f"{name} at {offset} is no segment")
            return
        self.segments += 1
        position = header.position
        self._reached.pop(machine_id, None)
        spans = self._spans.setdefault(machine_id, [])
        insort(spans, position, key=lambda known: (known.epoch, known.run, known.number))
        content = (position.number, position.first_sequence, position.last_sequence, data)
        known = self._salts.setdefault(header.salt, content)
        if known != content:
            self.violations.append(f"segments {known[0]} and {position.number} were sealed with one salt")


class WatchedStore(MemoryStore):
    """The memory store, with a ledger beside it."""

    def __init__(self, *args: object, ledger: Ledger, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._ledger = ledger

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        blob = (self._blobs or {}).get(name)
        before = bytes(len(data))
        if blob is not None and 0 <= offset <= blob.size_bytes - len(data):
            before = await super().read(name, offset, len(data))
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)
        self._ledger.wrote(name, offset, before, bytes(data))
        if self._ledger.copy is not None and logblob.read_name(name) is not None:
            await self._ledger.copy.put_pages(name, offset, data)

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        await super().create(name, size_bytes, metadata=metadata)
        if self._ledger.copy is not None and logblob.read_name(name) is not None:
            await self._ledger.copy.create(name, size_bytes)

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        await super().clear_pages(name, offset, length, lease_id=lease_id)
        self._ledger.freed += logblob.read_name(name) is not None

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        await super().delete(name, lease_id=lease_id)
        if logblob.read_name(name) is None:
            return
        self._ledger.freed += 1
        copy = self._ledger.copy
        # A writer whose start was refused takes its blobs back; there is no segment in them.
        if copy is not None and all(start + length <= PAGE_BYTES for start, length in await copy.page_ranges(name)):
            await copy.delete(name)
