"""Retries: exponential backoff with full jitter, bounded in number and in time, for `TransientError` only.

A retry is only as harmless as the request. After an uncertain outcome (see `outcomes.py`) the first request may still
land, even after the second one was answered. So, method by method:

- `put_pages` without a sequence-number condition is for positions that are written once: whoever retries writes the
  same bytes again, and a late twin changes nothing. The same holds for `clear_pages` of what nobody will write again.
- `put_pages` *with* `if_sequence_number_lt` is for positions that are rewritten (a warm replica). There a late twin
  could undo a later write, and only the caller can prevent that, by raising the sequence number first. So an uncertain
  outcome goes straight to the caller; a certain one is retried.
- `create` that finds a blob after an uncertain try looks whether it is ours: equal size and equal metadata. Whoever
  must never mistake another's blob for its own puts something unique into the metadata.
- `acquire_lease` proposes an id made here, once, so that asking twice is asking once. `release_lease` that finds the
  lease gone after an uncertain try has released it.
- `copy` says in the copy's metadata of what it is, and looks before it asks for one.
- `snapshot` may leave more than one; under `if_etag` they all hold the same. `delete_snapshot` is as `delete`.
- `bump_sequence_number` may raise by more than one, which is as good. `delete`, `break_lease`, `set_metadata` (one
  writer) and all reading are harmless by themselves; names are never used again after `delete`.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Final, Self, TypeVar

from replicar.clock import Clock
from replicar.errors import ConflictError, FencedError, TransientError
from replicar.storage.store import (
    BlobInfo,
    Blobs,
    CopySource,
    PageBlobStore,
    Pages,
    Ranges,
    outcome_is_certain,
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to go on.

    The first delay is anything up to `base_seconds`, each further one up to twice as much as the last, never above
    `longest_seconds`; all of it ends after `attempts` tries or `deadline_seconds`, whichever is first.
    """

    attempts: int = 8
    base_seconds: float = 0.25
    longest_seconds: float = 20.0
    deadline_seconds: float = 120.0

    def delay_seconds(self, failures: int, asked_seconds: float | None, random: Random) -> float:
        """How long to wait after `failures` (1 and up) tries: full jitter, but at least what the service asked for."""
        # The exponent is bounded so that it can't overflow; 2 ** 30 quarters of a second are eight years.
        ceiling = min(self.longest_seconds, self.base_seconds * 2.0 ** min(failures - 1, 30))
        return max(random.uniform(0.0, ceiling), asked_seconds or 0.0)


DEFAULT_POLICY: Final = RetryPolicy()


@dataclass(slots=True)
class RetryTally:
    """How many requests failed and were tried again, or given up, by cause (`http_503`, `no_answer`)."""

    failures: Counter[str] = field(default_factory=Counter)

    def note(self, error: TransientError) -> None:
        status = error.fields.get("status")
        self.failures[f"http_{status}" if isinstance(status, int) else "no_answer"] += 1


@dataclass(slots=True)
class _Tries:
    """What happened so far in one call: `uncertain` once any try may have been carried out."""

    failures: int = 0
    uncertain: bool = False


