"""Opened chunks: payload bytes of segments, fetched from storage, decrypted, verified and decompressed.

A request to storage costs about as much as 100 KiB of data, so chunks that lie close together come in one ranged read,
holes between them included. Opening them is work for a thread (AES-GCM and zstd release the interpreter's lock).

At most FETCHES reads of a source are under way or wait to be opened, whoever asks, and MOST_OPENERS threads open them.
`ChunkCache` keeps what was opened last, for readers at random; it is bounded in bytes. Whoever asks for a chunk that
another is just fetching waits for that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from recovery.files import in_thread
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import segment
from replicar.log.reader import Segment
from replicar.storage.store import PageBlobStore

_Result = TypeVar("_Result")

#: Ranged reads under way at once: enough to hide a round trip of 20 ms at 200 MB/s, far below 500 requests/s a blob.
FETCHES: Final = 6
#: Threads that open chunks, at most: what is still the interpreter's work would only wait for its lock in turn.
MOST_OPENERS: Final = 4
#: Sealed bytes that may be read for nothing to save a request.
BRIDGE_BYTES: Final = 256 << 10
#: What a cache of opened chunks holds: 512 chunks of 128 KiB.
CACHE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class MachineLog:
    """Where one machine's log is, and what opens it: `keys` are its data keys by key id."""

    store: PageBlobStore
    machine_id: uuid.UUID
    keys: Mapping[int, bytes] = dataclasses.field(repr=False)

    def key(self, key_id: int) -> bytes:
        """Raises PermanentError when the key is not at hand."""
        try:
            return self.keys[key_id]
        except KeyError:
            raise PermanentError(
                f"machine {self.machine_id} has data under key {key_id}, which is not at hand",
                hint="fetch the machine's keys from the config server again",
                key_id=key_id,
            ) from None


class ChunkSource:
    """Fetches and opens chunks of a machine's log."""

    def __init__(self, log: MachineLog, *, fetches: int = FETCHES) -> None:
        self._log = log
        self._slots = asyncio.Semaphore(fetches)
        # No more threads than can run: one that is taken off its core while it writes (see `filewriter`) holds up the
        # others. A source's own: who writes to a slow disk holds up no reader of another. They end with the source.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        threads = min(cores, MOST_OPENERS)
        self._openers = ThreadPoolExecutor(threads, thread_name_prefix="open")

    async def visit(self, found: Segment, first: int, last: int, work: Callable[[memoryview], _Result]) -> _Result:
        """Read the sealed bytes of chunks `first` to `last` (inclusive) in one request, and have `work` do something
        with them in a thread; the sealed bytes of at most `fetches` visits are in memory at once. Whoever is cancelled
        waits for the thread."""
        start, end = int(found.table.chunk_offsets[first]), int(found.table.chunk_offsets[last + 1])
        async with self._slots:
            sealed = memoryview(await self._log.store.read(found.blob, found.offset + start, end - start))
            return await in_thread(work, sealed, pool=self._openers)

    async def open(self, found: Segment, chunks: Sequence[int]) -> dict[int, bytes]:
        """The given chunks (ascending), opened.

        Raises:
            CorruptionError: one fails its seal; says which, and where it lies.
        """
        opened: dict[int, bytes] = {}
        for first, last in close_together(found, chunks):
            opened |= await self.visit(found, first, last, partial(self._open_all, found, first, last, chunks))
        return opened

    def _open_all(
        self, found: Segment, first: int, last: int, chunks: Sequence[int], sealed: memoryview
    ) -> dict[int, bytes]:
        key = self.key(found)
        return {index: self.open_one(found, index, sealed, first, key) for index in chunks if first <= index <= last}

    def key(self, found: Segment) -> AESGCM:
        """What opens the chunks of a segment; deriving it takes a tenth of the time that opening a chunk does."""
        header = found.table.header
        return segment.open_key(header, self._log.key(header.key_id))

    def open_one(self, found: Segment, index: int, sealed: memoryview, first: int, key: AESGCM) -> bytes:
        """Open one chunk out of what `visit` read from chunk `first` on. For threads: it waits for nothing.

        Raises:
            CorruptionError: it fails its seal; says where it lies.
        """
        edges = found.table.chunk_offsets
        base = int(edges[first])
        body = sealed[int(edges[index]) - base : int(edges[index + 1]) - base]
        try:
            return segment.open_chunk(found.table, index, body, key)
        except CorruptionError as error:
            raise CorruptionError(
                f"{error.message} (blob {found.blob}, byte {found.offset + int(edges[index])})",
                hint=error.hint or "points whose data does not touch this chunk can still be recovered",
                number=found.number,
                chunk=index,
                blob=found.blob,
                offset=found.offset,
            ) from None

    def open_together(
        self, found: Segment, chunks: Sequence[int], sealed: memoryview, first: int, key: AESGCM
    ) -> list[memoryview]:
        """As `open_one` for some chunks, which stay in memory together; the lock is given away once for all of them."""
        edges = found.table.chunk_offsets
        base = int(edges[first])
        bodies = [sealed[int(edges[index]) - base : int(edges[index + 1]) - base] for index in chunks]
        try:
            return segment.open_chunks(found.table, chunks, bodies, key)
        except CorruptionError:  # said again by the one that is damaged, with its place
            return [memoryview(self.open_one(found, index, sealed, first, key)) for index in chunks]


