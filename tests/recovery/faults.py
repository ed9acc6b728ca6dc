"""Stores that count what is asked of them, or stop at a chosen operation, as a process that is killed there would."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from replicar.storage import PageBlobStore

_WRITES: Final = frozenset(
    (
        *("create", "put_pages", "clear_pages", "set_metadata", "delete", "snapshot", "copy", "delete_snapshot"),
        *("acquire_lease", "break_lease", "release_lease"),
    )
)
_READS: Final = frozenset(("read", "list", "page_ranges", "properties", "snapshots", "read_snapshot"))


class Stopped(Exception):
    """The process is dead: nothing that it does reaches storage any more."""


class _Wrapped:
    """Hands every operation on; `_operation` is told of it before, and of its end."""

    def __init__(self, inner: PageBlobStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in _READS | _WRITES:
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            self._before(name)
            result = await found(*arguments, **options)
            self._after(name)
            return result

        return call

    def _before(self, name: str) -> None: ...

    def _after(self, name: str) -> None: ...


class CountingStore(_Wrapped):
    """Counts reads and writes."""

    def __init__(self, inner: PageBlobStore) -> None:
        super().__init__(inner)
        self.reads = self.writes = 0

    def _before(self, name: str) -> None:
        self.reads += name in _READS
        self.writes += name in _WRITES


class MeetingStore:
    """Lets somebody else do something before every operation, as another process would."""

    def __init__(self, inner: PageBlobStore, meet: Callable[[], Awaitable[None]]) -> None:
        self._inner, self._meet = inner, meet

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in _READS | _WRITES:
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            await self._meet()
            return await found(*arguments, **options)

        return call


class StoppingStore(_Wrapped):
    """Stops for good at operation `step` (from 0), after it was carried out (`applied`) or before."""

    def __init__(self, inner: PageBlobStore, step: int, *, applied: bool) -> None:
        super().__init__(inner)
        self._left, self._applied = step, applied
        self.stopped = False

    def _before(self, name: str) -> None:
        if self.stopped or (self._left == 0 and not self._applied):
            self.stopped = True
            raise Stopped
        self._left -= 1

    def _after(self, name: str) -> None:
        if self._left < 0:
            self.stopped = True
            raise Stopped
