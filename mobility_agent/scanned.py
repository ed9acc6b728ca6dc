"""Scan capture as a part of the agent's service: passes at an interval, and points where two passes agree.

    pass -> what differs from the replica's digests goes into the log, as background copies -> wait -> pass ...
    mark: pass, pass; if the second found nothing (see `capture.scan.passes`): GAP_END, MARK, GAP

For disks that can only be read: no serving, no kernel events, no freezing. Order is per point, as with trace capture,
and commands are carried out as there. Both passes of a point begin after it was asked for, so that what was written
before is in it. The digests survive the agent, so after a restart a pass reads everything and sends what changed.

The RPO is the age of the first change that may not be in a stored point. What happened since the newest pass began is
not known, so it is never less than that.

Weak: every pass reads all of every disk, so the interval is what the disks can bear.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from mobility_agent.auditing import Auditor
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.scan.audits import PassAuditor
from mobility_agent.capture.scan.passes import Pass, Passes
from mobility_agent.capture.scan.volume import FileVolume
from mobility_agent.capture.trace.capture import Point
from mobility_agent.digests import CHUNK_BYTES, Digests, Rows
from mobility_agent.gaps import Gaps
from mobility_agent.ladder import Ladder
from mobility_agent.marks import Marks
from mobility_agent.regions import DirtyRegions
from mobility_agent.settings import AgentSettings, CaptureKind
from mobility_agent.state import StateDirectory, regions_path
from mobility_agent.traced import TracedMachine
from replicar.clock import Clock
from replicar.control.files import sync_directory
from replicar.errors import TransientError
from replicar.formats.frame import Kind

#: Passes that a point may take after its first one.
MAX_TRIES: Final = 4
#: Copies wait while the log holds more than this share of its limit.
_BUSY_SHARE: Final = 0.5
#: How often to look whether there is room.
_ROOM_SECONDS: Final = 0.1
#: How long after a read that failed the next pass begins, at least.
FAILED_SECONDS: Final = 5.0
GAP_REASON: Final = "scan capture orders per point"

_log = logging.getLogger(__name__)


class ScannedDisk(Disk):
    """A disk that is only read."""

    is_served = False

    def __init__(self, index: int, name: str, path: Path) -> None:
        super().__init__(index, name, path, flags=os.O_RDONLY)


def open_regions(state: StateDirectory, disk: Disk) -> DirtyRegions:
    """The record of which regions no pass has been over; what inline capture knew of the disk is no longer so."""
    inline = regions_path(state, disk.index)
    if inline.exists():
        inline.unlink()
        sync_directory(inline.parent)  # a power cut must not bring it back
    return DirtyRegions(inline.with_suffix(".scanned"), disk.size_bytes)


class DiskReplica:
    """What the stream says of one disk, by the digests; see `passes.Replica`."""

    def __init__(self, ladder: Ladder, disk: Disk, clock: Clock, audits: PassAuditor | None = None) -> None:
        self._ladder, self._disk, self._clock, self._audits = ladder, disk, clock, audits

    async def take(self, offset: int, content: memoryview) -> int:
        """Send what differs; returns when it is in the log."""
        index, log = self._disk.index, self._ladder.log
        digests, touched = self._ladder.digests[index], self._ladder.touched[index]
        rows = await asyncio.to_thread(self._rows, digests, offset, content)
        first, _ = digests.whole(offset, len(content))
        changed = 0
        log.seal()
        for start, length in list(digests.differing(offset, len(content), rows)):
            part = content[start - offset : start - offset + length]
            zeros = not any(part[:512]) and bytes(part) == bytes(length)
            kind, payload = (Kind.ZERO, b"") if zeros else (Kind.WRITE, part)
            while True:
                while log.used_bytes > log.limit_bytes * _BUSY_SHARE:
                    await self._clock.sleep(_ROOM_SECONDS)
                if not touched.covers(start, length):
                    await touched.record(start, length)
                elif log.append_copy(kind, index, start, length, payload):
                    break
                else:
                    await self._clock.sleep(_ROOM_SECONDS)
            begin, end = digests.whole(start, length)
            digests.put(begin * CHUNK_BYTES, rows[begin - first : end - first])
            changed += length
        self._ladder.regions[index].clear(offset, len(content))
        return changed

    def _rows(self, digests: Digests, offset: int, content: memoryview) -> Rows:
        if self._audits is not None:
            self._audits.saw(self._disk.index, offset, content)
        return digests.rows(offset, content)


class ScanCapture:
    """Scans disks while it is entered; `run` makes passes in the background, `point` makes points.

    Args:
        ladder: of these disks; `ladder.start()` was called.
        every_seconds: from one pass's begin to the next.
        audits: told at points; run by the caller.
    """

    def __init__(
        self,
        ladder: Ladder,
        clock: Clock,
        *,
        every_seconds: float,
        bytes_per_second: int = 0,
        audits: PassAuditor | None = None,
    ) -> None:
        self._ladder, self._clock, self._every, self._audits = ladder, clock, every_seconds, audits
        self._rate = bytes_per_second
        self._volumes: list[FileVolume] = []
        self._scanning = asyncio.Lock()
        self._passes: Passes
        self._changed_since_ns: int | None = None  # a change since then was seen, and is in no point
        self.last: Pass | None = None
        self.passes = self.copied_bytes = 0
        self.error = ""

    async def __aenter__(self) -> ScanCapture:
        pairs = []
        try:
            for disk in self._ladder.disks.values():
                self._volumes.append(FileVolume(disk.path, disk.size_bytes))
                pairs.append((self._volumes[-1], DiskReplica(self._ladder, disk, self._clock, self._audits)))
                self._ladder.regions[disk.index].mark_all()  # nobody knows what happened before
        except BaseException:
            await self.aclose()
            raise
        self._passes = Passes(pairs, self._clock, bytes_per_second=self._rate)
        if not self._ladder.in_gap:
            self._ladder.open_gap(GAP_REASON)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Read the disks no longer."""
        while self._volumes:
            self._volumes.pop().close()

    @property
    def is_whole(self) -> bool:
        """Whether a whole pass was made."""
        return self.last is not None and self._ladder.is_clean

    @property
    def dirty_bytes(self) -> int:
        """What no pass has been over."""
        return self._ladder.dirty_bytes

    @property
    def changed_since_ns(self) -> int | None:
        """Since when there may be changes that no point holds."""
        if self._changed_since_ns is not None:
            return self._changed_since_ns
        return self.last.began_ns if self.last is not None else None

    async def run(self) -> None:
        """Make passes for ever; cancel to stop."""
        while True:
            began, least = self._clock.monotonic(), 0.0
            try:
                async with self._scanning:
                    await self._pass()
            except OSError as error:
                least = FAILED_SECONDS
                _log.warning("a disk can't be scanned: %s", self.error or error)
            await self._clock.sleep(max(began + self._every - self._clock.monotonic(), least))

    async def point(self, append_mark: Callable[[], int]) -> Point:
        """Bring the stream to a state that all disks had at one moment from now on, and put a mark there.

        Raises:
            TransientError: the disks were not left alone, or can't be read.
            LimitError: of `append_mark`.
        """
        async with self._scanning:
            try:
                found = await self._pass()
                for tries in range(1, MAX_TRIES + 1):
                    since = self._changed_since_ns
                    found = await self._pass()
                    if not found.changed_bytes:
                        return self._log_point(append_mark, tries, since)
            except OSError:
                raise TransientError(
                    f"no recovery point: a disk can't be read ({self.error})", hint="look at the kernel's log"
                ) from None
        raise TransientError(
            f"no recovery point: each of {MAX_TRIES} passes found changes since the one before it"
            f" ({found.changed_bytes} bytes by the last)",
            hint="hold still what writes while the point is made, scan a snapshot, or capture by trace",
            changed_bytes=found.changed_bytes,
        )

    def _log_point(self, append_mark: Callable[[], int], tries: int, since: int | None) -> Point:
        if not self._ladder.close_gap():
            raise TransientError("no recovery point: not all is copied", hint="ask again after the next pass")
        try:
            if self._audits is not None:
                self._audits.tell()
            sequence = append_mark()
        finally:
            self._ladder.open_gap(GAP_REASON)
        self._changed_since_ns = None
        return Point(sequence, 0.0, since, tries, 0)

    async def _pass(self) -> Pass:
        """A pass; a change that it finds happened after the pass before began."""
        before = self.last
        if self._audits is not None:
            self._audits.begin()
        try:
            found = await self._passes.run()
        except OSError as error:
            self.error = error.strerror or str(error)
            # Some of what it found is in the stream already, and some may have been left behind.
            if self._changed_since_ns is None and before is not None:
                self._changed_since_ns = before.began_ns
            raise
        self.error = ""
        if found.changed_bytes and self._changed_since_ns is None:
            self._changed_since_ns = before.began_ns if before is not None else found.began_ns
        self.last = found
        self.passes += 1
        self.copied_bytes += found.changed_bytes
        return found


