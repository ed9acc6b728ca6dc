"""Audits of disks that are followed where they are: read at any time, told at the next point.

The stream of such disks is in a gap but at its points, so an AUDIT has its place only there, between GAP_END and MARK.
A freeze is too dear to read disks in it. So a chunk is read beside the writers, when every event so far is drained and
no write to it is under way, and its hash is *held*. At the next point, while all is frozen, it is seen what no event
touched since it was read: that is on the disk at this very moment, and its hash goes into the stream. It rests on the
same events as the copies do, and on the same count of the kernel's: where those don't agree there is no point.

What was written meanwhile is read *again* right before the next point, in pieces, of which most hold still for that
long. A piece that doesn't, not even once, is left out of the round, and counted.

    read -> held -> unchanged at the point: AUDIT
                 -> changed: again, right before a point -> unchanged: AUDIT
                                                         -> changed: left out

So a round ends at a point, never in between, and the position that survives the process is that of a point.

Weak: a machine without points has no audits. What is written all the time (a journal, a database's busiest pages) is
audited only where it happens to hold still between its reading and the freeze.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from mobility_agent.auditing import PIECE_BYTES, Auditor
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.trace.copier import to_the_end
from mobility_agent.capture.trace.tracked import TrackedDisk
from mobility_agent.ladder import Ladder
from replicar.clock import Clock
from replicar.observe.logs import fields

#: Chunks held, or to be read again: 4 GiB of disk between two points, and half a megabyte of AUDITs at one.
MAX_HELD: Final = 4096
#: What is read again right before a point, which waits for it.
AGAIN_BYTES: Final = 16 << 20

_log = logging.getLogger(__name__)


class Following(Protocol):
    """What the audits need to know of the capture. All of it is the event loop's."""

    turn: asyncio.Lock
    """Held by whoever copies, or makes a point."""

    @property
    def is_whole(self) -> bool: ...

    def drain(self) -> None:
        """Take in every event there is."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A part of a disk as it was read. `expected` is what `DirtyExtents.expect` gave; `is_last` after a second try."""

    disk: TrackedDisk
    offset: int
    length: int
    digest: bytes
    expected: int
    is_last: bool

    @property
    def is_true(self) -> bool:
        return self.disk.extents.is_as_expected(self.offset, self.length, self.expected)


class PointAuditor(Auditor):
    """See the module; the round, its rate and its memory are `Auditor`'s."""

    def __init__(self, ladder: Ladder, clock: Clock, path: Path, *, bytes_per_second: int) -> None:
        self._following: Following | None = None
        self._held: deque[_Held] = deque()
        self._again: deque[tuple[TrackedDisk, int, int]] = deque()
        self._told = False  # at a point, since the position was written
        super().__init__(ladder, clock, path, bytes_per_second=bytes_per_second)
        self._kept = super()._position()

    def follow(self, capture: Following) -> None:
        """The capture whose points these audits are told at."""
        self._following = capture

    # --- at points; the capture's turn is held ---

    async def before_point(self) -> None:
        """Read again what was written since it was read, as much as is worth waiting for."""
        following = self._following
        assert following is not None
        following.drain()
        wanted: list[tuple[TrackedDisk, int, int, int]] = []
        room = AGAIN_BYTES
        while self._again and room > 0:
            disk, offset, length = self._again.popleft()
            room -= length
            for start in range(offset, offset + length, PIECE_BYTES):
                piece = min(PIECE_BYTES, offset + length - start)
                if disk.completeness.is_begun and (expected := disk.extents.expect(start, piece)) is not None:
                    wanted.append((disk, start, piece, expected))
                else:
                    self._skipped += piece
        read = await to_the_end(asyncio.to_thread(self._read_all, [item[:3] for item in wanted]))
        for (disk, start, piece, expected), digest in zip(wanted, read, strict=True):
            if digest is None:
                self._skipped += piece
            else:
                self._held.append(_Held(disk, start, piece, digest, expected, is_last=True))
        self._due = max(self._due, self._clock.monotonic()) + (AGAIN_BYTES - room) / self._rate

    def settle(self) -> None:
        """All is frozen and every event drained: keep what is as it was read. On another thread than the event loop's,
        which waits for it."""
        held, self._held = self._held, deque()
        for item in held:
            if item.is_true:
                self._held.append(item)
            elif item.is_last:
                self._skipped += item.length
            else:
                self._again.append((item.disk, item.offset, item.length))

    def tell(self) -> None:
        """The stream is what the disks were when `settle` was called: put the AUDITs into it. What the log has no room
        for is held until the next point."""
        log = self._ladder.log
        while self._held:
            item = self._held[0]
            if log.append_audit(item.disk.index, item.offset, item.length, item.digest) is None:
                break
            self.audits += 1
            self._held.popleft()
        # What was read and is in no point counts as left out: nobody reads it again if the process dies.
        pending = sum(item.length for item in self._held) + sum(length for _, _, length in self._again)
        self._kept, self._told = {**super()._position(), "skipped": self._skipped + pending}, True

    async def step(self) -> bool:
        return self._can_go_on() and await super().step()

    # --- inside ---

    async def _audit(self, disk: Disk, offset: int, length: int) -> bool | None:
        """True: it is held, or will be read again. False: it can't be read. None: not now."""
        assert isinstance(disk, TrackedDisk)
        following = self._following
        assert following is not None
        await self._pace(length)
        async with following.turn:
            following.drain()  # which may be what notices a loss
            if not self._can_go_on() or not disk.completeness.is_begun:
                return None
            expected = disk.extents.expect(offset, length)
            if expected is None:
                self._again.append((disk, offset, length))
                return True
            (digest,) = await to_the_end(asyncio.to_thread(self._read_all, [(disk, offset, length)]))
            if digest is None:
                _log.warning(
                    "disk %s can't be read for its audit at %d",
                    disk.name,
                    offset,
                    extra=fields(disk=disk.name, offset=offset),
                )
                return False
            self._held.append(_Held(disk, offset, length, digest, expected, is_last=False))
            return True

    def _read_all(self, wanted: Sequence[tuple[TrackedDisk, int, int]]) -> list[bytes | None]:
        """The hashes; None for what can't be read."""
        read: list[bytes | None] = []
        for disk, offset, length in wanted:
            try:
                read.append(self._digest(disk, offset, length))
            except OSError:
                read.append(None)
        return read

    def _can_go_on(self) -> bool:
        following, log = self._following, self._ladder.log
        if following is None or not following.is_whole or self._log_is_busy():
            return False
        pending = len(self._held) + len(self._again)
        return pending < MAX_HELD and not (pending and self._next_disk() is None) and log.ordered

    def _end_round(self) -> None:
        super()._end_round()
        self._kept, self._told = super()._position(), True

    async def _save(self) -> None:
        if self._told:
            self._told = False
            self._save_due = 0.0
            await super()._save()

    def _position(self) -> dict[str, Any]:
        return self._kept
