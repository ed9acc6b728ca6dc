"""Trace capture as a part of the agent's service: what serving over NBD and seeding are to a machine captured inline.

    disks opened, never written -> events by the best method there is -> copies all the time -> points for marks

A mark has to wait for its point: the disks converge, are frozen, read, thawed. That takes longer than a heartbeat may
be late, so commands are carried out beside the control loop, one after the other, which waits for an answer only as
long as it usually takes. A point that can't be had is refused at once, with the reason: whoever asked decides whether
to ask again. Nothing here makes points by itself; without marks there is nothing to recover.

The RPO of such a machine is the age of the first change that no *stored* point holds, whatever else is stored: what
lies between points can't be recovered.

Inline and trace don't mix on one machine, since a mark would then be of two moments. And going from trace to inline
compares the disks in full: trace capture keeps its coarse record in files of its own, and removes those of inline
capture, which know nothing of what happened since.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from mobility_agent.auditing import Auditor
from mobility_agent.capture.inline import Address
from mobility_agent.capture.trace.audits import PointAuditor
from mobility_agent.capture.trace.capture import Point, TraceCapture
from mobility_agent.capture.trace.choice import Choice, Method, choose, choose_method, open_source
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.commands import CommandQueue
from mobility_agent.gaps import Gaps
from mobility_agent.ladder import Ladder
from mobility_agent.marks import Marks
from mobility_agent.regions import DirtyRegions
from mobility_agent.retry import first_of
from mobility_agent.settings import AgentSettings, CaptureKind
from mobility_agent.state import StateDirectory, regions_path
from replicar.clock import Clock
from replicar.control.files import sync_directory
from replicar.control.messages import Command
from replicar.errors import PermanentError, TransientError

#: Points not stored yet whose age is remembered; of more, only the oldest ones'.
MAX_POINTS: Final = 1024
#: What the status calls the rung of a machine that is captured so.
RUNG: Final = "per-mark"

_METHODS: Final = {Method.BPF: "eBPF", Method.TRACEFS: "tracefs", Method.NONE: "none"}
_log = logging.getLogger(__name__)


def check(settings: AgentSettings, log_directory: Path) -> None:
    """See whether every disk can be traced on this machine; nothing to see where capture is inline.

    Raises:
        PermanentError: naming the first disk that can't, and why.
    """
    if settings.capture is not CaptureKind.TRACE:
        return
    for disk in settings.disks:
        found = choose(disk.path, log_directory=log_directory)
        if found.method is Method.NONE:
            raise PermanentError(
                f"disk {disk.name} can't be captured by trace: {found.reason}",
                hint='or serve this machine\'s disks over NBD: capture = "inline"',
                disk=disk.name,
                path=str(disk.path),
            )


def open_regions(state: StateDirectory, disk: TrackedDisk) -> DirtyRegions:
    """The coarse record of a disk's changes; what inline capture knew of the disk is no longer so."""
    inline = regions_path(state, disk.index)
    if inline.exists():
        inline.unlink()
        sync_directory(inline.parent)  # a power cut must not bring it back
    regions = DirtyRegions(inline.with_suffix(".traced"), disk.size_bytes)
    disk.follow(regions)
    return regions