class ScannedMachine(TracedMachine):
    """Scans a machine's disks while it is entered; commands, points and RPO are as under trace capture."""

    rung = "per-pass"
    scan: ScanCapture

    def __init__(
        self,
        ladder: Ladder,
        marks: Marks,
        gaps: Gaps,
        settings: AgentSettings,
        clock: Clock,
        audits: Auditor | None = None,
    ) -> None:
        super().__init__(ladder, marks, gaps, settings, clock, audits)
        self._interval = settings.scan_every_seconds

    async def __aenter__(self) -> ScannedMachine:
        self.scan = self.capture = await ScanCapture(  # type: ignore[assignment]
            self._ladder,
            self._clock,
            every_seconds=self._interval,
            bytes_per_second=self._settings.seed_bytes_per_second or 0,
            audits=self._audits if isinstance(self._audits, PassAuditor) else None,
        ).__aenter__()
        self._marks.at_point = self._make_point
        _log.info("%d disks are scanned, every %g seconds", len(self._ladder.disks), self._interval)
        return self

    def facts(self) -> dict[str, Any]:
        """For the status."""
        last = self.scan.last
        return {
            "kind": str(CaptureKind.SCAN),
            "is_whole": self.scan.is_whole,
            "dirty_bytes": self.scan.dirty_bytes,
            "copied_bytes": self.scan.copied_bytes,
            "passes": self.scan.passes,
            "last_pass_began_ns": last.began_ns if last is not None else None,
            "last_pass_changed_bytes": last.changed_bytes if last is not None else None,
            "scan_every_seconds": self._interval,
            "points": self._points,
            "refused": self._refusal,
            "error": self.scan.error,
        }

    def summary(self) -> str:
        """For the heartbeat."""
        words = [f"scan every {self._interval:g} s", f"{self.scan.passes} passes"]
        if self.scan.error:
            words.append(f"can't be read: {self.scan.error}")
        if self._refusal:
            words.append(f"no point: {self._refusal}")
        return ", ".join(words)
