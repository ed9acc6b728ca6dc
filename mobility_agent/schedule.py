"""Crash-consistent marks by the clock, so that there is a named point to go back to without anybody having made one.

Marks are made at whole multiples of the interval since 1970, so machines with the same setting have them at the same
time. In the ordered stream every sequence is a crash-consistent state already; a mark only gives it a name, and costs
one record and one sync of the change log. Inside a gap there is no such state, and the mark is left out.

A mark that can't be made (the log is full, its disk fails) is left out too: the next one is never far.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Final

from mobility_agent.ladder import Ladder
from mobility_agent.marks import COMMAND_KIND, SCHEDULED, Marks
from replicar.clock import Clock
from replicar.control.messages import Command
from replicar.errors import ReplicarError

#: A wall clock may be set; it is looked at this often.
LOOK_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


class Schedule:
    """Makes the marks of one machine.

    Args:
        every_seconds: the interval, above 0.
    """

    def __init__(self, marks: Marks, ladder: Ladder, clock: Clock, *, every_seconds: int) -> None:
        self._marks = marks
        self._ladder = ladder
        self._clock = clock
        self._every_ns = every_seconds * 10**9

    async def run(self) -> None:
        """Make marks for ever; cancel to stop."""
        due_ns = self._after(self._clock.now_ns())
        while True:
            now_ns = self._clock.now_ns()
            due_ns = min(due_ns, self._after(now_ns))  # the clock may have been set back
            if now_ns < due_ns:
                await self._clock.sleep(min((due_ns - now_ns) / 1e9, LOOK_SECONDS))
                continue
            await self._mark(now_ns)
            due_ns = self._after(now_ns)

    def _after(self, time_ns: int) -> int:
        return (time_ns // self._every_ns + 1) * self._every_ns

    async def _mark(self, now_ns: int) -> None:
        name = f"auto-{datetime.fromtimestamp(now_ns // 10**9, UTC):%Y-%m-%dT%H:%M:%SZ}"
        if self._ladder.in_gap:
            _log.info("no mark %s: order is not known just now", name)
            return
        try:
            await self._marks.carry_out(Command(id=f"{SCHEDULED}{name}", kind=COMMAND_KIND, name=name))
        except (ReplicarError, OSError) as error:
            _log.warning("the mark %s is left out: %s", name, error)
