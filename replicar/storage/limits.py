"""Azure's limits of page blobs, kept by us, since an emulator forgives what Azure does not.

`LimitedStore` refuses with a `LimitError` what Azure would refuse, before anything is sent, and paces what Azure would
throttle: 500 requests and 60 MiB a second for each blob ("Scalability targets for Blob storage", standard page blobs).
Each blob has two token buckets of one second's worth. A request takes its tokens at once, possibly into debt, and waits
for the debt to be paid; so those who wait are served in the order in which they came, and a long queue is the caller's
own: each waiter is one of the caller's requests. A request that is cancelled while it waits has spent its tokens, which
errs on the careful side.

What is weak: the buckets know only this process's requests. Others' show as 503, which `retry.py` handles.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from replicar.clock import Clock
from replicar.errors import LimitError, ReplicarError
from replicar.storage.store import PAGE_BYTES, BlobInfo, Blobs, CopySource, PageBlobStore, Pages, Ranges, is_missing

#: Largest Put Page ("Put Page": 4 MiB).
MAX_PUT_BYTES: Final = 4 << 20
#: Largest page blob.
MAX_BLOB_BYTES: Final = 8 << 40
MAX_REQUESTS_PER_SECOND: Final = 500.0
MAX_BYTES_PER_SECOND: Final = float(60 << 20)
#: All of a blob's metadata, names and values ("Setting and retrieving properties and metadata").
MAX_METADATA_BYTES: Final = 8 << 10
#: Blobs whose budget and size are remembered. The longest unused is forgotten first; after a second's rest its buckets
#: were full anyway.
MAX_PACED_BLOBS: Final = 1024

_METADATA_NAME = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(slots=True)
class TokenBucket:
    """`rate` tokens a second, at most one second's worth saved up. Pure: the time (seconds, never going back) is told.

    Attributes:
        tokens: what is there at `at`; negative while somebody has to wait.
    """

    rate: float
    tokens: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> TokenBucket:
        return cls(rate, rate, now)

    def wait_seconds(self, amount: float, now: float) -> float:
        """How long until `amount` tokens are there; for more than a second's worth, until the bucket is full."""
        return max(0.0, min(amount, self.rate) - self._tokens(now)) / self.rate

    def take(self, amount: float, now: float) -> float:
        """Take `amount` now, into debt if need be; returns the seconds to wait before using it."""
        self.tokens, self.at = self._tokens(now) - amount, now
        return max(0.0, -self.tokens) / self.rate

    def _tokens(self, now: float) -> float:
        return min(self.rate, self.tokens + (now - self.at) * self.rate)


@dataclass(slots=True)
class _Budget:
    requests: TokenBucket
    transfer: TokenBucket
    size_bytes: int | None = None


