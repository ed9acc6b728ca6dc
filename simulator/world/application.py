"""The application: writes to a machine's disks as its workload says, through the real NBD client, and keeps the truth.

One coroutine a disk, several requests in flight. It never has two changes in flight at one place, as file systems
don't. A connection that breaks loses what was in flight, and is made again, as a hypervisor does it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from replicar.clock import Clock
from replicar.errors import PermanentError, TransientError
from replicar.nbd.client import NbdClient
from simulator.traces.replay import Replay
from simulator.workload import SECTOR_BYTES, Action, Operation
from simulator.workloads import Workload
from simulator.world.parts import NBD_PORT
from simulator.world.truth import Change, Truth, make

#: Requests of one disk in flight.
IN_FLIGHT: Final = 4
_AGAIN_SECONDS: Final = 0.3
#: How far a disk may fall behind its workload before the workload waits for it.
MAX_BEHIND_SECONDS: Final = 1.0


@dataclass(slots=True)
class Counts:
    """What was asked for and what became of it."""

    writes: int = 0
    acknowledged: int = 0
    refused: int = 0
    lost: int = 0
    flushes: int = 0


class Numbers:
    """Gives every write a number of its own, rising over all disks."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


class Application:
    """Writes to one disk until its workload ends.

    Args:
        sequence: the stream's next sequence now.
    """

    def __init__(
        self,
        disk: str,
        number: int,
        truth: Truth,
        workload: Workload | Replay,
        numbers: Numbers,
        clock: Clock,
        sequence: Callable[[], int],
        randomness: random.Random,
    ) -> None:
        self.counts = Counts()
        self.is_writing = True
        self._disk, self._port = disk, NBD_PORT + number
        self._truth, self._workload, self._numbers = truth, workload, numbers
        self._clock, self._sequence, self._randomness = clock, sequence, randomness
        self._waiting: dict[asyncio.Task[None], None] = {}
        self._behind = clock.monotonic()

    async def run(self) -> None:
        """Write for ever; a connection that breaks is made again."""
        operations = self._workload.operations(self._truth.sectors * SECTOR_BYTES, self._randomness)
        while True:
            try:
                address = ("127.0.0.1", self._port)
                async with await NbdClient.connect(address, export=self._disk, now_ns=self._clock.now_ns) as client:
                    await self._write(client, operations)
                    return
            except TransientError:
                await self._settle()
                await asyncio.sleep(_AGAIN_SECONDS * self._randomness.uniform(0.5, 2.0))
            except PermanentError:  # no such export just now
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _write(self, client: NbdClient, operations: Iterator[tuple[float, Operation]]) -> None:
        while self.is_writing:
            due, found = next(operations)
            # What was due while nobody answered is not made up for.
            self._behind = max(self._behind, self._clock.monotonic() - due - MAX_BEHIND_SECONDS)
            await asyncio.sleep(max(self._behind + due - self._clock.monotonic(), 0.0))
            if self._has_ended():  # while it slept
                break
            if not client.connected:
                raise TransientError("the connection broke")
            while len(self._waiting) >= IN_FLIGHT:
                await asyncio.wait(list(self._waiting), return_when=asyncio.FIRST_COMPLETED)
            await self._place(found)
            if self._has_ended():
                break
            task = asyncio.get_running_loop().create_task(self._do(client, found))
            self._waiting[task] = None
            task.add_done_callback(lambda done: self._waiting.pop(done, None))
        await self._settle()

    def _has_ended(self) -> bool:
        return not self.is_writing

    async def _place(self, operation: Operation) -> None:
        """Wait until nothing is in flight where it goes."""
        first, end = operation.offset // SECTOR_BYTES, (operation.offset + operation.length) // SECTOR_BYTES
        while operation.length and self._truth.busy(first, end) and self._waiting:
            await asyncio.wait(list(self._waiting), return_when=asyncio.FIRST_COMPLETED)

    async def _do(self, client: NbdClient, operation: Operation) -> None:
        if operation.action is Action.FLUSH:
            await self._flush(client)
            return
        first, end = operation.offset // SECTOR_BYTES, (operation.offset + operation.length) // SECTOR_BYTES
        number = self._numbers.next() if operation.action is Action.WRITE else 0
        now_ns = self._clock.now_ns()
        issued: list[Change] = []

        def issue(_: int) -> None:
            self.counts.writes += 1
            issued.append(self._truth.issue(first, end, number, self._sequence()))

        before = self._truth.acknowledged() if operation.fua else []
        try:
            if operation.action is Action.WRITE:
                data = make(self._truth.seed, number, now_ns, first, end)
                await client.write(operation.offset, data, fua=operation.fua, on_issue=issue)
            elif operation.action is Action.TRIM:
                await client.trim(operation.offset, operation.length, on_issue=issue)
            else:
                await client.write_zeroes(operation.offset, operation.length, on_issue=issue)
        except PermanentError:  # the disk failed it
            self.counts.refused += 1
            self._lose(issued)
            _doubt(before)
        except TransientError:
            self.counts.lost += 1
            self._lose(issued)
        else:
            self.counts.acknowledged += 1
            self._truth.acknowledge(issued[0], self._sequence())
            if operation.fua:
                for change in [*before, issued[0]]:
                    change.flushed = True

    async def _flush(self, client: NbdClient) -> None:
        before = self._truth.acknowledged()
        try:
            await client.flush()
        except PermanentError:
            _doubt(before)
            return
        except TransientError:
            return
        self.counts.flushes += 1
        for change in before:
            change.flushed = True

    def _lose(self, issued: list[Change]) -> None:
        for change in issued:
            self._truth.lose(change)

    async def _settle(self) -> None:
        """Everything in flight has an end."""
        while self._waiting:
            await asyncio.wait(list(self._waiting))


def _doubt(changes: list[Change]) -> None:
    """A flush of these failed."""
    for change in changes:
        change.unsure = True
