"""The core of an agent: what holds the disks and the change log, opened in the one right order and closed in reverse.

    disks -> change log -> maps of each disk -> ladder -> gaps, marks -> the stream says which disks there are

Everything that is per disk is named by the index that the stream knows it by. What is closed says durably how it was
left, and the change log last of all that it ended in good order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from mobility_agent import preflight, scanned, traced
from mobility_agent.allocation import asking
from mobility_agent.allocation.skipped import SkippedPages
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.digests import Digests
from mobility_agent.extents import DirtyExtents
from mobility_agent.gaps import Gaps
from mobility_agent.hooks import Hooks
from mobility_agent.ladder import Ladder
from mobility_agent.marks import Marks
from mobility_agent.records import Record, RecordedLog, held_records
from mobility_agent.regions import DirtyRegions
from mobility_agent.scanned import ScannedDisk
from mobility_agent.settings import AgentSettings, CaptureKind
from mobility_agent.state import (
    StateDirectory,
    boot_id,
    digests_path,
    extents_path,
    regions_path,
    skipped_path,
    touched_path,
)
from mobility_agent.touched import TouchedRegions
from replicar.clock import Clock
from replicar.control.identity import Identity, Role
from replicar.errors import PermanentError
from replicar.formats import record

#: How disks are opened.
_DISKS: Final[dict[CaptureKind, type[Disk]]] = {
    CaptureKind.INLINE: Disk,
    CaptureKind.TRACE: TrackedDisk,
    CaptureKind.SCAN: ScannedDisk,
}


@dataclass(frozen=True, slots=True)
class Core:
    """The parts that hold the disks and the log; all of them open."""

    state: StateDirectory
    identity: Identity
    log: RecordedLog
    ladder: Ladder
    marks: Marks
    gaps: Gaps


class Closable(Protocol):
    """A map of a disk, or the machine's row of extents."""

    def close(self) -> None: ...


@asynccontextmanager
async def open_core(settings: AgentSettings, state: StateDirectory, clock: Clock) -> AsyncIterator[Core]:
    """Open disks and change log, and put the stream in order; close them with everything durable.

    Raises:
        ReplicarError: naming what can't be opened, or is not as it has to be.
    """
    identity = Identity.load(state.identity)
    if identity.role is not Role.MACHINE:
        raise PermanentError(
            f"the identity in {state.identity} is a {identity.role}'s",
            hint="enrol this machine: `mobility-agent enrol`",
        )
    preflight.check(settings, state.log)
    traced.check(settings, state.log)
    async with AsyncExitStack() as closing:
        kind = _DISKS[settings.capture]
        disks = [closing.enter_context(kind(0, disk.name, disk.path)) for disk in settings.disks]
        settled = state.settle_disks(identity, {disk.name: disk.size_bytes for disk in disks})
        for disk, known in zip(disks, settled.present, strict=True):
            disk.index = known.index
        log = RecordedLog(
            state.log,
            identity.id,
            first_sequence=identity.first_sequence,
            limit_bytes=int(settings.journal_bytes),
            boot_id=boot_id(),
            clock=clock,
            file_bytes=int(settings.journal_file_bytes),
        )
        records, failed = list[TouchedRegions](), list[OSError]()
        closing.push_async_callback(_close, log, disks, records, failed)
        state.log_begun(identity)
        regions: dict[int, DirtyRegions] = {}
        touched: dict[int, TouchedRegions] = {}
        digests: dict[int, Digests] = {}
        skipped: dict[int, SkippedPages] = {}
        for disk in disks:
            if isinstance(disk, TrackedDisk):
                regions[disk.index] = traced.open_regions(state, disk)
            elif isinstance(disk, ScannedDisk):
                regions[disk.index] = scanned.open_regions(state, disk)
            else:
                regions[disk.index] = DirtyRegions(regions_path(state, disk.index), disk.size_bytes)
            closing.callback(_close_map, regions[disk.index], failed)
            touched[disk.index] = TouchedRegions(touched_path(state, disk.index), disk.size_bytes)
            records.append(touched[disk.index])
            digests[disk.index] = Digests(digests_path(state, disk.index), disk.size_bytes)
            closing.callback(_close_map, digests[disk.index], failed)
            place, copy_all = skipped_path(state, disk.index), settings.copy_free_space
            if (found := asking.open_map(place, regions[disk.index], copy_free_space=copy_all)) is not None:
                skipped[disk.index] = found
                closing.callback(_close_map, found, failed)
        extents = None
        if settings.capture is CaptureKind.INLINE:
            extents = DirtyExtents(extents_path(state))
            closing.callback(_close_map, extents, failed)
        ladder = Ladder(log, disks, regions, touched, digests, extents, skipped)
        gaps = Gaps(state.path / "gaps.json")
        closing.push_async_callback(gaps.save)
        hooks = _hooks(settings, state)
        if hooks is not None:
            await hooks.recover()
        marks = Marks(log, state.marks_file, lambda: ladder.in_gap, hooks=hooks)
        _remember(log, gaps, marks)
        log.on_record = gaps.observe
        ladder.start()
        if settled.gone:
            said = ladder.remove([record.Disk(disk.index, disk.name, disk.size_bytes) for disk in settled.gone])
            await log.sync()
            if said:  # else the next start says it
                state.disks_gone(settled.gone)
        asking.settle(ladder, disks, copy_free_space=settings.copy_free_space)
        yield Core(state, identity, log, ladder, marks, gaps)


def _hooks(settings: AgentSettings, state: StateDirectory) -> Hooks | None:
    application = settings.application
    if application is None:
        return None
    hooks = Hooks(application.hooks, state.hooks, timeout_seconds=application.hook_timeout_seconds)
    hooks.programs()  # what is wrong with them is said now, not at the first point
    return hooks


def _remember(log: RecordedLog, gaps: Gaps, marks: Marks) -> None:
    """Complete what is remembered of marks and gaps from the records that the log still holds."""
    beginnings = [gaps.covered_sequence + 1]
    if marks.search_from is not None:
        beginnings.append(marks.search_from)
    held: list[Record] = list(held_records(log, max(min(beginnings), log.first_sequence)))
    for found in held:
        gaps.observe(found)
    marks.recover(held, gaps.holds)


def _close_map(each: Closable, failed: list[OSError]) -> None:
    try:
        each.close()
    except OSError as error:
        failed.append(error)


async def _close(
    log: RecordedLog, disks: Sequence[Disk], records: Sequence[TouchedRegions], failed: list[OSError]
) -> None:
    """Close the log as one that ended in good order, which it did once maps and disks hold what it says they hold.

    Args:
        records: where it is noted that a disk could not be flushed; closed behind that.
        failed: why maps could not be made durable.

    Raises:
        PermanentError: a map or a disk can't be made durable; should the machine restart now, it is compared in full.
    """
    what = "what is known of the disks can't be made durable"
    for disk in disks:
        try:
            await asyncio.to_thread(disk.flush)
        except OSError as error:
            failed.append(error)
            what = f"disk {disk.name} can't be made durable"
    for touched in records:
        _close_map(touched, failed)
    if not failed:
        await log.close()
        return
    try:
        await log.sync()
    finally:
        log.abandon()
    raise PermanentError(
        f"{what}: {failed[-1].strerror}",
        hint="look at the kernel's log for what is wrong there; what was not durable is compared when the agent starts",
    ) from failed[-1]
