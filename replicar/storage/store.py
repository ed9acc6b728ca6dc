"""The one protocol through which every part reads and writes page blobs.

A `PageBlobStore` is bound to one container. It is narrow on purpose: what is not here, nobody needs. Limits and retries
are decorators of the same protocol (`limits.py`, `retry.py`), and one conformance suite runs against Azure's client on
a real emulator and against `MemoryStore`, bare and decorated; so whoever holds a `PageBlobStore` may rely on:

- **Offsets and lengths are bytes** and multiples of 512 (`PAGE_BYTES`) wherever something is written.
- **A write is durable** when `put_pages` returns. When it raises a `TransientError`, `outcome_is_certain` says whether
  the write is known *not* to have happened: after an uncertain outcome the same bytes may still land, at any later
  time.
- **Fencing**: `FencedError` when a lease is missing, lost or somebody else's, or when the blob's sequence number has
  reached what `if_sequence_number_lt` allows. The service decides, so a writer that was paused for an hour can't do
  harm.
- **Missing things** are a `PermanentError` that `is_missing` recognises.

- **Snapshots** are what a blob held when they were taken, whatever is written to it later, and live no longer than it:
  a blob that has any is not deleted. A `snapshot` under `if_etag` that arrives late is refused once the blob changed.

What is weak: metadata names are case-insensitive on the way (HTTP headers), so they must be lower-case identifiers
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self

from replicar.errors import PermanentError

#: The unit of a page blob: offsets, lengths and sizes are multiples of it.
PAGE_BYTES: Final = 512

#: What `PermanentError.fields["reason"]` says when something is not there.
BLOB_MISSING: Final = "blob_missing"
CONTAINER_MISSING: Final = "container_missing"

Pages = bytes | bytearray | memoryview
#: `(offset, length)`, ascending.
Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What the service knows of a blob, or of one of its snapshots (`snapshot` is its id then).

    `last_modified_ns` is whole seconds on Azure; None where it isn't told. `etag` is another one after every change.
    """

    name: str
    size_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    leased: bool = False
    last_modified_ns: int | None = None
    etag: str = ""
    snapshot: str | None = None


Blobs = list[BlobInfo]


@dataclass(frozen=True, slots=True)
class CopySource:
    """A blob's snapshot that is copied; `container` is one of the same account, empty for the store's own."""

    name: str
    snapshot: str
    container: str = ""

    def __str__(self) -> str:
        return f"{self.container}/{self.name}?{self.snapshot}".lstrip("/")


#: The metadata of a copy that say of what it is.
COPY_OF: Final = "replicar_copy_of"


class PageBlobStore(Protocol):
    """One container of page blobs. All methods raise `TransientError` when the service is away, `FencedError`, and
    `PermanentError` as the module says; only what differs from that is said below."""

    async def ensure_container(self) -> None:
        """Make the container unless it is there."""
        ...

    async def container_exists(self) -> bool: ...

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        """Make a blob of zeros, only if there is none of that name.

        Raises:
            ConflictError: there is one already; it is left as it is.
        """
        ...

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        """Write `data` at `offset`, durable on return. `data` must not change until then; it is not copied here."""
        ...

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        """Make `length` bytes zeros again and stop being billed for them."""
        ...

    async def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; any offset and length inside the blob. Past its end is a `PermanentError`."""
        ...

    async def list(self, prefix: str) -> Blobs:
        """All blobs whose names begin with `prefix`, sorted by name."""
        ...

    async def page_ranges(self, name: str) -> Ranges:
        """`(offset, length)` of what was written, ascending, adjacent ranges merged."""
        ...

    async def properties(self, name: str) -> BlobInfo: ...

    async def set_metadata(self, name: str, metadata: Mapping[str, str], *, lease_id: str | None = None) -> None:
        """Replace the blob's metadata as a whole."""
        ...

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        """Raise the blob's sequence number by one; returns the new one. A new blob has 0."""
        ...

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        """Remove the blob; a blob that isn't there is fine. One that has snapshots is a `PermanentError`."""
        ...

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        """Keep what the blob holds now; returns the snapshot's id. Without `metadata` it has the blob's.

        After an uncertain outcome there may be one more than was asked for, at any later time. Raises `FencedError`
        when the blob is no longer as it was under `if_etag`. Ids of a blob rise with time.
        """
        ...

    async def snapshots(self, prefix: str) -> Blobs:
        """All snapshots of blobs whose names begin with `prefix`, sorted by name, then by id."""
        ...

    async def read_snapshot(self, name: str, snapshot: str, offset: int, length: int) -> bytes:
        """As `read`, of a snapshot."""
        ...

    async def copy(self, name: str, source: CopySource) -> bool:
        """Have the service make a blob as a copy of a snapshot; whether it is complete, or still under way.

        Asked again it looks how far that is. A copy that is complete stays as it is, with what was written to it since,
        as long as its metadata name the source (COPY_OF).

        Raises:
            ConflictError: there is another blob of that name.
            PermanentError: the snapshot is not there, the service may not read it, or it gave the copy up.
        """
        ...

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        """Remove a snapshot; one that isn't there is fine. The blob's lease does not protect it: so Azure has it."""
        ...

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        """Take the blob's infinite lease; returns its id. With `proposed_id` (a UUID), asking again is harmless.

        Raises:
            FencedError: somebody else holds it.
        """
        ...

    async def break_lease(self, name: str) -> None:
        """End whoever's lease at once; none is fine."""
        ...

    async def release_lease(self, name: str, lease_id: str) -> None:
        """Give the lease back. Raises `FencedError` when it was no longer ours."""
        ...

    def budget_wait_seconds(self, name: str, length: int) -> float:
        """How long a request of `length` bytes to this blob would have to wait for Azure's limits: 0 when not at all.

        Only a question: nothing is reserved. A writer with several stripe blobs asks it to pick one that needn't wait.
        """
        ...

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def is_missing(error: BaseException) -> bool:
    """Whether the error says that a blob (or its container) is not there."""
    return isinstance(error, PermanentError) and error.fields.get("reason") in (BLOB_MISSING, CONTAINER_MISSING)


def is_gone(error: BaseException) -> bool:
    """Whether the error says that a blob is not there, in a container that is.

    Whoever takes a missing blob for an answer ("it was removed", "there never was one") asks this. A container that is
    away for a moment, deleted by mistake say and being restored, says nothing about its blobs.
    """
    return isinstance(error, PermanentError) and error.fields.get("reason") == BLOB_MISSING


def outcome_is_certain(error: BaseException) -> bool:
    """Whether the failed request is known not to have been carried out, now or later. False when nobody knows."""
    certain = getattr(error, "fields", {}).get("outcome_certain", False)
    return bool(certain)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """`(offset, length)` pairs sorted, those that touch or overlap joined. The emulator never joins, Azure may not."""
    merged: Ranges = []
    for offset, length in sorted(ranges):
        if merged and merged[-1][0] + merged[-1][1] >= offset:
            start, size = merged[-1]
            merged[-1] = (start, max(size, offset + length - start))
        else:
            merged.append((offset, length))
    return merged
