"""The agent as a service: opens what there is in the right order, runs its parts as one group of tasks, closes it all.

    state directory, locked -> identity -> disks, change log, ladder (`core`)
        -> NBD served, or disks followed (`traced`), or read in passes (`scanned`)
        -> sender, seeder, auditor, schedule, control

Nothing is served before the change log is open, and nothing is closed before serving has ended. On a stop signal: no
more NBD requests are taken, the parts are cancelled, the disks and the log are made durable, in this order. What was
not sent yet stays in the log, and goes out after the next start.

If one part fails in a way that is no ReplicarError, it is a programmer's mistake: the group ends, the process with it.
A ReplicarError of the change log or the disks ends the agent too, with a message; those of sender and config server
never get here, since they are tried again for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypeAlias

from mobility_agent.auditing import Auditor
from mobility_agent.capture.inline import InlineCapture
from mobility_agent.capture.scan.audits import PassAuditor
from mobility_agent.capture.trace.audits import PointAuditor
from mobility_agent.checkpoint import Checkpointer
from mobility_agent.commands import CommandQueue
from mobility_agent.control import Control
from mobility_agent.core import Core, open_core
from mobility_agent.exposed import page
from mobility_agent.groups import Groups
from mobility_agent.metrics import SAMPLE_SECONDS, Metrics
from mobility_agent.records import RecordedLog
from mobility_agent.retry import first_of
from mobility_agent.scanned import ScannedMachine
from mobility_agent.schedule import Schedule
from mobility_agent.seeding import Seeder
from mobility_agent.sender import Sender, SenderState
from mobility_agent.settings import AgentSettings, CaptureKind
from mobility_agent.state import (
    StateDirectory,
)
from mobility_agent.traced import TracedMachine
from replicar.clock import Clock, SystemClock
from replicar.control.client import ControlClient
from replicar.errors import PermanentError
from replicar.formats.record import Consistency
from replicar.nbd.tls import server_context
from replicar.observe import logs
from replicar.observe.endpoint import Endpoint
from replicar.observe.exposition import Page

STATUS_SECONDS: Final = 1.0
Capture: TypeAlias = InlineCapture | TracedMachine
#: What follows the disks where they are not served.
_FOLLOWERS: Final = {CaptureKind.TRACE: TracedMachine, CaptureKind.SCAN: ScannedMachine}
_AUDITORS: Final = {CaptureKind.INLINE: Auditor, CaptureKind.TRACE: PointAuditor, CaptureKind.SCAN: PassAuditor}

_log = logging.getLogger(__name__)


class Service:
    """One machine's agent.

    Args:
        settings: checked by `run`, together with the machine.
        clock: the system's, unless a test has another; so with `randomness`, which spreads what is tried again.
    """

    def __init__(
        self, settings: AgentSettings, *, clock: Clock | None = None, randomness: random.Random | None = None
    ) -> None:
        self._settings = settings
        self._clock: Clock = clock or SystemClock()
        self._randomness = randomness
        self._started_ns = self._clock.now_ns()
        self.metrics = Metrics()
        self._seeder: Seeder | None = None
        #: Set once the disks are served.
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Protect the machine until `stop` is set.

        Raises:
            ReplicarError: it can't begin, or its disks or change log failed.
        """
        try:
            with StateDirectory(self._settings.directory) as state:
                async with (
                    open_core(self._settings, state, self._clock) as core,
                    ControlClient(core.identity, clock=self._clock) as client,
                ):
                    await self._serve(core, client, stop)
        except OSError as error:
            raise PermanentError(
                f"the agent can't go on without its files: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}",
                hint="look at the space and the health of the disk under its directory, and at the kernel's log",
                path=str(error.filename or self._settings.directory),
            ) from error

    async def _serve(self, core: Core, client: ControlClient, stop: asyncio.Event) -> None:
        settings, clock = self._settings, self._clock
        logs.always(machine=core.identity.name, machine_id=str(core.identity.id))
        sender = Sender(
            core.log,
            core.identity,
            self.metrics,
            clock,
            seal_delay_seconds=settings.seal_delay_seconds,
            rate_limit_bytes_per_second=settings.rate_limit_bytes_per_second,
            randomness=self._randomness,
            software=_software(),
        )
        auditor = self._auditor(core)
        follower = None
        if (kind := _FOLLOWERS.get(settings.capture)) is not None:
            follower = kind(core.ladder, core.marks, core.gaps, settings, clock, auditor)
        commands = CommandQueue(core.marks.carry_out)  # hooks may take their time
        groups = Groups(core.marks, None if follower is not None else core.ladder.gate, clock)
        schedules = self._schedules(core, follower, follower or commands)
        control = Control(
            client,
            core.state,
            core.ladder,
            sender,
            core.marks,
            core.gaps,
            self.metrics,
            clock,
            heartbeat_seconds=settings.heartbeat_seconds,
            auditor=auditor,
            traced=follower,
            carry_out=(follower or commands).carry_out,
            groups_of=groups,
            schedules=schedules,
            randomness=self._randomness,
        )
        seeder = self._seeder = Seeder(core.ladder, clock, bytes_per_second=settings.seed_bytes_per_second or 0)
        async with follower or self._inline(core) as capture:
            for name, address in [*capture.addresses.items(), *settings.files.items()]:
                _log.info("disk %s is served at %s", name, address, extra=logs.fields(disk=name))

            async def collect() -> Page:
                return page(self._status(core, sender, control, capture, running=True))

            async with Endpoint(settings.metrics_listen, collect):
                self.ready.set()
                await first_of(
                    stop.wait(),
                    sender.run(),
                    (follower or seeder).run(),
                    Checkpointer(core.ladder, clock).run(),
                    control.run(),
                    commands.run(),
                    self._measure(follower or core.log, sender),
                    self._publish(core, sender, control, capture),
                    *(schedule.run() for schedule in schedules.values()),
                    *((auditor.run(),) if auditor is not None else ()),
                )
        groups.close()
        _log.info("stopped: no more writes are taken")
        await core.log.sync()
        await self._save_status(core, sender, control, capture, running=False)
        await control.farewell()

    def _inline(self, core: Core) -> InlineCapture:
        addresses = {name: address.listen for name, address in self._settings.addresses.items()}
        return InlineCapture(
            core.ladder, addresses, files=self._settings.files, keepers=core.state.keepers, tls=self._nbd_tls()
        )

    def _nbd_tls(self) -> ssl.SSLContext | None:
        files = self._settings.nbd_tls
        return None if files is None else server_context(files.certificate, files.key, files.authority)

    def _auditor(self, core: Core) -> Auditor | None:
        rate = int(self._settings.audit_bytes_per_second)
        if not rate:
            return None
        kind = _AUDITORS[self._settings.capture]
        return kind(core.ladder, self._clock, core.state.audit_file, bytes_per_second=rate)

    def _schedules(
        self, core: Core, follower: TracedMachine | None, commands: TracedMachine | CommandQueue
    ) -> dict[Consistency, Schedule]:
        """Points by the clock: application-consistent ones only where there are hooks."""
        every = {Consistency.CRASH: self._settings.mark_every_seconds}
        if self._settings.application is not None:
            every[Consistency.APPLICATION] = self._settings.application.mark_every_seconds
        return {
            # Trace capture is in a gap always, and says itself when it can't make a point.
            consistency: Schedule(
                commands.carry_out,
                lambda: follower is None and core.ladder.in_gap,
                self._clock,
                every_seconds=seconds,
                consistency=consistency,
            )
            for consistency, seconds in every.items()
        }

    async def _measure(self, captured: RecordedLog | TracedMachine, sender: Sender) -> None:
        while True:
            protected = sender.status.state is not SenderState.UNASSIGNED
            oldest_ns, now_ns = captured.oldest_unstored_time_ns(), self._clock.now_ns()
            self.metrics.sample_rpo(oldest_ns, now_ns, protected=protected)
            await self._clock.sleep(SAMPLE_SECONDS)

    async def _publish(self, core: Core, sender: Sender, control: Control, capture: Capture) -> None:
        while True:
            try:
                await core.gaps.save()
            except PermanentError as error:  # a full disk; replication goes on, and the stream has the gaps anyway
                _log.warning("the gaps are not remembered now: %s", error)
            now = self._clock.monotonic()
            self.metrics.journal.sample(now, core.log.used_bytes)
            self.metrics.copying.sample(now, core.ladder.dirty_bytes)
            await self._save_status(core, sender, control, capture)
            await self._clock.sleep(STATUS_SECONDS)

    async def _save_status(
        self, core: Core, sender: Sender, control: Control, capture: Capture, *, running: bool = True
    ) -> None:
        status = self._status(core, sender, control, capture, running=running)
        try:
            await asyncio.to_thread(core.state.save_status, status)
        except OSError as error:
            _log.warning("the status can't be written: %s", error)  # a full disk; replication goes on

    def _status(
        self, core: Core, sender: Sender, control: Control, capture: Capture, *, running: bool
    ) -> dict[str, Any]:
        log, metrics, seeder = core.log, self.metrics, self._seeder
        rpo, lag = metrics.rpo_percentiles(), metrics.lag_percentiles()
        return {
            "machine": core.identity.name,
            "machine_id": str(core.identity.id),
            "process": os.getpid(),
            "time_ns": self._clock.now_ns(),
            "started_ns": self._started_ns,
            "state": str(control.machine_state) if running else "stopped",
            "rung": capture.rung if isinstance(capture, TracedMachine) else str(core.ladder.rung),
            "capture": capture.facts() if isinstance(capture, TracedMachine) else {"kind": str(CaptureKind.INLINE)},
            "sender": sender.status.as_dict(),
            "config_server": {
                "address": core.identity.config_server,
                "error": control.error.as_dict() if control.error is not None else None,
            },
            "captured_sequence": log.next_sequence - 1,
            "stored_sequence": log.stored_sequence,
            "bytes_captured": log.bytes_captured,
            "bytes_sent": metrics.bytes_sent,
            "connections": metrics.connections,
            "resends": metrics.resends,
            "journal_used_bytes": log.used_bytes,
            "journal_limit_bytes": log.limit_bytes,
            "journal_full_seconds": metrics.journal.seconds_until(log.limit_bytes),
            "copy_remaining_seconds": metrics.copying.seconds_until(0),
            "rpo_seconds": metrics.rpo_seconds,
            "rpo_p50_seconds": rpo[0],
            "rpo_p99_seconds": rpo[1],
            "lag_p50_seconds": lag[0],
            "lag_p99_seconds": lag[1],
            "marks": core.marks.count,
            "application": core.marks.application_facts(),
            "audit": audit.model_dump() if (audit := control.audit) is not None else None,
            "in_gap": core.ladder.in_gap,
            "gaps_begun": core.gaps.begun,
            "dirty_bytes": core.ladder.dirty_bytes,
            "resync_read_bytes": seeder.copied_bytes + seeder.equal_bytes if seeder is not None else 0,
            "resync_sent_bytes": seeder.copied_bytes if seeder is not None else 0,
            "disks": [
                {
                    "index": disk.index,
                    "name": disk.name,
                    "path": str(disk.path),
                    "size_bytes": disk.size_bytes,
                    "grown_bytes": disk.grown_bytes(),
                    "nbd": _text(capture.addresses.get(disk.name)),
                    "file": str(self._settings.files.get(disk.name, "")),
                    "dirty_bytes": core.ladder.dirty_bytes_of(disk.index),
                    "left_out_bytes": core.ladder.left_out_bytes_of(disk.index),
                }
                for disk in core.ladder.disks.values()
            ],
        }


def _text(address: Path | tuple[str, int] | None) -> str:
    if address is None:
        return ""
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"


@lru_cache(maxsize=1)
def _software() -> str:
    """What this agent calls itself."""
    return f"replicar {metadata.version('replicar')}"
