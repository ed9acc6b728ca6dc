"""A sender that runs on a real change log, and what a test asks of the two."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mobility_agent.changelog import ChangeLog
from mobility_agent.metrics import Metrics
from mobility_agent.retry import Backoff
from mobility_agent.sender import Sender, SenderState
from replicar.clock import SystemClock
from replicar.control.identity import Identity
from replicar.formats.frame import Kind

FILE_BYTES = 4 << 20
QUICK = Backoff(first_seconds=0.02, most_seconds=0.1, slow_first_seconds=0.05, slow_most_seconds=0.2)


def open_log(directory: Path, machine: Identity, *, files: int = 16) -> ChangeLog:
    return ChangeLog(
        directory,
        machine.id,
        first_sequence=machine.first_sequence,
        limit_bytes=files * FILE_BYTES,
        boot_id=b"boot".ljust(16),
        clock=SystemClock(),
        file_bytes=FILE_BYTES,
    )


def capture(log: ChangeLog, count: int = 1, size: int = 4096) -> int:
    """Put changes into the log; the sequence of the last."""
    for _ in range(count):
        assert log.append_copy(Kind.WRITE, 0, 0, size, os.urandom(size))
    return log.next_sequence - 1


class Sending:
    """A running sender and what it works on."""

    def __init__(self, log: ChangeLog, sender: Sender, metrics: Metrics) -> None:
        self.log, self.sender, self.metrics = log, sender, metrics

    async def until(self, held: Callable[[], Any], *, seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not held():
                await asyncio.sleep(0.005)

    async def state(self, state: SenderState) -> None:
        await self.until(lambda: self.sender.status.state is state)

    async def error(self, kind: type[Exception]) -> Any:
        await self.until(lambda: isinstance(self.sender.status.error, kind))
        return self.sender.status.error


@asynccontextmanager
async def sending(directory: Path, machine: Identity, **options: Any) -> AsyncIterator[Sending]:
    """A sender that runs on the log in `directory`."""
    log = open_log(directory, machine, files=options.pop("files", 16))
    metrics = Metrics()
    sender = Sender(
        log, machine, metrics, SystemClock(), **{"backoff": QUICK, "randomness": random.Random(5), **options}
    )
    task = asyncio.create_task(sender.run())
    try:
        yield Sending(log, sender, metrics)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            assert task.exception() is None
        log.abandon()


class Writer:
    """Owns the open frame, as a capture connection does."""

    parsed = 0

    def release(self, unparsed: bytes) -> None:
        assert not unparsed
