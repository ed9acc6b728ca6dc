"""The agent as a service: opens what there is in the right order, runs its parts as one group of tasks, closes it all.

    state directory, locked -> identity -> disks -> change log -> ladder -> NBD served
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
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from mobility_agent import preflight
from mobility_agent.auditing import Auditor
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.inline import InlineCapture
from mobility_agent.checkpoint import Checkpointer
from mobility_agent.control import Control, regions_path, touched_path
from mobility_agent.gaps import Gaps
from mobility_agent.ladder import Ladder
from mobility_agent.marks import Marks
from mobility_agent.metrics import SAMPLE_SECONDS, Metrics
from mobility_agent.records import Record, RecordedLog, held_records
from mobility_agent.regions import DirtyRegions
from mobility_agent.retry import first_of
from mobility_agent.schedule import Schedule
from mobility_agent.seeding import Seeder
from mobility_agent.sender import Sender, SenderState
from mobility_agent.settings import AgentSettings
from mobility_agent.state import StateDirectory, boot_id
from mobility_agent.touched import TouchedRegions
from replicar.clock import Clock, SystemClock
from replicar.control.client import ControlClient
from replicar.control.identity import Identity, Role
from replicar.errors import PermanentError

STATUS_SECONDS: Final = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Core:
    """The parts that hold the disks and the log; all of them open."""

    state: StateDirectory
    identity: Identity
    log: RecordedLog
    ladder: Ladder
    marks: Marks
    gaps: Gaps


class Service:
    """One machine's agent.

    Args:
        settings: checked by `run`, together with the machine.
        clock: the system's, unless a test has another.
    """

    def __init__(self, settings: AgentSettings, *, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock: Clock = clock or SystemClock()
        self._started_ns = self._clock.now_ns()
        self.metrics = Metrics()
        #: Set once the disks are served.
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Protect the machine until `stop` is set.

        Raises:
            ReplicarError: it can't begin, or its disks or change log failed.
        """
        with StateDirectory(self._settings.directory) as state:
            async with self._core(state) as core, ControlClient(core.identity, clock=self._clock) as client:
                await self._serve(core, client, stop)

    async def _serve(self, core: _Core, client: ControlClient, stop: asyncio.Event) -> None:
        settings, clock = self._settings, self._clock
        sender = Sender(
            core.log,
            core.identity,
            self.metrics,
            clock,
            seal_delay_seconds=settings.seal_delay_seconds,
            rate_limit_bytes_per_second=settings.rate_limit_bytes_per_second,
            software=f"replicar {metadata.version('replicar')}",
        )
        auditor = self._auditor(core)
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
        )
        seeder = Seeder(core.ladder, clock, bytes_per_second=settings.seed_bytes_per_second or 0)
        addresses = {disk.name: settings.address(disk).listen for disk in settings.disks}
        async with InlineCapture(core.ladder, addresses) as capture:
            for name, address in capture.addresses.items():
                _log.info("disk %s is served at %s", name, address)
            self.ready.set()
            await first_of(
                stop.wait(),
                sender.run(),
                seeder.run(),
                Checkpointer(core.ladder, clock).run(),
                control.run(),
                self._measure(core, sender),
                self._publish(core, sender, control, capture),
                *self._wanted(core, auditor),
            )
        _log.info("stopped: no more writes are taken")
        await core.log.sync()
        await self._save_status(core, sender, control, capture, running=False)
        await control.farewell()

    def _auditor(self, core: _Core) -> Auditor | None:
        rate = int(self._settings.audit_bytes_per_second)
        if not rate:
            return None
        return Auditor(core.ladder, self._clock, core.state.audit_file, bytes_per_second=rate)

    def _wanted(self, core: _Core, auditor: Auditor | None) -> Iterator[Coroutine[Any, Any, None]]:
        """The parts that the operator may switch off, as far as they are on."""
        if auditor is not None:
            yield auditor.run()
        every = self._settings.mark_every_seconds
        if every:
            yield Schedule(core.marks, core.ladder, self._clock, every_seconds=every).run()

    @asynccontextmanager
    async def _core(self, state: StateDirectory) -> AsyncIterator[_Core]:
        """Open disks and change log, and put the stream in order; close them with everything durable."""
        settings = self._settings
        identity = Identity.load(state.identity)
        if identity.role is not Role.MACHINE:
            raise PermanentError(
                f"the identity in {state.identity} is a {identity.role}'s",
                hint="enrol this machine: `mobility-agent enrol`",
            )
        preflight.check(settings, state.log)
        async with AsyncExitStack() as closing:
            disks = [closing.enter_context(Disk(0, disk.name, disk.path)) for disk in settings.disks]
            known = state.settle_disks(identity, {disk.name: disk.size_bytes for disk in disks})
            for disk, settled in zip(disks, known, strict=True):
                disk.index = settled.index
            log = RecordedLog(
                state.log,
                identity.id,
                first_sequence=identity.first_sequence,
                limit_bytes=int(settings.journal_bytes),
                boot_id=boot_id(),
                clock=self._clock,
                file_bytes=int(settings.journal_file_bytes),
            )
            closing.push_async_callback(_close, log, disks)
            state.log_begun(identity)
            regions: dict[int, DirtyRegions] = {}
            touched: dict[int, TouchedRegions] = {}
            for disk in disks:
                regions[disk.index] = DirtyRegions(regions_path(state, disk.index), disk.size_bytes)
                closing.callback(regions[disk.index].close)
                touched[disk.index] = TouchedRegions(touched_path(state, disk.index), disk.size_bytes)
                closing.callback(touched[disk.index].close)
            ladder = Ladder(log, disks, regions, touched)
            gaps = Gaps(state.path / "gaps.json")
            closing.push_async_callback(gaps.save)
            marks = Marks(log, state.marks_file, lambda: ladder.in_gap)
            _remember(log, gaps, marks)
            log.on_record = gaps.observe
            ladder.start()
            yield _Core(state, identity, log, ladder, marks, gaps)

    async def _measure(self, core: _Core, sender: Sender) -> None:
        while True:
            protected = sender.status.state is not SenderState.UNASSIGNED
            oldest_ns, now_ns = core.log.oldest_unstored_time_ns(), self._clock.now_ns()
            self.metrics.sample_rpo(oldest_ns, now_ns, protected=protected)
            await self._clock.sleep(SAMPLE_SECONDS)

    async def _publish(self, core: _Core, sender: Sender, control: Control, capture: InlineCapture) -> None:
        while True:
            try:
                await core.gaps.save()
            except PermanentError as error:  # a full disk; replication goes on, and the stream has the gaps anyway
                _log.warning("the gaps are not remembered now: %s", error)
            await self._save_status(core, sender, control, capture)
            await self._clock.sleep(STATUS_SECONDS)

    async def _save_status(
        self, core: _Core, sender: Sender, control: Control, capture: InlineCapture, *, running: bool = True
    ) -> None:
        status = self._status(core, sender, control, capture, running=running)
        try:
            await asyncio.to_thread(core.state.save_status, status)
        except OSError as error:
            _log.warning("the status can't be written: %s", error)  # a full disk; replication goes on

    def _status(
        self, core: _Core, sender: Sender, control: Control, capture: InlineCapture, *, running: bool
    ) -> dict[str, Any]:
        log, metrics = core.log, self.metrics
        rpo, lag = metrics.rpo_percentiles(), metrics.lag_percentiles()
        return {
            "machine": core.identity.name,
            "machine_id": str(core.identity.id),
            "process": os.getpid(),
            "time_ns": self._clock.now_ns(),
            "started_ns": self._started_ns,
            "state": str(control.machine_state) if running else "stopped",
            "rung": str(core.ladder.rung),
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
            "rpo_seconds": metrics.rpo_seconds,
            "rpo_p50_seconds": rpo[0],
            "rpo_p99_seconds": rpo[1],
            "lag_p50_seconds": lag[0],
            "lag_p99_seconds": lag[1],
            "marks": core.marks.count,
            "audit": audit.model_dump() if (audit := control.audit) is not None else None,
            "in_gap": core.ladder.in_gap,
            "disks": [
                {
                    "index": disk.index,
                    "name": disk.name,
                    "path": str(disk.path),
                    "size_bytes": disk.size_bytes,
                    "nbd": _text(capture.addresses.get(disk.name)),
                    "dirty_bytes": core.ladder.regions[disk.index].dirty_bytes,
                }
                for disk in core.ladder.disks.values()
            ],
        }


def _remember(log: RecordedLog, gaps: Gaps, marks: Marks) -> None:
    """Complete what is remembered of marks and gaps from the records that the log still holds."""
    beginnings = [gaps.covered_sequence + 1]
    if marks.search_from is not None:
        beginnings.append(marks.search_from)
    held: list[Record] = list(held_records(log, max(min(beginnings), log.first_sequence)))
    for found in held:
        gaps.observe(found)
    marks.recover(held, gaps.holds)


async def _close(log: RecordedLog, disks: Sequence[Disk]) -> None:
    """Close the log as one that ended in good order, which it did once the disks hold what it says they hold.

    Raises:
        PermanentError: a disk can't be made durable; should the machine restart now, it is compared in full.
    """
    for disk in disks:
        try:
            await asyncio.to_thread(disk.flush)
        except OSError as error:
            await log.sync()
            log.abandon()
            raise PermanentError(
                f"disk {disk.name} can't be made durable: {error.strerror}",
                hint="look at the kernel's log for what is wrong with it",
                disk=disk.name,
            ) from error
    await log.close()


def _text(address: Path | tuple[str, int] | None) -> str:
    if address is None:
        return ""
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"
