"""This machine's part of a group point: one point over several machines, as of one instant.

    hold      the config server asks; the mark is prepared, then the gate is closed
    held      said in a heartbeat at once; the config server waits until all machines have said so
    verdict   complete: the mark goes into the stream, the gate opens, `kept` is said
              abandoned, or none before the deadline: the gate opens, `lost` is said, and there is no mark

Why the points belong together. Say the group has the write w on machine B, and w was made because v on machine A had
been acknowledged; then it has v. For there is an instant T at which all machines were held: each was from before it
said `held` until it heard the verdict, which came after the last of them had. If v were missing, A had taken it after
it was let go, so after T, and w had come later still; but B took w before it was held, so before T.

A machine that lets its writers go by itself, because the verdict is late, says so and has no mark. The group is one
only if every machine kept it; else what some have are their own crash-consistent points, and the config server says
which machine was why.

Weak: writers wait for two round trips to the config server, and for the slowest machine's.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from mobility_agent.gate import Gate
from mobility_agent.marks import Marks
from replicar.clock import Clock
from replicar.control.messages import Command, GroupVerdict, HoldReport
from replicar.errors import LimitError, PermanentError, ReplicarError

COMMAND_KIND: Final = "hold"
#: Writers wait no longer than this, whatever is asked.
MAX_HOLD_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Hold:
    command: Command
    began: float
    deadline: asyncio.TimerHandle


class Groups:
    """Holds this machine for groups, one after the other.

    Args:
        gate: None where writers can't be held.
    """

    def __init__(self, marks: Marks, gate: Gate | None, clock: Clock) -> None:
        self._marks, self._gate, self._clock = marks, gate, clock
        self._hold: _Hold | None = None
        self._report: HoldReport | None = None

    @property
    def is_holding(self) -> bool:
        return self._hold is not None

    @property
    def report(self) -> HoldReport | None:
        """What the config server has to hear of the present hold, or of the last one until it has."""
        return self._report

    def acknowledged(self, report: HoldReport | None) -> None:
        """A heartbeat with this was answered."""
        if report is not None and report == self._report and report.state != "held":
            self._report = None

    async def carry_out(self, command: Command) -> None:
        """Hold this machine's writers for a group, unless that was done or can't be."""
        known = self._report.group if self._report is not None else None
        if known == command.id or self._hold is not None:
            return
        try:
            if self._gate is None:
                raise PermanentError(
                    "this machine's disks are followed, not served, so its writers can't be held for a group",
                    hint='leave it out of the group, or set capture = "inline"',
                )
            await self._marks.prepare(command)
        except ReplicarError as error:
            self._report = HoldReport(group=command.id, state="lost", reason=error.message[:512], hint=error.hint[:512])
            return
        seconds = min(command.hold_seconds, MAX_HOLD_SECONDS)
        deadline = asyncio.get_running_loop().call_later(seconds, self._expire)
        self._hold = _Hold(command, self._clock.monotonic(), deadline)
        self._gate.close()
        self._report = HoldReport(group=command.id, state="held")

    async def judge(self, verdicts: tuple[GroupVerdict, ...]) -> None:
        """Do what the config server decided about the present hold.

        Raises:
            LimitError, OSError: the mark can't be made; writers are let go.
        """
        hold = self._hold
        verdict = next((each for each in verdicts if hold is not None and each.group == hold.command.id), None)
        if hold is None or verdict is None:
            return
        if not verdict.complete:
            self._let_go(hold, HoldReport(group=hold.command.id, state="lost", reason="the group was abandoned"))
            return
        seconds = round(self._clock.monotonic() - hold.began, 4)
        try:
            made = self._marks.append_prepared(hold.command, pause_seconds=seconds)
        except LimitError as error:
            self._let_go(hold, HoldReport(group=hold.command.id, state="lost", reason=error.message[:512]))
            raise
        in_gap = made.in_gap
        report = HoldReport(
            group=hold.command.id,
            state="lost" if in_gap else "kept",
            sequence=made.sequence,
            reason="order is not captured on it just now (a gap)" if in_gap else "",
            held_seconds=seconds,
        )
        self._let_go(hold, report)
        await self._marks.settle(made)

    def close(self) -> None:
        """The agent ends: nobody is held by it any more."""
        if self._hold is not None:
            self._let_go(self._hold, HoldReport(group=self._hold.command.id, state="lost", reason="the agent stopped"))

    def _expire(self) -> None:
        if self._hold is not None:
            reason = f"no verdict came within {self._clock.monotonic() - self._hold.began:.1f} s, and writers waited"
            _log.warning("the group %r is left: %s", self._hold.command.name, reason)
            self._let_go(self._hold, HoldReport(group=self._hold.command.id, state="lost", reason=reason))

    def _let_go(self, hold: _Hold, report: HoldReport) -> None:
        assert self._gate is not None
        hold.deadline.cancel()
        self._hold, self._report = None, report
        self._gate.open()
        if report.sequence is None:
            self._marks.forget_prepared(hold.command)
