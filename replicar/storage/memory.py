"""A container in memory, by Azure's rules: a stand-in, for the simulator and for fast tests.

It is *not* the service. It keeps the rules that our code leans on (alignment, the blob's end, leases, sequence numbers,
what is missing and what is there already), takes its errors from the same place as the real client, and passes the same
conformance suite as that client does on Azurite; beyond that suite it proves nothing about Azure.

Deterministic: time is handed in, lease ids are counted, nothing happens by itself. Sparse: a blob of 8 TiB with one
page written takes one chunk of 64 KiB. Several writers share one object; every call is one step, with no await inside.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from replicar.clock import Clock, SystemClock
from replicar.errors import ReplicarError
from replicar.storage.outcomes import answer_error, conflict, fenced, missing, past_end
from replicar.storage.store import COPY_OF, PAGE_BYTES, BlobInfo, Blobs, CopySource, Pages, Ranges, merge_ranges

CHUNK_BYTES: Final = 64 << 10
_PAGES_PER_CHUNK = CHUNK_BYTES // PAGE_BYTES


@dataclass(slots=True)
class _Chunk:
    data: bytearray = field(default_factory=lambda: bytearray(CHUNK_BYTES))
    written: int = 0  # bit n: page n was written


@dataclass(slots=True)
class _Blob:
    size_bytes: int
    metadata: dict[str, str]
    modified_ns: int
    sequence_number: int = 0
    lease_id: str | None = None
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    version: int = 0
    snapshots: dict[str, _Blob] = field(default_factory=dict)

    def changed(self, now_ns: int) -> None:
        self.version, self.modified_ns = self.version + 1, now_ns


class MemoryStore:
    """A `PageBlobStore` without a service; see the module for what that is worth."""

    def __init__(self, container: str = "memory", *, clock: Clock | None = None) -> None:
        self._name = container
        self._clock = clock or SystemClock()
        self._blobs: dict[str, _Blob] | None = None
        self._leases = 0
        self._snapshots = 0

    def __repr__(self) -> str:
        return f"MemoryStore(container={self._name!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Nothing to close: what was stored stays, as it would in the service."""

    def budget_wait_seconds(self, name: str, length: int) -> float:
        return 0.0

    async def ensure_container(self) -> None:
        if self._blobs is None:
            self._blobs = {}

    async def container_exists(self) -> bool:
        return self._blobs is not None

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        blobs = self._container("create the blob")
        if size_bytes < 0 or size_bytes % PAGE_BYTES:
            raise self._refused("create the blob", name, 400, "InvalidHeaderValue")
        if name in blobs:
            raise conflict(self._name, name)
        blobs[name] = _Blob(size_bytes, dict(metadata or {}), self._clock.now_ns())

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        doing = "write pages"
        blob = self._writable(doing, name, lease_id)
        self._check_range(doing, name, blob, offset, len(data))
        if if_sequence_number_lt is not None and blob.sequence_number >= if_sequence_number_lt:
            raise fenced(doing, self._name, name, "SequenceNumberConditionNotMet")
        view = memoryview(data)
        done = 0
        for index, start, length in _pieces(offset, len(data)):
            chunk = blob.chunks.setdefault(index, _Chunk())
            chunk.data[start : start + length] = view[done : done + length]
            chunk.written |= _mask(start, length)
            done += length
        blob.changed(self._clock.now_ns())

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        blob = self._writable("clear pages", name, lease_id)
        self._check_range("clear pages", name, blob, offset, length)
        for index in [index for index in blob.chunks if offset < (index + 1) * CHUNK_BYTES]:
            start = max(offset - index * CHUNK_BYTES, 0)
            stop = min(offset + length - index * CHUNK_BYTES, CHUNK_BYTES)
            if stop <= start:
                continue
            chunk = blob.chunks[index]
            chunk.data[start:stop] = bytes(stop - start)
            chunk.written &= ~_mask(start, stop - start)
            if not chunk.written:
                del blob.chunks[index]
        blob.changed(self._clock.now_ns())

    async def read(self, name: str, offset: int, length: int) -> bytes:
        return self._bytes(self._blob("read", name), name, offset, length)

    def _bytes(self, blob: _Blob, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        if offset < 0 or offset + length > blob.size_bytes:
            raise past_end("read", self._name, name)
        parts = []
        for index, start, size in _pieces(offset, length):
            chunk = blob.chunks.get(index)
            parts.append(bytes(size) if chunk is None else chunk.data[start : start + size])
        return b"".join(parts)

    async def list(self, prefix: str) -> Blobs:
        blobs = self._container("list blobs")
        return [_info(name, blobs[name]) for name in sorted(blobs) if name.startswith(prefix)]

    async def page_ranges(self, name: str) -> Ranges:
        blob = self._blob("list page ranges", name)
        return merge_ranges(
            (index * CHUNK_BYTES + page * PAGE_BYTES, PAGE_BYTES)
            for index, chunk in blob.chunks.items()
            for page in range(_PAGES_PER_CHUNK)
            if chunk.written >> page & 1
        )

    async def properties(self, name: str) -> BlobInfo:
        return _info(name, self._blob("look at the blob", name))

    async def set_metadata(self, name: str, metadata: Mapping[str, str], *, lease_id: str | None = None) -> None:
        blob = self._writable("set metadata", name, lease_id)
        blob.metadata = dict(metadata)
        blob.changed(self._clock.now_ns())

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        blob = self._writable("raise the sequence number", name, lease_id)
        blob.sequence_number += 1
        blob.version += 1
        return blob.sequence_number

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        blobs = self._container("delete the blob")
        if name in blobs:
            if self._writable("delete the blob", name, lease_id).snapshots:
                raise self._refused("delete the blob", name, 409, "SnapshotsPresent")
            del blobs[name]

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        doing = "take a snapshot"
        blob = self._blob(doing, name)
        if lease_id is not None:
            self._writable(doing, name, lease_id)
        if if_etag is not None and if_etag != str(blob.version):
            raise fenced(doing, self._name, name, "ConditionNotMet")
        # Azure's ids are moments of 100 ns; they rise, so that no two are the same.
        now = datetime.fromtimestamp(self._clock.now_ns() / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        self._snapshots += 1
        made = f"{now}.{self._snapshots:07}Z"
        chunks = {index: _Chunk(bytearray(chunk.data), chunk.written) for index, chunk in blob.chunks.items()}
        kept = dict(metadata or blob.metadata)
        blob.snapshots[made] = _Blob(blob.size_bytes, kept, blob.modified_ns, chunks=chunks, version=blob.version)
        return made

    async def snapshots(self, prefix: str) -> Blobs:
        blobs = self._container("list blobs")
        return [
            replace(_info(name, kept), snapshot=snapshot)
            for name in sorted(blobs)
            if name.startswith(prefix)
            for snapshot, kept in sorted(blobs[name].snapshots.items())
        ]

    async def read_snapshot(self, name: str, snapshot: str, offset: int, length: int) -> bytes:
        kept = self._blob("read", name).snapshots.get(snapshot)
        if kept is None:
            raise missing("read", self._name, name)
        return self._bytes(kept, name, offset, length)

    async def copy(self, name: str, source: CopySource) -> bool:
        doing = "copy a snapshot"
        if source.container not in ("", self._name):
            raise missing(doing, source.container, source.name)
        kept = self._blob(doing, source.name).snapshots.get(source.snapshot)
        if kept is None:
            raise missing(doing, self._name, source.name)
        there = self._container(doing).get(name)
        if there is None:
            await self.create(name, kept.size_bytes, metadata={COPY_OF: str(source)})
            made = self._blob(doing, name)
            made.chunks = {index: _Chunk(bytearray(each.data), each.written) for index, each in kept.chunks.items()}
        elif there.metadata.get(COPY_OF) != str(source):
            raise self._refused(doing, name, 409, "BlobAlreadyExists")
        return True

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        blob = self._container("delete the snapshot").get(name)
        if blob is not None:
            blob.snapshots.pop(snapshot, None)

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        blob = self._blob("take the lease", name)
        if blob.lease_id is not None and blob.lease_id != proposed_id:
            raise fenced("take the lease", self._name, name, "LeaseAlreadyPresent")
        if proposed_id is None:
            self._leases += 1
            proposed_id = str(uuid.UUID(int=self._leases))
        blob.lease_id = proposed_id
        return proposed_id

    async def break_lease(self, name: str) -> None:
        self._blob("break the lease", name).lease_id = None

    async def release_lease(self, name: str, lease_id: str) -> None:
        blob = self._blob("release the lease", name)
        if blob.lease_id != lease_id:
            raise fenced("release the lease", self._name, name, "LeaseIdMismatchWithLeaseOperation")
        blob.lease_id = None

    def _container(self, doing: str) -> dict[str, _Blob]:
        if self._blobs is None:
            raise missing(doing, self._name, None)
        return self._blobs

    def _blob(self, doing: str, name: str) -> _Blob:
        blob = self._container(doing).get(name)
        if blob is None:
            raise missing(doing, self._name, name)
        return blob

    def _writable(self, doing: str, name: str, lease_id: str | None) -> _Blob:
        blob = self._blob(doing, name)
        if blob.lease_id == lease_id:
            return blob
        if lease_id is None:
            code = "LeaseIdMissing"
        elif blob.lease_id is None:
            code = "LeaseNotPresentWithBlobOperation"
        else:
            code = "LeaseIdMismatchWithBlobOperation"
        raise fenced(doing, self._name, name, code)

    def _check_range(self, doing: str, name: str, blob: _Blob, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset % PAGE_BYTES or length % PAGE_BYTES:
            raise self._refused(doing, name, 400, "InvalidHeaderValue")
        if offset + length > blob.size_bytes:
            raise past_end(doing, self._name, name)

    def _refused(self, doing: str, name: str, status: int, code: str) -> ReplicarError:
        return answer_error(status, code, {}, doing=doing, container=self._name, blob=name)


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """`(chunk, offset within it, length)` of each chunk that a range touches."""
    end = offset + length
    while offset < end:
        index, start = divmod(offset, CHUNK_BYTES)
        size = min(end - offset, CHUNK_BYTES - start)
        yield index, start, size
        offset += size


def _mask(start: int, length: int) -> int:
    return ((1 << (length // PAGE_BYTES)) - 1) << (start // PAGE_BYTES)


def _info(name: str, blob: _Blob) -> BlobInfo:
    leased = blob.lease_id is not None
    return BlobInfo(name, blob.size_bytes, dict(blob.metadata), leased, blob.modified_ns, etag=str(blob.version))
