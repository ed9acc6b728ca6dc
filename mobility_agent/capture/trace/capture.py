"""Trace capture: follows the changes of disks that stay mounted as they are, and makes points of them.

    events -> dirty extents -> background copies -> (freeze, the rest, thaw) -> the log: GAP_END, MARK, GAP_BEGIN

The kernel's events say which extents change; their content is read back by O_DIRECT and goes into the change log as
background copies. That keeps no order between writes, so the stream is inside a gap but at its marks: at a point the
file systems are frozen, what is still dirty is read, and after it comes the MARK. Order is per mark.

Two rules make it trustworthy. An extent is clean only if it was read after all that had been issued there was seen to
complete, or at a point. And whatever events say, the kernel's own count of sectors must agree at every point, and
nothing may have been lost by the way; else the disk is dirty as a whole, and no point is made before it was copied.

It converges as the live migration of a machine does: copy what is dirty, which takes a while, in which less gets dirty;
when little enough is left to be read within a share of the freeze's budget, freeze. Past the budget: thaw, go on
copying, try again; after `MAX_TRIES` say so.

Weak: what happened while no agent ran is not known, so after a restart a disk is read in full, and what differs from
the replica is sent. A disk that is written to without a file system (a raw database) gives a point only if it holds
still by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

from mobility_agent.capture.trace import freeze
from mobility_agent.capture.trace.audits import PointAuditor
from mobility_agent.capture.trace.copier import BATCH_BYTES, MOMENT_SECONDS, Copier, to_the_end
from mobility_agent.capture.trace.events import EventSource
from mobility_agent.capture.trace.follower import Follower
from mobility_agent.capture.trace.freeze import Filesystem, Freeze
from mobility_agent.capture.trace.guard import Guard
from mobility_agent.capture.trace.stage import Stage
from mobility_agent.capture.trace.still import hold_still
from mobility_agent.capture.trace.tracefs import TracefsEvents
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.ladder import Ladder
from mobility_agent.metrics import Window
from replicar.clock import Clock
from replicar.errors import TransientError

DEFAULT_BUDGET_SECONDS: Final = 0.5
#: Freezes tried for one point.
MAX_TRIES: Final = 5
#: Freezes on the way to one, to know what is under way (see `follower`).
MAX_RESTS: Final = 3
#: Rounds of copying before a freeze; more do not help where changes come faster than copies.
MAX_ROUNDS: Final = 40
#: How long a point may take until it is given up, unless asked otherwise.
POINT_SECONDS: Final = 60.0
#: Share of the budget that reading the rest may take by what was measured; the other parts are freezing and surprise.
READ_SHARE: Final = 0.25
#: Less than this is worth no further round.
_LITTLE_BYTES: Final = 256 << 10
#: Rounds of background copying begin this far apart, so that what is written over and over is copied once in it.
ROUND_SECONDS: Final = 1.0
#: The copier's share of its time, by how many seconds of copying are left; beyond them it takes what it can get.
SHARES: Final = ((5.0, 0.05), (15.0, 0.25))
#: How long a disk may be without a moment at rest before it is frozen to have one.
REST_SECONDS: Final = 2.0
#: A drain of few events costs as much as one of many; half a second of 200,000 events/s would still fit the ring.
DRAIN_SECONDS: Final = 0.1
#: How long a point that is read waits for room in the log.
ROOM_SECONDS: Final = 5.0
_FREEZES: Final = 1024
GAP_REASON: Final = "trace capture orders per mark"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Point:
    """A point that was made: where its MARK is, and what it cost."""

    sequence: int
    freeze_seconds: float
    changed_since_ns: int | None  # the first change that it holds and no point before it does; None: there was none
    tries: int
    staged_bytes: int  # read while frozen


class TraceCapture:
    """Follows disks while it is entered; `run` copies in the background, `point` makes points.

    Args:
        ladder: of these disks and their regions; `ladder.start()` was called.
        disks: kept open by the caller.
        source: of their events; closed by `aclose`.
        freeze_budget_seconds: how long writers may be held at a point.
        bytes_per_second: limit of background copying; 0 for none.
        stage: where what is read at a point is kept; its size bounds how much that may be.
        audits: told at points; run by the caller.
    """

    def __init__(
        self,
        ladder: Ladder,
        disks: Sequence[TrackedDisk],
        source: EventSource,
        clock: Clock,
        *,
        freeze_budget_seconds: float = DEFAULT_BUDGET_SECONDS,
        bytes_per_second: int = 0,
        stage: Stage | None = None,
        audits: PointAuditor | None = None,
    ) -> None:
        self._ladder, self._disks, self._source, self._clock = ladder, disks, source, clock
        self._budget = freeze_budget_seconds
        self._guard = Guard()
        self._stage = stage or Stage()
        self._follower = Follower(disks, source, clock)
        self._copier = Copier(disks, ladder, clock, bytes_per_second=bytes_per_second)
        #: Held by whoever copies, reads for an audit, or makes a point.
        self.turn = asyncio.Lock()
        self._is_still = False  # a thread holds the disks still, and does the draining
        self._audits = audits
        if audits is not None:
            audits.follow(self)
        self._whole_at: int | None = None  # how often the disks had been in doubt when they were last copied in full
        #: Seconds of every freeze.
        self.freezes = Window(_FREEZES)

    async def __aenter__(self) -> TraceCapture:
        try:
            await asyncio.to_thread(self._guard.start)
            if isinstance(self._source, TracefsEvents):
                instance = self._source.instance
                directory = os.open(instance.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    self._guard.remember(directory, instance.name)
                finally:
                    os.close(directory)
            self._follower.watch()
            for disk in self._disks:  # nobody knows what happened before
                disk.extents.mark_all()
            if not self._ladder.in_gap:
                self._ladder.open_gap(GAP_REASON)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Follow the disks no longer; nothing of it is left in the kernel."""
        self._source.close()
        await asyncio.to_thread(self._guard.close)

    @property
    def dirty_bytes(self) -> int:
        return self._follower.dirty_bytes

    @property
    def copied_bytes(self) -> int:
        return self._copier.copied_bytes

    @property
    def equal_bytes(self) -> int:
        """What was read and found to be in the replica already."""
        return self._copier.equal_bytes

    @property
    def doubts(self) -> int:
        """How often a disk had to be compared in full since capture began."""
        return sum(disk.doubts for disk in self._disks)

    @property
    def is_whole(self) -> bool:
        """Whether all there was is copied, and only what changes now goes on being copied."""
        return self._whole_at == self.doubts

    def drain(self) -> None:
        """Take in every event there is; for whoever has the turn."""
        self._follower.drain()

    @property
    def changed_since_ns(self) -> int | None:
        """When the first change happened that is in no point yet; None: there is none."""
        return self._follower.changed_since_ns

    async def run(self) -> None:
        """Drain events and copy for ever; cancel to stop."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._drain_forever())
            group.create_task(self._copy_forever())

    # -- points -------------------------------------------------------------------------------------------------

    async def point(
        self,
        append_mark: Callable[[], int],
        *,
        around: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
        timeout_seconds: float = POINT_SECONDS,
    ) -> Point:
        """Bring the stream to a state that all disks had at one moment, and put a mark there.

        Args:
            append_mark: appends the MARK and returns its sequence; called when the stream is in that state.
            around: entered before each freeze and left after it is over, for scripts that settle applications.

        Raises:
            TransientError: it can't be had now: too much changes, the budget is too small, the log is full...
            LimitError: of `append_mark`.
        """
        until = self._clock.monotonic() + timeout_seconds
        why = ""
        async with self.turn:
            if self._audits is not None:
                await self._audits.before_point()
            for tries in range(1, MAX_TRIES + 1):
                filesystems = await self._converge(until, why)
                try:
                    async with around():
                        held, why, since = await self._hold_still(filesystems, self._stage)
                    if not why:
                        return await self._finish(append_mark, held, tries, since)
                finally:
                    self._stage.put_back()  # what is not in the log by now
                self._copier.read_rate *= 0.5  # it was too hopeful; what is copied now measures it again
                _log.warning("no point yet, %.0f ms frozen: %s", held.seconds * 1000, why)
        raise TransientError(
            f"no recovery point after {MAX_TRIES} freezes: {why}",
            hint="raise the freeze budget, or ask at a quieter time",
            freeze_budget_seconds=self._budget,
        )

    async def _finish(self, append_mark: Callable[[], int], held: Freeze, tries: int, since: int | None) -> Point:
        try:
            return await self._log_point(append_mark, held, tries, since)
        except BaseException:
            if since is not None:
                self._follower.changed_since_ns = since
            raise

    async def _log_point(self, append_mark: Callable[[], int], held: Freeze, tries: int, since: int | None) -> Point:
        staged, doubts = self._stage.byte_count, self.doubts
        for number, (disk, offset, view) in enumerate(self._stage.pieces()):
            await self._log_staged(disk, offset, view)
            if number % 16 == 0:
                await asyncio.sleep(0)
        self._stage.copied()
        if not self._ladder.close_gap():
            raise TransientError(
                "no recovery point: events were lost while it was made", hint="the disks are compared in full first"
            )
        try:
            if self._audits is not None:
                self._audits.tell()
            sequence = append_mark()
        finally:
            self._ladder.open_gap(GAP_REASON)
        self._whole_at = doubts
        return Point(sequence, held.seconds, since, tries, staged)

    async def _log_staged(self, disk: TrackedDisk, offset: int, view: memoryview) -> None:
        until = self._clock.monotonic() + ROOM_SECONDS
        await self._copier.touch(disk, [(offset, len(view))])
        while not self._copier.append(disk, offset, view):
            if self._clock.monotonic() > until:
                raise TransientError(
                    "no recovery point: the change log is full",
                    hint="is the process server reachable? `mobility-agent status`",
                )
            await self._clock.sleep(MOMENT_SECONDS)
            await self._copier.touch(disk, [(offset, len(view))])

    async def _converge(self, until: float, why: str) -> list[Filesystem]:
        """Copy until little enough is left to be read within the budget; the file systems to freeze."""
        follower, left, rests = self._follower, 0, 0
        for _ in range(MAX_ROUNDS):
            filesystems = await asyncio.to_thread(self._filesystems)
            await asyncio.to_thread(freeze.sync, filesystems)
            follower.watch()
            follower.drain()
            follower.begin_counting()
            left = follower.dirty_bytes
            if follower.is_begun and left <= self._target_bytes():
                return filesystems
            copied = await self._copier.copy_round(left, urgent=True)
            if not copied:
                # What is left is being written all the time, or no completion of it was seen.
                if follower.is_begun and left <= self._stage.size_bytes:
                    return filesystems
                rests += 1
                if rests > MAX_RESTS:
                    break
                why = await self._freeze_to_rest(filesystems)
            if self._clock.monotonic() > until:
                break
        raise TransientError(
            f"no recovery point: {left} bytes are still to be copied{f' ({why})' if why else ''}",
            hint="they come faster than they are copied, or a full copy is under way; see dirty_bytes in the status",
            dirty_bytes=left,
        )

    def _share(self) -> float:
        """What of its time the copier may take beside whoever writes: what is written over and over is best copied
        once, at the point, as long as the point does not have to wait for too much."""
        if not self.is_whole:
            return 1.0
        seconds = self._follower.dirty_bytes / self._copier.read_rate
        return next((share for most, share in SHARES if seconds < most), 1.0)

    def _target_bytes(self) -> int:
        return int(min(self._stage.size_bytes, max(self._copier.read_rate * self._budget * READ_SHARE, _LITTLE_BYTES)))

    def _filesystems(self) -> list[Filesystem]:
        family: set[str] = set()
        for disk in self._disks:
            family |= disk.device.family()
        return freeze.filesystems_on(family)

    async def _hold_still(
        self, filesystems: Sequence[Filesystem], stage: Stage | None
    ) -> tuple[Freeze, str, int | None]:
        """Freeze, read what is dirty into `stage`, thaw; the freeze, why it gave no point, and since when there were
        changes, which are counted anew if it gave one."""
        held = Freeze(filesystems, self._guard, self._budget)
        settle = self._audits.settle if self._audits is not None else _nothing
        drain = self._follower.drain_all
        self._is_still = True
        try:
            why = await to_the_end(asyncio.to_thread(hold_still, held, self._disks, drain, stage, settle))
        except TransientError as error:
            why = error.message
            if not self._guard.is_alive:
                await asyncio.to_thread(self._guard.start)
        finally:
            self._is_still = False
            if held.seconds:
                self.freezes.add(held.seconds)
        since = self._follower.changed_since_ns
        if not why and stage is not None:
            self._follower.changed_since_ns = None
        return held, why, since

    async def _freeze_to_rest(self, filesystems: Sequence[Filesystem]) -> str:
        """Freeze for a moment, and read nothing: afterwards nothing is under way that is not known."""
        await asyncio.to_thread(freeze.sync, filesystems)
        held, why, _ = await self._hold_still(filesystems, None)
        _log.info("held still for %.0f ms to begin counting%s", held.seconds * 1000, f": {why}" if why else "")
        self._follower.restless_since = None
        return why

    # -- in the background --------------------------------------------------------------------------------------

    async def _drain_forever(self) -> None:
        while True:
            if not self._is_still:
                self._follower.drain()
                self._follower.look_for_rest()
            await self._clock.sleep(DRAIN_SECONDS)

    async def _copy_forever(self) -> None:
        follower = self._follower
        while True:
            began = self._clock.monotonic()
            full = True
            while full:  # one batch at a time, so that a point has not long to wait for its turn
                async with self.turn:
                    batch_began = self._clock.monotonic()
                    follower.begin_counting()
                    if follower.restless_since is not None and began - follower.restless_since > REST_SECONDS:
                        await self._freeze_to_rest(await asyncio.to_thread(self._filesystems))
                    doubts = self.doubts
                    full = await self._copier.copy_round(BATCH_BYTES) >= BATCH_BYTES
                    # What is left then is being written just now.
                    if not full and follower.is_begun and follower.dirty_bytes <= self._stage.size_bytes:
                        self._whole_at = doubts
                    spent = self._clock.monotonic() - batch_began
                await self._clock.sleep(spent * (1 / self._share() - 1))
            await self._clock.sleep(max(began + ROUND_SECONDS - self._clock.monotonic(), MOMENT_SECONDS))


def _nothing() -> None:
    pass
