"""Bugs of the agent."""

from __future__ import annotations

import os
from typing import Any

from mobility_agent.allocation.skipped import PAGE_BYTES, SkippedPages
from mobility_agent.auditing import Auditor
from mobility_agent.capture.disk import Disk
from mobility_agent.capture.inline import InlineCapture
from mobility_agent.digests import Digests
from mobility_agent.ladder import Ladder
from mobility_agent.logstate import LogState
from mobility_agent.mapped import MappedFile
from mobility_agent.seeding import Seeder
from mobility_agent.sender import Sender
from mobility_agent.touched import NO_RANGES, TouchedRegions
from replicar.formats import record
from replicar.formats.frame import Flag, Kind
from simulator.world.connections import End

Names = tuple[tuple[Any, str, Any], ...]


def trims_on_received() -> Names:
    """The log is trimmed by what the server has received, not by what storage has."""
    acknowledge = Sender._acknowledge

    def early(self: Sender, received: int | None, stored: int) -> None:
        acknowledge(self, received, max(stored, received or 0))

    return ((Sender, "_acknowledge", early),)


def flush_leaves_the_disk() -> Names:
    """A flush makes the change log durable and leaves the disk as it is."""

    async def flush(self: InlineCapture, disks: Any) -> int:
        await self.ladder.log.sync()
        return 0

    return ((InlineCapture, "_flush", flush),)


def dirty_is_not_noted() -> Names:
    """What is written while the log is full is not noted."""

    def note(self: Ladder, disk: int, offset: int, length: int) -> None:
        """It is forgotten."""

    return ((Ladder, "note", note),)


def clean_before_it_is_copied() -> Names:
    """A region counts as clean when its copy begins, not when it is in the log."""
    append = Seeder._append

    def hasty(self: Seeder, disk: Disk, start: int, content: memoryview, rows: Any) -> bool:
        if start:
            return True  # the copy is lost on its way, and nobody knows
        return append(self, disk, start, content, rows)

    return ((Seeder, "_append", hasty),)


def gap_is_not_said() -> Names:
    """Order is lost, and the stream does not say so."""
    open_gap = Ladder.open_gap

    def silent(self: Ladder, reason: str) -> None:
        if self.log.state.anew_sequence == self.log.next_sequence:
            open_gap(self, reason)  # else nobody would take the stream at all
        else:
            self.log.state.gap_open = True

    return ((Ladder, "open_gap", silent),)


def written_pages_stay_left_out() -> Names:
    """A page that is written stays in the map of what is left out."""

    def observe(self: SkippedPages, table: Any, disk: int) -> None:
        """It is not looked at."""

    return ((SkippedPages, "observe", observe),)


def rest_of_a_page_is_forgotten() -> Names:
    """What lay beside a write in a page that was left out is never copied."""
    leave = SkippedPages.leave

    def forgetful(self: SkippedPages, offset: int, length: int) -> None:
        begin, end = offset // PAGE_BYTES * PAGE_BYTES, -(-(offset + length) // PAGE_BYTES) * PAGE_BYTES
        leave(self, begin, end - begin)

    return ((SkippedPages, "leave", forgetful),)


def left_out_is_believed() -> Names:
    """After a power cut the map of what is left out is believed, whatever was written since it was durable."""
    mark = Ladder._mark_doubtful

    def believing(self: Ladder) -> None:
        skipped, self.skipped = self.skipped, {}
        mark(self)
        self.skipped = skipped

    return ((Ladder, "_mark_doubtful", believing),)


def clean_when_its_turn_is_over() -> Names:
    """A region counts as clean when its copy has waited for the rate, whatever was marked meanwhile."""
    copy = Seeder._copy

    async def waiting(self: Seeder, disk: Disk, start: int, length: int) -> bool:
        copied = await copy(self, disk, start, length)
        await self._pace(length)
        return copied

    return ((Seeder, "_copy", waiting),)


def audits_are_told_late() -> Names:
    """An audit is told some time after it was read, whatever was written meanwhile."""

    async def late(self: Auditor, disk: Disk, offset: int, length: int) -> bool | None:
        await self._pace(length)
        digest = self._digest(disk, offset, length)
        await self._clock.sleep(0.5)
        if not self._can_go_on() or self._ladder.log.append_audit(disk.index, offset, length, digest) is None:
            return None
        return True

    return ((Auditor, "_audit", late),)


def gap_ends_early() -> Names:
    """The gap ends when the log has room again, whatever is still dirty."""

    def close_gap(self: Ladder) -> bool:
        if self.log.state.gap_open and self.log.ordered:
            self.log.append_record(Kind.GAP, record.Gap("early"), flags=Flag.GAP_END)
            self.log.state.gap_open = False
            self.log.state.save()
        return True

    copy = Seeder._copy_disk

    async def late(self: Seeder, disk: Disk) -> bool:
        self._ladder.close_gap()
        return await copy(self, disk)

    return ((Ladder, "close_gap", close_gap), (Seeder, "_copy_disk", late))


def last_write_is_not_redone() -> Names:
    """After a kill the last frame's writes are taken for done."""

    def redo(self: Ladder) -> None:
        """Nothing is."""

    return ((Ladder, "_redo", redo),)


def extents_are_retired() -> Names:
    """A region whose writes wait as extents leaves the touched record with the next checkpoint. (It was so once.)"""
    begin_round = TouchedRegions.begin_round

    def forgetful(self: TouchedRegions, waiting: Any = NO_RANGES) -> None:
        begin_round(self)

    return ((TouchedRegions, "begin_round", forgetful),)


def failed_flush_is_forgotten() -> Names:
    """A flush of a disk that succeeds behind one that failed is believed. (It was so once.)"""

    def sync(self: Disk) -> None:
        os.fdatasync(self.fd)

    return ((Disk, "_sync", sync),)


def dropped_pages_are_believed() -> Names:
    """A sync that succeeds behind one that failed is taken for having written what that one dropped. (It was so.)"""

    def nothing(self: MappedFile, *_: Any) -> None:
        """It is clean, says the kernel."""

    return ((MappedFile, "store_again", nothing),)


def redone_over_newer() -> Names:
    """After a kill the last frame's writes are done again, whatever was written behind it. (It was so once.)"""

    def is_dirty(self: Ladder, disk: int, offset: int, length: int) -> bool:
        return False

    return ((Ladder, "_is_dirty", is_dirty),)


def numbers_come_twice() -> Names:
    """After a power cut the log goes on with numbers that it may have given out before."""
    load = LogState._load

    def forgetful(self: LogState, path: Any) -> None:
        load(self, path)
        self.reserved_sequence = 0

    return ((LogState, "_load", forgetful),)


def digests_are_kept() -> Names:
    """A write does not forget the digests of what it overwrites, so a comparison takes old for new."""

    def observe(self: Digests, table: Any, disk: int) -> None:
        """They stay."""

    return ((Digests, "observe", observe),)


def who_left_is_heard() -> Names:
    """What a client had sent before it left is carried out whenever it is read, over what was written since."""
    return ((End, "is_left", property(lambda end: False)),)
