"""The application: carries out a workload on a protected disk over NBD and tells the oracle what it saw.

It keeps up to `depth` operations in flight, never two on the same place, as a file system does. It can be told to come
to rest (`quiet`), which gives an instant between two writes. When the server hangs up, what was in flight is lost as
far as anybody can say; it goes on where `reconnect_seconds` gives it time to, else it ends with the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from replicar.errors import ReplicarError, TransientError
from replicar.nbd.client import Address, NbdClient
from replicar.nbd.client_protocol import Timing
from simulator import content
from simulator.content import Stamp
from simulator.oracle import Change, Oracle
from simulator.workload import Action, Operation

#: How often a lost connection is tried again.
_RECONNECT_SECONDS: Final = 0.1
#: What is waited behind the last acknowledgement and before the next issue, so that an instant lies strictly between.
_QUIET_SECONDS: Final = 0.005


@dataclass(slots=True)
class Tally:
    """What the application did so far; `reconnects` counts lost connections, `changes_lost` what was in flight then."""

    operations: int = 0
    bytes_written: int = 0
    bytes_zeroed: int = 0
    flushes: int = 0
    reconnects: int = 0
    changes_lost: int = 0


class Application:
    """One disk's user.

    Args:
        address: where the disk is served; `export` its name there.
        operations: what to do, each with the second at which it is due (see `workload.paced`); may be endless.
        seed: goes into every sector that is written.
        depth: operations in flight at most.
        reconnect_seconds: how long to try again after a lost connection; 0 ends `run` with the error instead.
    """

    def __init__(
        self,
        address: Address,
        oracle: Oracle,
        operations: Iterator[tuple[float, Operation]],
        *,
        export: str = "",
        seed: int = 0,
        depth: int = 8,
        reconnect_seconds: float = 0.0,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.tally = Tally()
        self.oracle = oracle
        self._address, self._export = address, export
        self._operations = operations
        self._seed = seed
        self._reconnect_seconds = reconnect_seconds
        self._now_ns = now_ns
        self._number = 0
        self._running = 0
        self._slots = asyncio.Semaphore(depth)
        self._settled = asyncio.Event()
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._client: NbdClient | None = None
        self._broken = asyncio.Event()

    async def run(self) -> None:
        """Work until `stop`, or until the operations end. Everything is acknowledged or lost when this returns.

        Raises:
            TransientError: the connection was lost and could not be had again in time.
            PermanentError: the disk refused an operation.
        """
        await self._connect()
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._issue(tasks)
        except* ReplicarError as group:
            raise first_error(group) from None
        finally:
            if self._client is not None:
                await self._client.close()

    def stop(self) -> None:
        """Issue nothing more; `run` returns when what is in flight is done."""
        self._stopping = True
        self._may_run.set()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[int]:
        """Come to rest; gives an instant (ns) behind the last acknowledgement and before the next issue."""
        self._may_run.clear()
        try:
            await self._idle.wait()
            await asyncio.sleep(_QUIET_SECONDS)
            instant = self._now_ns()
            await asyncio.sleep(_QUIET_SECONDS)
            yield instant
        finally:
            self._may_run.set()

    async def flush(self) -> Timing:
        """Make everything acknowledged so far durable on the disk."""
        if self._client is None:
            raise TransientError("the application is not connected")
        self.tally.flushes += 1
        return await self._client.flush()

    async def _issue(self, tasks: asyncio.TaskGroup) -> None:
        began = time.monotonic()
        for due, operation in self._operations:
            # Time spent at rest counts: after a pause the workload catches up, as waiting users do.
            wait = began + due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            await self._slots.acquire()
            if not await self._ready(operation):
                break
            self._begin(tasks, operation)

    async def _ready(self, operation: Operation) -> bool:
        """Wait until the operation may be issued, without another wait; False when it never may."""
        while not self._stopping:
            if not self._may_run.is_set():
                await self._may_run.wait()
            elif self._broken.is_set():
                await self._idle.wait()
                await self._connect()
            elif operation.length and self.oracle.busy(operation.offset, operation.length):
                self._settled.clear()
                await self._settled.wait()
            else:
                return True
        return False

    def _begin(self, tasks: asyncio.TaskGroup, operation: Operation) -> None:
        """Start one operation. Its change is known to the oracle before anything else runs."""
        self._number += 1
        now = self._now_ns()
        change: Change | None = None
        if operation.action is not Action.FLUSH:
            stamp = Stamp(self._seed, self._number, now) if operation.action is Action.WRITE else None
            change = self.oracle.begin(operation.offset, operation.length, stamp, now)
        self._idle.clear()
        self._running += 1
        tasks.create_task(self._carry_out(operation, change))

    async def _carry_out(self, operation: Operation, change: Change | None) -> None:
        try:
            timing = await self._request(operation, change)
            if change is not None:
                self.oracle.acknowledge(change, timing.acknowledged_ns)
            self._count(operation)
        except TransientError:
            self._broken.set()
            if not self._reconnect_seconds:
                raise
        finally:
            if change is not None and change.acknowledged_ns is None:
                self.oracle.lose(change)
                self.tally.changes_lost += 1
            self._running -= 1
            self._slots.release()
            self._settled.set()
            if self._running == 0:
                self._idle.set()

    async def _request(self, operation: Operation, change: Change | None) -> Timing:
        client = self._client
        if client is None:
            raise TransientError("the application is not connected")
        match operation.action:
            case Action.FLUSH:
                return await client.flush()
            case Action.ZERO:
                return await client.write_zeroes(operation.offset, operation.length, fua=operation.fua)
            case Action.TRIM:
                return await client.trim(operation.offset, operation.length)
        if change is None or change.stamp is None:
            raise ValueError("a write without a stamp")
        data = content.make(change.stamp, operation.offset, operation.length)
        return await client.write(operation.offset, data, fua=operation.fua)

    def _count(self, operation: Operation) -> None:
        self.tally.operations += 1
        match operation.action:
            case Action.WRITE:
                self.tally.bytes_written += operation.length
            case Action.ZERO | Action.TRIM:
                self.tally.bytes_zeroed += operation.length
            case Action.FLUSH:
                self.tally.flushes += 1

    async def _connect(self) -> None:
        deadline = time.monotonic() + self._reconnect_seconds
        if self._client is not None:
            self.tally.reconnects += 1
            with contextlib.suppress(TransientError):
                await self._client.close()
        while True:
            try:
                self._client = await NbdClient.connect(self._address, export=self._export, now_ns=self._now_ns)
            except TransientError:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_RECONNECT_SECONDS)
            else:
                self._broken.clear()
                return


def first_error(group: BaseExceptionGroup[ReplicarError]) -> ReplicarError:
    """One error of a group of them, the first that was raised; what came after mostly follows from it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, ReplicarError):
        raise ValueError(f"{error!r} is none of ours")
    return error