class TracedMachine:
    """Follows a machine's disks while it is entered; `run` does the work.

    Args:
        ladder: of `TrackedDisk`s that follow their regions; `ladder.start()` was called.
        marks: make their points here from now on.
        audits: told at points, and run by the caller.
    """

    #: What the status calls the rung of a machine that is captured so.
    rung = RUNG
    #: Nothing is served; see `InlineCapture.addresses`.
    addresses: Mapping[str, Address] = {}
    capture: TraceCapture
    choice: Choice

    def __init__(
        self,
        ladder: Ladder,
        marks: Marks,
        gaps: Gaps,
        settings: AgentSettings,
        clock: Clock,
        audits: Auditor | None = None,
    ) -> None:
        self._ladder, self._marks, self._gaps, self._settings, self._clock = ladder, marks, gaps, settings, clock
        self._audits = audits
        self._disks = [disk for disk in ladder.disks.values() if isinstance(disk, TrackedDisk)]
        self._commands = CommandQueue(marks.carry_out)
        self._unstored: deque[tuple[int, int]] = deque(maxlen=MAX_POINTS)  # mark, and its first change's time
        self._point: Point | None = None
        self._points = 0
        self._refusal = ""

    async def __aenter__(self) -> TracedMachine:
        self.choice = await asyncio.to_thread(choose_method)
        source = open_source(self.choice.method, discard_ranges=any(disk.discard_ranges for disk in self._disks))
        self.capture = await TraceCapture(
            self._ladder,
            self._disks,
            source,
            self._clock,
            freeze_budget_seconds=self._settings.freeze_budget_seconds,
            bytes_per_second=self._settings.seed_bytes_per_second or 0,
            audits=self._audits if isinstance(self._audits, PointAuditor) else None,
        ).__aenter__()
        self._marks.at_point = self._make_point
        _log.info("%d disks are followed by %s: %s", len(self._disks), _METHODS[self.choice.method], self.choice.reason)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._marks.at_point = None
        await self.capture.aclose()

    async def run(self) -> None:
        """Follow, copy and make points for ever; cancel to stop, before the context is left."""
        await first_of(self.capture.run(), self._commands.run())

    @property
    def is_behind(self) -> bool:
        """Whether there is no point yet, or something that happened unseen is still to be copied."""
        return self._gaps.is_first or not self.capture.is_whole

    def oldest_unstored_time_ns(self) -> int | None:
        """When the first change happened that is in no stored point; None: there is none."""
        stored = self._ladder.log.stored_sequence
        while self._unstored and self._unstored[0][0] <= stored:
            self._unstored.popleft()
        return self._unstored[0][1] if self._unstored else self.capture.changed_since_ns

    async def carry_out(self, command: Command) -> None:
        """Have a command done; returns when it is, or after a while (see `commands`)."""
        await self._commands.carry_out(command)

    def facts(self) -> dict[str, Any]:
        """For the status."""
        capture, point = self.capture, self._point
        return {
            "kind": str(CaptureKind.TRACE),
            "method": str(self.choice.method),
            "reason": self.choice.reason,
            "is_whole": capture.is_whole,
            "dirty_bytes": capture.dirty_bytes,
            "copied_bytes": capture.copied_bytes,
            "equal_bytes": capture.equal_bytes,
            "compared_in_full": capture.doubts,
            "points": self._points,
            "freeze_budget_seconds": self._settings.freeze_budget_seconds,
            "last_freeze_seconds": point.freeze_seconds if point is not None else None,
            "last_freezes": point.tries if point is not None else None,
            "last_frozen_bytes": point.staged_bytes if point is not None else None,
            "longest_freeze_seconds": capture.freezes.percentiles(1.0)[0],
            "refused": self._refusal,
        }

    def summary(self) -> str:
        """For the heartbeat: what an operator wants to see from afar, in words."""
        words = [f"trace by {_METHODS[self.choice.method]}"]
        if self._point is not None:
            words.append(f"last freeze {self._point.freeze_seconds * 1000:.0f} ms")
        words.append(f"{self.capture.dirty_bytes} bytes dirty")
        if self._refusal:
            words.append(f"no point: {self._refusal}")
        return ", ".join(words)

    async def _make_point(self, append_mark: Callable[[], None]) -> None:
        """Bring the stream to a point and have the mark put there.

        Raises:
            TransientError: there is none to be had now.
        """
        log = self._ladder.log

        def append() -> int:
            append_mark()
            return log.next_sequence - 1

        try:
            if not self.capture.is_whole:
                raise TransientError(
                    f"no recovery point yet: {self.capture.dirty_bytes} bytes have to be copied first",
                    hint="ask again when the machine is protected, or has copied all: see `mobility-agent status`",
                )
            self._point = await self.capture.point(append)
        except TransientError as error:
            self._refusal = error.message
            raise
        self._refusal = ""
        self._points += 1
        since = self._point.changed_since_ns
        if since is not None and len(self._unstored) < MAX_POINTS:
            self._unstored.append((self._point.sequence, since))