class RetryingStore:
    """`inner`, asked again. `random` makes the jitter and the lease ids; hand in a seeded one and all is repeatable."""

    def __init__(
        self,
        inner: PageBlobStore,
        *,
        clock: Clock,
        random: Random,
        policy: RetryPolicy = DEFAULT_POLICY,
        tally: RetryTally | None = None,
    ) -> None:
        self._inner = inner
        self._clock = clock
        self._random = random
        self._policy = policy
        self._tally = tally or RetryTally()

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
        return self._inner.budget_wait_seconds(name, length)

    async def ensure_container(self) -> None:
        await self._again(self._inner.ensure_container)

    async def container_exists(self) -> bool:
        return await self._again(self._inner.container_exists)

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        tries = _Tries()
        try:
            await self._again(lambda: self._inner.create(name, size_bytes, metadata=metadata), tries)
        except ConflictError as error:
            if not tries.uncertain:
                raise
            there = await self.properties(name)
            if there.size_bytes != size_bytes or dict(there.metadata) != dict(metadata or {}):
                raise ConflictError(
                    error.message,
                    hint=error.hint,
                    ours={"size_bytes": size_bytes, "metadata": dict(metadata or {})},
                    theirs={"size_bytes": there.size_bytes, "metadata": dict(there.metadata)},
                    **{key: value for key, value in error.fields.items() if key not in ("ours", "theirs")},
                ) from error

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        await self._again(
            lambda: self._inner.put_pages(
                name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt
            ),
            only_certain=if_sequence_number_lt is not None,
        )

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        await self._again(lambda: self._inner.clear_pages(name, offset, length, lease_id=lease_id))

    async def read(self, name: str, offset: int, length: int) -> bytes:
        return await self._again(lambda: self._inner.read(name, offset, length))

    async def list(self, prefix: str) -> Blobs:
        return await self._again(lambda: self._inner.list(prefix))

    async def page_ranges(self, name: str) -> Ranges:
        return await self._again(lambda: self._inner.page_ranges(name))

    async def properties(self, name: str) -> BlobInfo:
        return await self._again(lambda: self._inner.properties(name))

    async def set_metadata(self, name: str, metadata: Mapping[str, str], *, lease_id: str | None = None) -> None:
        await self._again(lambda: self._inner.set_metadata(name, metadata, lease_id=lease_id))

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        return await self._again(lambda: self._inner.bump_sequence_number(name, lease_id=lease_id))

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        await self._again(lambda: self._inner.delete(name, lease_id=lease_id))

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        return await self._again(
            lambda: self._inner.snapshot(name, metadata=metadata, lease_id=lease_id, if_etag=if_etag)
        )

    async def snapshots(self, prefix: str) -> Blobs:
        return await self._again(lambda: self._inner.snapshots(prefix))

    async def read_snapshot(self, name: str, snapshot: str, offset: int, length: int) -> bytes:
        return await self._again(lambda: self._inner.read_snapshot(name, snapshot, offset, length))

    async def copy(self, name: str, source: CopySource) -> bool:
        return await self._again(lambda: self._inner.copy(name, source))

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await self._again(lambda: self._inner.delete_snapshot(name, snapshot))

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        lease_id = proposed_id or str(uuid.UUID(int=self._random.getrandbits(128), version=4))
        return await self._again(lambda: self._inner.acquire_lease(name, proposed_id=lease_id))

    async def break_lease(self, name: str) -> None:
        await self._again(lambda: self._inner.break_lease(name))

    async def release_lease(self, name: str, lease_id: str) -> None:
        tries = _Tries()
        try:
            await self._again(lambda: self._inner.release_lease(name, lease_id), tries)
        except FencedError:
            if not tries.uncertain:
                raise

    async def _again(
        self, ask: Callable[[], Awaitable[_T]], tries: _Tries | None = None, *, only_certain: bool = False
    ) -> _T:
        """Ask until there is an answer. Raises the last `TransientError`, with `attempts` among its fields."""
        tries = tries or _Tries()
        give_up_at = self._clock.monotonic() + self._policy.deadline_seconds
        while True:
            try:
                return await ask()
            except TransientError as error:
                certain = outcome_is_certain(error)
                tries.failures += 1
                self._tally.note(error)
                tries.uncertain = tries.uncertain or not certain
                delay = self._policy.delay_seconds(tries.failures, error.retry_after_seconds, self._random)
                error.fields["attempts"] = tries.failures
                if (
                    tries.failures >= self._policy.attempts
                    or self._clock.monotonic() + delay > give_up_at
                    or (only_certain and not certain)
                ):
                    # One try that may yet land makes the whole call uncertain, whatever the last one said.
                    error.fields["outcome_certain"] = not tries.uncertain
                    raise
            await self._clock.sleep(delay)
