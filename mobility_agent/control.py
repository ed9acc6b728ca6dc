"""The agent's conversation with the config server: what it reports, and what it is told to do.

A heartbeat is a long poll: it is answered when there is news, or when the next one is due. While somebody may be
waiting for progress (a mark that storage has not got yet, initial replication) the agent reports more often.

The config server may be away for as long as it likes. The sender goes on with the last assignment, which is kept on
disk; marks and gaps are reported when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from mobility_agent import groups
from mobility_agent.auditing import Auditor
from mobility_agent.gaps import Gaps
from mobility_agent.groups import Groups
from mobility_agent.ladder import Ladder
from mobility_agent.marks import Marks
from mobility_agent.metrics import Metrics
from mobility_agent.retry import Backoff
from mobility_agent.schedule import Schedule
from mobility_agent.sender import Sender, SenderState
from mobility_agent.state import StateDirectory
from replicar.clock import Clock
from replicar.control.client import ControlClient
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    MAX_WAIT_SECONDS,
    AgentHeartbeat,
    AgentInstructions,
    AuditReport,
    Command,
    DiskReport,
    MachineState,
)
from replicar.errors import LimitError, ReplicarError, TransientError
from replicar.formats.record import Consistency

DEFAULT_HEARTBEAT_SECONDS: Final = 5.0
#: How often to report while storage has not got a mark that somebody may be waiting for, and how long that may be.
MARK_SECONDS: Final = 0.5
MARK_WAIT_SECONDS: Final = 120.0
#: How often to report the progress of initial replication.
PROGRESS_SECONDS: Final = 2.0
#: Between two heartbeats, whatever the server answers.
LEAST_SECONDS: Final = 0.1
RENEWAL_SECONDS: Final = 3600.0
#: How long the agent takes to say goodbye.
FAREWELL_SECONDS: Final = 2.0

_log = logging.getLogger(__name__)


class Traced(Protocol):
    """What trace capture (`traced`) answers for."""

    @property
    def is_behind(self) -> bool: ...

    def summary(self) -> str: ...


class Control:
    """The control loop of one agent.

    Args:
        client: entered.
        heartbeat_seconds: how often to report when nothing happens; None leaves it to the config server.
        auditor: None if nothing is audited.
        traced: the machine's trace capture, if that is how it is captured.
        carry_out: does what is commanded, where that is not done while the heartbeat waits.
        groups_of: holds the machine for group points.
        schedules: of points by the clock, which the machine's policy may set.
    """

    def __init__(
        self,
        client: ControlClient,
        state: StateDirectory,
        ladder: Ladder,
        sender: Sender,
        marks: Marks,
        gaps: Gaps,
        metrics: Metrics,
        clock: Clock,
        *,
        heartbeat_seconds: float | None = None,
        auditor: Auditor | None = None,
        traced: Traced | None = None,
        carry_out: Callable[[Command], Awaitable[None]] | None = None,
        groups_of: Groups | None = None,
        schedules: Mapping[Consistency, Schedule] | None = None,
        randomness: random.Random | None = None,
    ) -> None:
        self.error: ReplicarError | None = None
        self._client = client
        self._state = state
        self._ladder = ladder
        self._sender = sender
        self._marks = marks
        self._gaps = gaps
        self._metrics = metrics
        self._clock = clock
        self._traced = traced
        self._carry_out = carry_out or marks.carry_out
        self._groups = groups_of
        self._schedules = schedules or {}
        self._set_seconds = heartbeat_seconds
        self._auditor = auditor
        self._told_seconds = DEFAULT_HEARTBEAT_SECONDS
        self._randomness = randomness or random.Random()
        self._backoff = Backoff(first_seconds=0.5, most_seconds=10.0, slow_first_seconds=2.0, slow_most_seconds=60.0)
        self._renewal_due = 0.0
        self._assigned = state.load_assignment()
        sender.assign(self._assigned)

    @property
    def machine_state(self) -> MachineState:
        """What the agent is doing, in the words the operator sees."""
        sender = self._sender.status.state
        if sender is SenderState.UNASSIGNED:
            return MachineState.STARTING
        if sender is not SenderState.STREAMING:
            return MachineState.DISCONNECTED
        if self._is_behind:
            return MachineState.INITIAL_REPLICATION if self._gaps.is_first else MachineState.RESYNCHRONISING
        return MachineState.PROTECTED

    @property
    def audit(self) -> AuditReport | None:
        """How far the audits are; None if there are none."""
        return self._auditor.report if self._auditor is not None else None

    @property
    def _is_behind(self) -> bool:
        """Whether the newest state can't be recovered yet; trace capture is in a gap always, but for its points."""
        return self._ladder.in_gap if self._traced is None else self._traced.is_behind

    async def run(self) -> None:
        """Report for ever; cancel to stop."""
        failures = 0
        first = True
        while True:
            begun = self._clock.monotonic()
            try:
                await self._renew()
                # The first one asks for no wait: what is known on disk may be old.
                instructions = await self._report(0.0 if first else self._interval())
                failures, first, self.error = 0, False, None
                await self._follow(instructions)
                urgent = self._groups is not None and self._groups.report is not None
                delay = 0.0 if urgent else begun + LEAST_SECONDS - self._clock.monotonic()
            except ReplicarError as error:
                failures += 1
                if self.error is None or self.error.message != error.message:
                    _log.warning("the control loop failed, replication goes on: %s", error)
                self.error = error
                delay = self._backoff.delay(failures, error, self._randomness)
            if delay > 0:
                await self._clock.sleep(delay)

    async def farewell(self) -> None:
        """Say that this agent stops; a config server that does not listen is not waited for."""
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._client.agent_heartbeat(self.heartbeat(0.0, state=MachineState.STOPPED))
        except (ReplicarError, TimeoutError) as error:
            _log.info("stopped without a word to the config server: %s", error)

    def heartbeat(self, wait_seconds: float, *, state: MachineState | None = None) -> AgentHeartbeat:
        """The report as things are."""
        log, sender, metrics = self._ladder.log, self._sender.status, self._metrics
        middle, high = metrics.rpo_percentiles()
        return AgentHeartbeat(
            time_ns=self._clock.now_ns(),
            state=str(state or self.machine_state),
            captured_sequence=log.next_sequence - 1,
            received_sequence=sender.received_sequence,
            stored_sequence=sender.stored_sequence,
            rpo_seconds=metrics.rpo_seconds,
            rpo_p50_seconds=middle,
            rpo_p99_seconds=high,
            bytes_captured=log.bytes_captured,
            bytes_sent=metrics.bytes_sent,
            unstored_bytes=log.used_bytes,
            disks=self._disks(),
            marks=self._marks.reports(),
            gaps=self._gaps.reports(),
            refusals=self._marks.refusals(),
            ordered_from=self._gaps.ordered_from,
            stored_until_ns=self._stored_until_ns(),
            errors=() if sender.error is None else (ErrorReport.of("sender", sender.error.as_dict()),),
            audit=self.audit,
            journal_full_seconds=metrics.journal.seconds_until(log.limit_bytes),
            copy_remaining_seconds=metrics.copying.seconds_until(0),
            capture=self._traced.summary()[:512] if self._traced is not None else "",
            hold=self._groups.report if self._groups is not None else None,
            wait_seconds=wait_seconds,
        )

    def _stored_until_ns(self) -> int | None:
        """The last instant of which is known that all changes up to it are stored; None while some are not captured.

        The log's clock is asked, which never goes back: what is captured from here on is not before its `now`.
        """
        log = self._ladder.log
        if self._ladder.in_gap:
            return None
        now_ns = log.now_ns()
        oldest_ns = now_ns if log.next_sequence <= log.stored_sequence + 1 else log.oldest_unstored_time_ns()
        return max(oldest_ns - 1, 0) if oldest_ns is not None else None

    def _disks(self) -> tuple[DiskReport, ...]:
        return tuple(
            DiskReport(
                index=disk.index,
                name=disk.name,
                size_bytes=disk.size_bytes,
                seed_total_bytes=disk.size_bytes,
                seed_done_bytes=disk.size_bytes - min(self._ladder.dirty_bytes_of(disk.index), disk.size_bytes),
            )
            for disk in self._ladder.disks.values()
        )

    def _interval(self) -> float:
        """How long the config server may hold its answer."""
        seconds = self._set_seconds if self._set_seconds is not None else self._told_seconds
        mark = self._marks.latest
        recent_ns = self._clock.now_ns() - int(MARK_WAIT_SECONDS * 1e9)
        if mark is not None and mark.sequence > self._ladder.log.stored_sequence and mark.time_ns > recent_ns:
            seconds = min(seconds, MARK_SECONDS)
        if self._is_behind:
            seconds = min(seconds, PROGRESS_SECONDS)
        return min(seconds, MAX_WAIT_SECONDS)

    async def _report(self, wait_seconds: float) -> AgentInstructions:
        heartbeat = self.heartbeat(wait_seconds)
        instructions = await self._client.agent_heartbeat(heartbeat)
        self._marks.acknowledged(heartbeat.marks, heartbeat.refusals)
        self._gaps.acknowledged(heartbeat.gaps)
        if self._groups is not None:
            self._groups.acknowledged(heartbeat.hold)
        return instructions

    async def _follow(self, instructions: AgentInstructions) -> None:
        """Do what the config server says.

        Raises:
            ReplicarError: something can't be done now; it will be said again.
        """
        self._told_seconds = max(instructions.heartbeat_seconds, LEAST_SECONDS)
        for consistency, every in (
            (Consistency.CRASH, instructions.schedule.crash_seconds),
            (Consistency.APPLICATION, instructions.schedule.application_seconds),
        ):
            if consistency in self._schedules:
                self._schedules[consistency].follow(every)
        if instructions.assignment != self._assigned:
            self._sender.assign(instructions.assignment)
            await asyncio.to_thread(self._state.save_assignment, instructions.assignment)
            self._assigned = instructions.assignment
        failed: ReplicarError | None = None
        if self._groups is not None:
            await self._groups.judge(instructions.verdicts)
        for command in instructions.commands:
            try:
                if command.kind == groups.COMMAND_KIND and self._groups is not None:
                    await self._groups.carry_out(command)
                else:
                    await self._carry_out(command)
            except LimitError as error:
                failed = error
            except OSError as error:  # the agent goes on serving its disks, which matters more
                failed = TransientError(
                    f"the change log can't be made durable for the mark {command.name!r}: {error.strerror or error}",
                    hint="look at the kernel's log for what is wrong with the disk under the agent's directory",
                )
        if failed is not None:
            raise failed

    async def _renew(self) -> None:
        """Have the certificate renewed in time; looked at once an hour."""
        now = self._clock.monotonic()
        if now < self._renewal_due:
            return
        renewed = await self._client.renew_if_due()
        self._renewal_due = now + RENEWAL_SECONDS
        if renewed is not None:
            _log.info("the certificate was renewed")
            self._sender.use_certificate(renewed)
