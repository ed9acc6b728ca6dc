"""Commands that may take longer than a heartbeat may be late: carried out beside the control loop, one after the other.

Whoever has a command carried out waits for it only for a while. One that is not done by then comes again, as every
command does until it is answered, and is found under way, or done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from replicar.control.messages import Command
from replicar.errors import ReplicarError

#: How long the control loop waits for a command; a point of a quiet machine takes a fraction of it.
ANSWER_SECONDS: Final = 2.0
#: Commands waiting here; the config server says the others again.
MAX_WAITING: Final = 16


@dataclass(frozen=True, slots=True)
class _Waiting:
    command: Command
    done: asyncio.Future[ReplicarError | OSError | None]  # the error, rather than raising one nobody may wait for


class CommandQueue:
    """Commands under way. `run` does the work.

    Args:
        carry_out: does one; see `Marks.carry_out`.
    """

    def __init__(self, carry_out: Callable[[Command], Awaitable[None]]) -> None:
        self._carry_out = carry_out
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(MAX_WAITING)
        self._waiting: dict[str, _Waiting] = {}

    async def carry_out(self, command: Command) -> None:
        """Have a command done; returns when it is, or after a while: it will be said again, and found done.

        Raises:
            ReplicarError, OSError: see `Marks.carry_out`.
        """
        waiting = self._waiting.get(command.id)
        if waiting is None:
            if self._queue.full():
                return
            waiting = self._waiting[command.id] = _Waiting(command, asyncio.get_running_loop().create_future())
            self._queue.put_nowait(waiting)
        await asyncio.wait({waiting.done}, timeout=ANSWER_SECONDS)
        error = waiting.done.result() if waiting.done.done() else None
        if error is not None:
            raise error

    async def run(self) -> None:
        """Carry out for ever; cancel to stop."""
        while True:
            waiting, failed = await self._queue.get(), None
            try:
                await self._carry_out(waiting.command)
            except (ReplicarError, OSError) as error:
                failed = error
            del self._waiting[waiting.command.id]
            waiting.done.set_result(failed)
