"""Writes an index blob: its sections as they come, then its root, and the header last of all.

Until the header is there the blob is as good as not there; so a writer may die anywhere, and what it leaves is found by
its missing header and removed when the log is folded. A blob is written once, under a name of its own.

Memory: what is gathered for one request, PUT_BYTES and one section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from recovery.chunks import MachineLog
from replicar.clock import Clock
from replicar.errors import PermanentError
from replicar.formats import indexblob
from replicar.formats.indexblob import ALIGNMENT, HEADER_BYTES, SALT_BYTES, BlobKind, IndexHeader, IndexName
from replicar.log.reader import LogReader

#: What one request writes at most.
PUT_BYTES: Final = 4 << 20
#: What a blob with sections may grow to; only what is written is paid for.
BLOB_BYTES: Final = 64 << 30
_TOKEN_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Author:
    """With what a machine's index blobs are sealed: the newest data key of its log. `random` gives so many bytes."""

    log: MachineLog
    key_id: int
    wrapped_key: bytes = field(repr=False)
    clock: Clock
    random: Callable[[int], bytes]

    @classmethod
    async def of(cls, log: MachineLog, clock: Clock, random: Callable[[int], bytes]) -> Author:
        """
        Raises:
            PermanentError: there is no log of this machine.
        """
        runs = await LogReader(log.store, log.machine_id, log.keys).runs()
        if not runs:
            raise PermanentError(
                f"there is nothing in storage of machine {log.machine_id}",
                hint="check container and machine; if protection was just enabled, wait for the first segment",
                machine_id=str(log.machine_id),
            )
        header = runs[-1].header
        return cls(log, header.key_id, header.wrapped_key, clock, random)

    def name(self, kind: BlobKind, first: int, last: int) -> IndexName:
        return IndexName(self.log.machine_id, kind, first, last, self.random(_TOKEN_BYTES).hex())


class BlobWriter:
    """One blob; `begin`, `add` as often as needed, `finish`."""

    def __init__(self, author: Author, name: IndexName) -> None:
        self.written_bytes = 0
        self._author = author
        self._name = name
        self._salt = author.random(SALT_BYTES)
        self._key = indexblob.blob_key(author.log.key(author.key_id), self._salt, name)
        self._sections: list[tuple[int, int, int, int, int]] = []
        self._gathered = bytearray()
        self._place = HEADER_BYTES  # where what is gathered goes
        self._begun = False

    async def add(self, raw: bytes) -> int:
        """Another section; its index."""
        index = len(self._sections)
        sealed, codec = indexblob.seal_section(self._key, self._name, index, raw)
        self._sections.append((self._end, len(sealed), len(raw), codec, 0))
        self._gathered += sealed
        if len(self._gathered) >= PUT_BYTES:
            await self._put(len(self._gathered) // ALIGNMENT * ALIGNMENT)
        return index

    async def finish(self, values: Mapping[str, Any], *, lease_id: str | None = None) -> IndexHeader:
        """Write root and header; the blob is there from now on.

        Raises:
            LimitError: the root is larger than it may be.
            FencedError: a lease is needed, and is not ours (any more).
        """
        author = self._author
        sections = np.array(self._sections, dtype=indexblob.SECTION_ENTRY)
        head = IndexHeader(
            *(self._name, len(sections), self._end, 0, author.key_id, self._salt, author.wrapped_key),
            author.clock.now_ns(),
        )
        root, header = indexblob.seal_root(self._key, head, values, sections)
        self._gathered += root
        self._gathered += bytes(-len(self._gathered) % ALIGNMENT)
        if not self._begun:
            await self.begin(HEADER_BYTES + len(self._gathered))
        await self._put(len(self._gathered), lease_id)
        await author.log.store.put_pages(str(self._name), 0, header.pack(), lease_id=lease_id)
        self.written_bytes += HEADER_BYTES
        return header

    async def begin(self, size_bytes: int) -> None:
        """Create the blob. Done by itself where it was not asked for, as large as it will be or may become."""
        await self._author.log.store.create(str(self._name), size_bytes)
        self._begun = True

    @property
    def _end(self) -> int:
        return self._place + len(self._gathered)

    async def _put(self, length: int, lease_id: str | None = None) -> None:
        if not self._begun:
            await self.begin(BLOB_BYTES)
        done = 0
        while done < length:
            part = bytes(self._gathered[done : min(done + PUT_BYTES, length)])
            await self._author.log.store.put_pages(str(self._name), self._place, part, lease_id=lease_id)
            self._place, done = self._place + len(part), done + len(part)
        del self._gathered[:length]
        self.written_bytes += length