class ChunkCache:
    """The chunks that were opened last, up to so many bytes."""

    def __init__(self, source: ChunkSource, cache_bytes: int = CACHE_BYTES) -> None:
        self._source = source
        self._limit = cache_bytes
        self._held = 0
        self._chunks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._coming: dict[tuple[int, int], asyncio.Future[dict[int, bytes]]] = {}

    async def get(self, found: Segment, chunks: Sequence[int]) -> dict[int, bytes]:
        """The given chunks of a segment (ascending), from the cache or from storage."""
        opened: dict[int, bytes] = {}
        missing: list[int] = []
        coming: list[tuple[int, asyncio.Future[dict[int, bytes]]]] = []
        for index in chunks:
            key = (found.number, index)
            data = self._chunks.get(key)
            if data is not None:
                self._chunks.move_to_end(key)
                opened[index] = data
            elif (promise := self._coming.get(key)) is not None:
                coming.append((index, promise))
            else:
                missing.append(index)
        if missing:
            opened |= await self._fetch(found, missing)
        for index, promise in coming:
            # Shielded, since who waits may be cancelled and the others still want it. Nothing comes of a fetch that
            # failed or was cancelled: then it is this reader's own.
            fresh = await asyncio.shield(promise)
            opened[index] = fresh[index] if index in fresh else (await self.get(found, [index]))[index]
        return opened

    async def _fetch(self, found: Segment, missing: Sequence[int]) -> dict[int, bytes]:
        promise: asyncio.Future[dict[int, bytes]] = asyncio.get_running_loop().create_future()
        for index in missing:
            self._coming[found.number, index] = promise
        fresh: dict[int, bytes] = {}
        try:
            fresh = await self._source.open(found, missing)
            for index, data in fresh.items():
                self._keep((found.number, index), data)
        finally:
            for index in missing:
                del self._coming[found.number, index]
            promise.set_result(fresh)
        return fresh

    def _keep(self, key: tuple[int, int], data: bytes) -> None:
        if key not in self._chunks:
            self._held += len(data)
        self._chunks[key] = data
        while self._held > self._limit:
            _, dropped = self._chunks.popitem(last=False)
            self._held -= len(dropped)


def close_together(found: Segment, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending chunks as (first, last) of the ranged reads to fetch them by."""
    edges = found.table.chunk_offsets
    groups: list[tuple[int, int]] = []
    for index in chunks:
        if groups and int(edges[index]) - int(edges[groups[-1][1] + 1]) <= BRIDGE_BYTES:
            groups[-1] = (groups[-1][0], index)
        else:
            groups.append((index, index))
    return groups


def slim(found: Segment) -> Segment:
    """The segment with all that fetching its chunks takes, and without the memory of its descriptors."""
    nothing: np.ndarray[Any, Any] = np.zeros(0, dtype=np.int64)
    table = dataclasses.replace(
        found.table,
        chunks=found.table.chunks.copy(),  # otherwise a view that keeps the whole table in memory
        frame_places=nothing,
        frame_headers=(),
        descriptor_starts=nothing,
        descriptors=found.table.descriptors[:0].copy(),
    )
    return dataclasses.replace(found, table=table)
