"""Page-blob storage as a service far away: real rules, and every way in which an answer may fail to be the truth.

The blobs are `MemoryStore`'s. A request travels, is carried out there, and its answer travels back; the process that
asked may die meanwhile, and the request is carried out all the same. What the service does to a request is its *fate*,
drawn from the weather:

    done            carried out and answered
    refused         answered with a status of the service's documentation, not carried out (the outcome is certain)
    failed          answered 500 or not at all; carried out or not, the asker can't know
    late            answered 500 (time-out), and carried out much later, perhaps after other writes

`BlobClient` is one process's connection to it, to be put under the real limits and retries.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from replicar.errors import ReplicarError
from replicar.storage.memory import MemoryStore
from replicar.storage.outcomes import answer_error, no_answer
from replicar.storage.store import BlobInfo, Blobs, CopySource, Pages, Ranges
from simulator.world.clocks import MachineClock
from simulator.world.loop import VirtualLoop
from simulator.world.processes import current

#: The machine that storage is, for the network's ways.
STORAGE: Final = "storage"
CONTAINER: Final = "logs"
#: Statuses of the service's documentation that a sound request may be answered with, none of them carried out.
REFUSALS: Final = (
    (503, "ServerBusy"),
    (429, "TooManyRequests"),
    (408, "RequestTimeout"),
    (409, "ContainerBeingDeleted"),
    (403, "AuthenticationFailed"),
    (401, "InvalidAuthenticationInfo"),
)
_FAILURES: Final = ((500, "InternalError"), (500, "OperationTimedOut"), (502, ""), (504, ""))
#: How long the client's own time-out is; a request that nobody answers fails after it.
ANSWER_SECONDS: Final = 15.0

_T = TypeVar("_T")


@dataclass(slots=True)
class Weather:
    """How often what happens to a request: shares of all, the rest is done."""

    refused: float = 0.0
    failed: float = 0.0
    late: float = 0.0
    throttled: float = 0.0
    latency_seconds: float = 0.01
    late_seconds: float = 20.0


class BlobService:
    """The service. `weather` is its present one."""

    def __init__(
        self,
        loop: VirtualLoop,
        randomness: random.Random,
        note: Callable[[str], None],
        count: Callable[[str], None],
    ) -> None:
        self.loop = loop
        self.randomness = randomness
        self.note, self.count = note, count
        self.inner = MemoryStore(CONTAINER, clock=MachineClock(loop))
        self.weather = Weather()
        self.is_open: Callable[[str], bool] = lambda machine: True
        self.requests = 0
        self._context = contextvars.Context()  # of nobody
        self._kept: Any = None

    def delete_container(self) -> None:
        """Somebody deletes the container, by mistake."""
        if self._kept is None and self.inner._blobs is not None:
            self._kept, self.inner._blobs = self.inner._blobs, None

    def restore_container(self) -> None:
        """And brings it back (soft delete)."""
        if self._kept is not None:
            self.inner._blobs, self._kept = self._kept, None

    async def make_container(self) -> None:
        """Nobody can make one of the name of one that is being deleted."""
        if self._kept is not None:
            raise answer_error(409, "ContainerBeingDeleted", {}, doing="make the container", container=CONTAINER)
        await self.inner.ensure_container()

    def break_leases(self) -> int:
        """Somebody breaks every lease; how many there were."""
        held = [blob for _, blob in sorted((self.inner._blobs or {}).items()) if blob.lease_id is not None]
        for blob in held:
            blob.lease_id = None
        return len(held)

    def damage(self, draw: random.Random) -> str | None:
        """Flip a bit of a page that was written; where, or None when nothing was."""
        written = [(name, index) for name, blob in sorted((self.inner._blobs or {}).items()) for index in blob.chunks]
        if not written:
            return None
        name, index = draw.choice(written)
        assert self.inner._blobs is not None
        chunk = self.inner._blobs[name].chunks[index]
        used = [page for page in range(128) if chunk.written >> page & 1]
        at = draw.choice(used) * 512 + draw.randrange(512)
        chunk.data[at] ^= 1 << draw.randrange(8)
        return f"{name} at {index * 65536 + at}"

    def fate(self, *, writes: bool) -> str:
        """What becomes of the next request."""
        weather, chance = self.weather, self.randomness.random()
        for name in ("refused", "throttled", "failed", "late"):
            chance -= getattr(weather, name)
            if chance < 0:
                return name if writes or name != "late" else "failed"
        return "done"

    def carry_out(self, act: Callable[[], Awaitable[Any]]) -> tuple[Any, ReplicarError | None]:
        """Do it now."""
        try:
            coroutine: Any = act()
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value, None
        except ReplicarError as error:
            return None, error
        raise AssertionError("a call of the memory store is one step")

    def land(self, what: str, act: Callable[[], Awaitable[Any]]) -> None:
        """What was said to have failed is carried out."""
        _, error = self.carry_out(act)
        self.note(f"storage: {what} lands late{f', and is refused ({type(error).__name__})' if error else ''}")

    def later(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        """Have the service do something, whoever dies meanwhile."""
        self.loop.call_later(seconds, call, *args, context=self._context)


class BlobClient:
    """A `PageBlobStore`: how one process reaches the service."""

    def __init__(self, service: BlobService) -> None:
        self._service = service
        process = current()
        self._machine = process.machine.name if process is not None else ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Nothing to close."""

    def budget_wait_seconds(self, name: str, length: int) -> float:
        return 0.0

    async def ensure_container(self) -> None:
        await self._ask("make the container", None, self._service.make_container, writes=True)

    async def container_exists(self) -> bool:
        return await self._ask("look for the container", None, self._service.inner.container_exists)

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        inner = self._service.inner
        await self._ask("create the blob", name, lambda: inner.create(name, size_bytes, metadata=metadata), writes=True)

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        sent, inner = bytes(data), self._service.inner
        await self._ask(
            "write pages",
            name,
            lambda: inner.put_pages(name, offset, sent, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt),
            writes=True,
            length=len(sent),
        )

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        inner = self._service.inner
        await self._ask(
            "clear pages", name, lambda: inner.clear_pages(name, offset, length, lease_id=lease_id), writes=True
        )

    async def read(self, name: str, offset: int, length: int) -> bytes:
        return await self._ask("read", name, lambda: self._service.inner.read(name, offset, length), length=length)

    async def list(self, prefix: str) -> Blobs:
        return await self._ask("list blobs", None, lambda: self._service.inner.list(prefix))

    async def page_ranges(self, name: str) -> Ranges:
        return await self._ask("list page ranges", name, lambda: self._service.inner.page_ranges(name))

    async def properties(self, name: str) -> BlobInfo:
        return await self._ask("look at the blob", name, lambda: self._service.inner.properties(name))

    async def set_metadata(self, name: str, metadata: Mapping[str, str], *, lease_id: str | None = None) -> None:
        inner = self._service.inner
        await self._ask(
            "set metadata", name, lambda: inner.set_metadata(name, metadata, lease_id=lease_id), writes=True
        )

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        inner = self._service.inner
        return await self._ask(
            "raise the sequence number", name, lambda: inner.bump_sequence_number(name, lease_id=lease_id), writes=True
        )

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        inner = self._service.inner
        await self._ask("delete the blob", name, lambda: inner.delete(name, lease_id=lease_id), writes=True)

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        inner = self._service.inner
        return await self._ask(
            "take a snapshot",
            name,
            lambda: inner.snapshot(name, metadata=metadata, lease_id=lease_id, if_etag=if_etag),
            writes=True,
        )

    async def snapshots(self, prefix: str) -> Blobs:
        return await self._ask("list snapshots", None, lambda: self._service.inner.snapshots(prefix))

    async def read_snapshot(self, name: str, snapshot: str, offset: int, length: int) -> bytes:
        inner = self._service.inner
        return await self._ask("read", name, lambda: inner.read_snapshot(name, snapshot, offset, length), length=length)

    async def copy(self, name: str, source: CopySource) -> bool:
        inner = self._service.inner
        return await self._ask("copy a snapshot", name, lambda: inner.copy(name, source), writes=True)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        inner = self._service.inner
        await self._ask("delete the snapshot", name, lambda: inner.delete_snapshot(name, snapshot), writes=True)

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        inner = self._service.inner
        return await self._ask(
            "take the lease", name, lambda: inner.acquire_lease(name, proposed_id=proposed_id), writes=True
        )

    async def break_lease(self, name: str) -> None:
        await self._ask("break the lease", name, lambda: self._service.inner.break_lease(name), writes=True)

    async def release_lease(self, name: str, lease_id: str) -> None:
        inner = self._service.inner
        await self._ask("release the lease", name, lambda: inner.release_lease(name, lease_id), writes=True)

    async def _ask(
        self,
        doing: str,
        name: str | None,
        act: Callable[[], Awaitable[_T]],
        *,
        writes: bool = False,
        length: int = 0,
    ) -> _T:
        service = self._service
        service.requests += 1
        draw, weather = service.randomness, service.weather
        travel = weather.latency_seconds * draw.uniform(0.2, 1.0) + length / 60e6
        if not service.is_open(self._machine):
            await asyncio.sleep(ANSWER_SECONDS * draw.uniform(0.1, 1.0))
            if not service.is_open(self._machine):
                raise no_answer(doing, CONTAINER, name, cause="ServiceRequestError", certain=draw.random() < 0.5)
        fate = service.fate(writes=writes)
        service.count(f"{self._machine} {doing} {name} {length} {fate}")
        place: dict[str, Any] = {"doing": doing, "container": CONTAINER, "blob": name}
        if fate in ("refused", "throttled"):
            await asyncio.sleep(travel)
            status, code = REFUSALS[0] if fate == "throttled" else draw.choice(REFUSALS)
            headers = {"retry-after": str(draw.randint(1, 5))} if status in (503, 429) else {}
            raise answer_error(status, code, headers, **place)
        answer: asyncio.Future[_T] = service.loop.create_future()
        if fate == "late":
            service.later(draw.uniform(1.0, weather.late_seconds), service.land, f"{doing} {name}", act)
        elif fate == "done" or draw.random() < 0.5:
            service.later(travel, self._carry_out, act, answer)
        if fate == "done":
            found = await answer
            await asyncio.sleep(travel)
            return found
        answer.cancel()
        await asyncio.sleep(ANSWER_SECONDS * draw.uniform(0.1, 1.0))
        if draw.random() < 0.5:
            raise no_answer(doing, CONTAINER, name, cause="ServiceResponseTimeoutError", certain=False)
        status, code = draw.choice(_FAILURES)
        raise answer_error(status, code, {}, **place)

    def _carry_out(self, act: Callable[[], Awaitable[_T]], answer: asyncio.Future[_T]) -> None:
        found, error = self._service.carry_out(act)
        if answer.done():
            return
        if error is None:
            answer.set_result(found)
        else:
            answer.set_exception(error)
