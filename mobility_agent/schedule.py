"""Crash-consistent marks by the clock, so that there is a named point to go back to without anybody having made one.

Marks are made at whole multiples of the interval since 1970, so machines with the same setting have them at the same
time. In the ordered stream every sequence is a crash-consistent state already; a mark only gives it a name, and costs
one record and one sync of the change log; trace capture freezes the file systems for it. While the newest state can't
be had (inside a gap, or before trace capture has copied everything once) the mark is left out.

The interval is that of the machine's policy where it says one, else that of the agent's settings. Whoever follows a
policy has it once the config server said so; before, and while that is away after a start, the settings count.

A mark that can't be made (the log is full, its disk fails) is left out too: the next one is never far.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

from mobility_agent.marks import COMMAND_KIND, SCHEDULED
from replicar.clock import Clock
from replicar.control.messages import Command
from replicar.errors import ReplicarError
from replicar.formats.record import Consistency

#: A wall clock may be set; it is looked at this often.
LOOK_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


class Schedule:
    """Makes the marks of one machine.

    Args:
        carry_out: makes a mark, as an operator's command has it made.
        is_behind: whether the newest state can't be recovered just now.
        every_seconds: the interval that the agent's own settings say; 0: none.
        consistency: of the marks; application-consistent ones are named "application-..." instead of "auto-...".
    """

    def __init__(
        self,
        carry_out: Callable[[Command], Awaitable[None]],
        is_behind: Callable[[], bool],
        clock: Clock,
        *,
        every_seconds: int,
        consistency: Consistency = Consistency.CRASH,
    ) -> None:
        self._carry_out = carry_out
        self._is_behind = is_behind
        self._clock = clock
        self._own_ns = self._every_ns = every_seconds * 10**9
        self._consistency = consistency
        self._prefix = "auto" if consistency is Consistency.CRASH else str(consistency)

    def follow(self, every_seconds: int | None) -> None:
        """Go by another interval from here on: that of the machine's policy; 0: none, None: the agent's own."""
        self._every_ns = self._own_ns if every_seconds is None else every_seconds * 10**9

    async def run(self) -> None:
        """Make marks for ever; cancel to stop."""
        due_ns = 0
        while True:
            if not self._every_ns:
                due_ns = 0
                await self._clock.sleep(LOOK_SECONDS)
                continue
            now_ns = self._clock.now_ns()
            due_ns = due_ns or self._after(now_ns)
            due_ns = min(due_ns, self._after(now_ns))  # the clock may have been set back
            if now_ns < due_ns:
                await self._clock.sleep(min((due_ns - now_ns) / 1e9, LOOK_SECONDS))
                continue
            await self._mark(now_ns)
            due_ns = self._after(now_ns)

    def _after(self, time_ns: int) -> int:
        return (time_ns // self._every_ns + 1) * self._every_ns

    async def _mark(self, now_ns: int) -> None:
        name = f"{self._prefix}-{datetime.fromtimestamp(now_ns // 10**9, UTC):%Y-%m-%dT%H:%M:%SZ}"
        if self._is_behind():
            _log.info("no mark %s: the newest state can't be had just now", name)
            return
        try:
            await self._carry_out(
                Command(id=f"{SCHEDULED}{name}", kind=COMMAND_KIND, name=name, consistency=self._consistency)
            )
        except (ReplicarError, OSError) as error:
            _log.warning("the mark %s is left out: %s", name, error)