class LimitedStore:
    """`inner`, held to Azure's limits. Everything else as `PageBlobStore` says."""

    def __init__(self, inner: PageBlobStore, *, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, trace)

    async def close(self) -> None:
        await self._inner.close()

    def budget_wait_seconds(self, name: str, length: int) -> float:
        budget, now = self._budgets.get(name), self._clock.monotonic()
        if budget is None:
            return 0.0
        return max(budget.requests.wait_seconds(1, now), budget.transfer.wait_seconds(length, now))

    async def ensure_container(self) -> None:
        await self._inner.ensure_container()

    async def container_exists(self) -> bool:
        return await self._inner.container_exists()

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        if size_bytes > MAX_BLOB_BYTES:
            raise _too_much("blob_bytes", MAX_BLOB_BYTES, size_bytes, name, "roll over to another blob earlier")
        _check_aligned("blob size", size_bytes, name)
        check_metadata(metadata or {}, name)
        await self._pace(name)
        await self._inner.create(name, size_bytes, metadata=metadata)
        self._budget(name).size_bytes = size_bytes

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        if len(data) > MAX_PUT_BYTES:
            raise _too_much("put_bytes", MAX_PUT_BYTES, len(data), name, "split the write")
        if isinstance(data, memoryview) and data.nbytes != len(data):
            raise ValueError("pages are bytes: cast the view to 'B'")
        await self._check_range(name, offset, len(data))
        await self._pace(name, len(data))
        await self._inner.put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        await self._check_range(name, offset, length)
        await self._pace(name)
        await self._inner.clear_pages(name, offset, length, lease_id=lease_id)

    async def read(self, name: str, offset: int, length: int) -> bytes:
        await self._pace(name, length)
        return await self._inner.read(name, offset, length)

    async def list(self, prefix: str) -> Blobs:
        return await self._inner.list(prefix)

    async def page_ranges(self, name: str) -> Ranges:
        await self._pace(name)
        return await self._inner.page_ranges(name)

    async def properties(self, name: str) -> BlobInfo:
        await self._pace(name)
        info = await self._inner.properties(name)
        self._budget(name).size_bytes = info.size_bytes
        return info

    async def set_metadata(self, name: str, metadata: Mapping[str, str], *, lease_id: str | None = None) -> None:
        check_metadata(metadata, name)
        await self._pace(name)
        await self._inner.set_metadata(name, metadata, lease_id=lease_id)

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        await self._pace(name)
        return await self._inner.bump_sequence_number(name, lease_id=lease_id)

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        await self._pace(name)
        await self._inner.delete(name, lease_id=lease_id)
        self._budgets.pop(name, None)

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        check_metadata(metadata or {}, name)
        await self._pace(name)
        return await self._inner.snapshot(name, metadata=metadata, lease_id=lease_id, if_etag=if_etag)

    async def snapshots(self, prefix: str) -> Blobs:
        return await self._inner.snapshots(prefix)

    async def read_snapshot(self, name: str, snapshot: str, offset: int, length: int) -> bytes:
        await self._pace(name, length)
        return await self._inner.read_snapshot(name, snapshot, offset, length)

    async def copy(self, name: str, source: CopySource) -> bool:
        await self._pace(name)
        return await self._inner.copy(name, source)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await self._pace(name)
        await self._inner.delete_snapshot(name, snapshot)

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        await self._pace(name)
        return await self._inner.acquire_lease(name, proposed_id=proposed_id)

    async def break_lease(self, name: str) -> None:
        await self._pace(name)
        await self._inner.break_lease(name)

    async def release_lease(self, name: str, lease_id: str) -> None:
        await self._pace(name)
        await self._inner.release_lease(name, lease_id)

    async def _pace(self, name: str, length: int = 0) -> None:
        budget, now = self._budget(name), self._clock.monotonic()
        wait = max(budget.requests.take(1, now), budget.transfer.take(length, now))
        if wait > 0:
            await self._clock.sleep(wait)

    def _budget(self, name: str) -> _Budget:
        budget = self._budgets.get(name)
        if budget is None:
            now = self._clock.monotonic()
            budget = _Budget(
                TokenBucket.full(MAX_REQUESTS_PER_SECOND, now), TokenBucket.full(MAX_BYTES_PER_SECOND, now)
            )
            self._budgets[name] = budget
            if len(self._budgets) > MAX_PACED_BLOBS:
                self._budgets.popitem(last=False)
        else:
            self._budgets.move_to_end(name)
        return budget

    async def _check_range(self, name: str, offset: int, length: int) -> None:
        _check_aligned("offset", offset, name)
        _check_aligned("length", length, name)
        if length == 0:
            raise LimitError(f"a write of no bytes to blob {name}", hint="write whole pages of 512 bytes", blob=name)
        size = self._budget(name).size_bytes
        if size is None or offset + length > size:
            # Asked once a blob, and again before refusing: somebody may have made it anew, larger.
            try:
                size = (await self.properties(name)).size_bytes
            except ReplicarError as error:
                if is_missing(error):
                    self._budgets.pop(name, None)
                raise
        if offset + length > size:
            raise _too_much("blob_end", size, offset + length, name, "the blob is full; begin another")


def check_metadata(metadata: Mapping[str, str], name: str) -> None:
    """Refuse what would not come back as it was sent.

    Raises:
        ValueError: a name that is no lower-case identifier, or a value that is no printable ASCII text without outer
            spaces: both travel as HTTP headers.
        LimitError: more than 8 KiB in all.
    """
    for key, value in metadata.items():
        if not _METADATA_NAME.fullmatch(key):
            raise ValueError(f"metadata name {key!r} is no lower-case identifier")
        if not value or not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(f"the value of metadata {key!r} is no printable ASCII text")
    size = sum(len(key) + len(value) for key, value in metadata.items())
    if size > MAX_METADATA_BYTES:
        raise _too_much("metadata_bytes", MAX_METADATA_BYTES, size, name, "keep less in the metadata")


def _check_aligned(what: str, value: int, name: str) -> None:
    if value < 0 or value % PAGE_BYTES:
        raise LimitError(
            f"{what} {value} of blob {name} is no multiple of {PAGE_BYTES}",
            hint="page blobs are written in whole pages",
            limit="page_bytes",
            maximum=PAGE_BYTES,
            asked=value,
            blob=name,
        )


def _too_much(limit: str, maximum: int, asked: int, name: str, hint: str) -> LimitError:
    return LimitError(
        f"{asked} bytes are more than the {maximum} that {limit} allows for blob {name}",
        hint=hint,
        limit=limit,
        maximum=maximum,
        asked=asked,
        blob=name,
    )
