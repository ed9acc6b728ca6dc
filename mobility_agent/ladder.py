"""The ladder: what capture does when it can't keep every write in order, and how it climbs back by itself.

    ordered   every write is in the change log                      (the log has room)
    extents   a write's extent is noted, exactly                    (the log is full)
    regions   a write only marks the region it touched as dirty     (so is the row of extents)

Below "ordered" the stream says GAP. A gap is open from the moment order is lost until everything dirty was copied into
the log again; no recovery point inside it is offered. Initial replication is the same thing: the whole disk is
dirty, and the gap that the stream begins with ends when it is copied.

Rungs and the gap are changed in an order that any instant's death leaves sound: the flag before GAP_BEGIN, GAP_END
before the flag. A gap that is begun twice is one gap.

Of a region only what differs from the replica's digests is sent; an extent is sent as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent.allocation.skipped import SkippedPages
from mobility_agent.capture.disk import Disk
from mobility_agent.changelog import ChangeLog
from mobility_agent.digests import Digests
from mobility_agent.extents import MAX_LENGTH, DirtyExtents
from mobility_agent.gate import Gate
from mobility_agent.logstate import Past
from mobility_agent.owner import Owner
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import TouchedRegions
from replicar.errors import LimitError
from replicar.formats import frame, record
from replicar.formats.frame import Flag, Kind

#: Order begins again when the log is this empty, so that it does not flap.
CLIMB_SHARE: Final = 0.5


class Rung(StrEnum):
    ORDERED = "ordered"
    EXTENTS = "extents"
    REGIONS = "regions"


class Ladder:
    """Keeps log, extents, regions, digests and the stream's GAP records in step.

    Args:
        regions, touched, digests: by disk index. Disks that only are followed have no digests.
        extents: the machine's; None where every disk only is followed.
        skipped: by disk index, of disks whose free space is left out.
    """

    def __init__(
        self,
        log: ChangeLog,
        disks: Sequence[Disk],
        regions: Mapping[int, DirtyRegions],
        touched: Mapping[int, TouchedRegions],
        digests: Mapping[int, Digests] | None = None,
        extents: DirtyExtents | None = None,
        skipped: Mapping[int, SkippedPages] | None = None,
    ) -> None:
        self.log = log
        self.disks = {disk.index: disk for disk in disks}
        self.regions = regions
        self.touched = touched
        self.digests = digests or {}
        self.extents = extents
        self.skipped = skipped or {}
        self.gate = Gate()
        self._overflowed = extents is None
        self._doubt = False
        self._unmended: set[int] = set()  # disks
        log.on_sealed.append(self._observe)

    @property
    def rung(self) -> Rung:
        if self.log.ordered:
            return Rung.ORDERED
        return Rung.REGIONS if self._overflowed else Rung.EXTENTS

    @property
    def in_gap(self) -> bool:
        """Whether a mark set now would lie in a gap."""
        return self.log.state.gap_open

    @property
    def dirty_bytes(self) -> int:
        """What has to be read again, in regions and extents."""
        extents = self.extents.dirty_bytes if self.extents is not None else 0
        return extents + sum(regions.dirty_bytes for regions in self.regions.values())

    def dirty_bytes_of(self, disk: int) -> int:
        """The same of one disk."""
        return self.regions[disk].dirty_bytes + (self.extents.bytes_of(disk) if self.extents is not None else 0)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is dirty."""
        return not (self.extents is not None and len(self.extents)) and not any(
            regions.count for regions in self.regions.values()
        )

    def start(self) -> None:
        """Call once, before anything is captured: finish what a killed process began, say which disks there are."""
        for index, touched in self.touched.items():
            touched.note_dropped(touched.dropped and self.log.state.same_boot)
            self.disks[index].dropped = touched.dropped
            self.disks[index].on_dropped = touched.note_dropped
        if self.log.survived:
            if self.extents is not None and self.extents.is_new and self.log.state.gap_open:
                for regions in self.regions.values():  # the row of extents is gone, and nobody can tell what it held
                    regions.mark_all()
            if not self.log.state.was_clean:  # else it was done, and the disk may have been used since by others
                self._redo()
            for index, digests in self.digests.items():  # a former process may have been killed over a failed sync
                for offset, length in self.touched[index].ranges():
                    digests.store_again(offset, length)
        else:
            self._mark_doubtful()
        # Where numbers were left out the gap has to be the first thing that the stream says.
        if self.log.state.gap_open or self.dirty_bytes:
            reason = "what happened before the agent started is not known"
            if self.log.state.is_new:
                reason = "initial replication"
            elif self.log.survived and not self.log.state.gap_open:
                reason = "a disk is new or has grown, or a part of one was still to be copied"
            self.open_gap(reason)
        for disk in self.disks.values():
            self.log.say(Kind.DISK, record.Disk(disk.index, disk.name, disk.size_bytes))

    def remove(self, disks: Sequence[record.Disk]) -> bool:
        """Say in the stream that these are no longer the machine's; false if there is no room to say it yet."""
        for disk in disks:
            self.log.say(Kind.DISK, replace(disk, action=record.DiskAction.REMOVED))
        return self.log.say_rest()

    def left_out_bytes_of(self, disk: int) -> int:
        """Free space of a disk for which the replica has zeros."""
        return self.skipped[disk].byte_count if disk in self.skipped else 0

    def is_left_out(self, disk: int, offset: int, length: int, *, whole: bool = False) -> bool:
        """Whether the replica differs from the disk there by design: any of it is free space that is left out, or no
        longer but not copied yet; or whether the whole of it is left out."""
        skipped = self.skipped.get(disk)
        if skipped is None:
            return False
        return skipped.has_all(offset, length) if whole else skipped.differs(offset, length)

    def open_gap(self, reason: str) -> None:
        """Say in the stream that order is not known from here."""
        self.log.state.gap_open = True
        self.log.state.save()
        self.log.say(Kind.GAP, record.Gap(reason), flags=Flag.GAP_BEGIN)

    def note(self, disk: int, offset: int, length: int) -> None:
        """A write that is not in the log is about to be done: the extents rung, or below it the regions'."""
        if self._overflowed or self.extents is None or length > MAX_LENGTH:
            self.regions[disk].mark(offset, length)
        elif not self.extents.note(disk, offset, length):
            self._overflowed = True
            self.regions[disk].mark(offset, length)
        if disk in self.skipped:
            self.skipped[disk].leave(offset, length)  # behind that: killed between the two, it is left out still

    def claim(self, owner: Owner, unparsed: bytes) -> None:
        """Give `owner` the open frame, or, when the log is full, the next rung: from then on writes mark regions."""
        if self.log.ordered and not self.log.claim(owner, unparsed):
            self.log.ordered = False
            if not self.log.state.gap_open:
                self.open_gap("the change log is full")
        if not self.log.ordered:
            self.log.claim_scratch(owner, unparsed)

    def distrust(self, disk: int, offset: int, length: int) -> None:
        """What is on the disk there may differ from what the stream says: have it copied again.

        The gap begins with the next `declare`, which has to come before anybody is told of the failure.
        """
        self.regions[disk].mark(offset, length)
        self._doubt = True

    def flush_failed(self, disk: int) -> None:
        """The kernel may have dropped what it could not write, so any of a disk may differ from the stream.

        The gap begins with the next `declare`; until the disk is mended no flush counts.
        """
        if disk not in self._unmended:
            self._unmended.add(disk)
            self.distrust(disk, 0, self.disks[disk].size_bytes)

    def mended(self, disk: int, ranges: Sequence[tuple[int, int]]) -> None:
        """What may have been dropped, in these ranges, was written again; it may be of before the write dropped."""
        self._unmended.discard(disk)
        self.touched[disk].note_dropped(self.disks[disk].dropped)  # again, should a flush have failed meanwhile
        for offset, length in ranges:
            self.distrust(disk, offset, length)
        self.declare()

    def declare(self) -> None:
        """Open the gap for what was distrusted, if anything was."""
        if self._doubt:
            self._doubt = False
            if not self.log.state.gap_open:
                self.open_gap("the disk failed a write or a flush")

    def climb(self) -> bool:
        """Capture in order again if the log has room; true if order is kept now, and all is said."""
        if not self.log.ordered and self.log.used_bytes <= self.log.limit_bytes * CLIMB_SHARE:
            self.log.seal()
            self.log.ordered = True
            self._overflowed = self.extents is None
            if self.extents is not None:
                self.extents.merge()
        return self.log.say_rest() and self.log.ordered

    def close_gap(self) -> bool:
        """End the gap if nothing is dirty and order is kept; true if no gap is open now."""
        if not self.log.state.gap_open:
            return True
        if not self.log.ordered or not self.is_clean:
            return False
        try:
            self.log.append_record(Kind.GAP, record.Gap("all dirty regions are copied"), flags=Flag.GAP_END)
        except LimitError:
            return False  # it stays open until there is room
        self.log.state.gap_open = False
        self.log.state.save()
        return True

    def _mark_doubtful(self) -> None:
        """Mark what may differ between disk and log: after a power cut what the touched record says, else all of it.

        Of the same places no digest is believed; see `digests`.
        """
        if self.extents is not None:
            self.extents.clear()
        for index, regions in self.regions.items():
            touched, digests = self.touched[index], self.digests.get(index)
            if self.log.past is Past.TOUCHED and touched.known:
                for offset, length in touched.ranges():
                    regions.mark(offset, length)
                    if index in self.skipped:
                        self.skipped[index].leave(offset, length)
                    if digests is not None:
                        digests.forget(np.array([offset]), np.array([length]))
            else:
                regions.mark_all()
                if index in self.skipped:
                    self.skipped[index].leave_all()
                if digests is not None:
                    digests.forget_all()

    def _observe(self, table: npt.NDArray[np.void]) -> None:
        """A frame is finished: what it changes is no longer what the digests say."""
        for index, digests in self.digests.items():
            digests.observe(table, index)
        for index, skipped in self.skipped.items():
            skipped.observe(table, index)

    def _redo(self) -> None:
        """Do the last frame's writes again: a process that was killed may have logged one and not done it.

        But never over what is dirty: it may have been written behind that frame, while the log was full, and is on the
        disk alone. Nor need it be: what was not done was not acknowledged, and the copy will say what the disk has.
        """
        last = self.log.take(self.log.next_sequence - 1)
        if last is None:
            return
        found = frame.read_frame(last)
        if found is None:
            return
        self._observe(found.table)  # it may have been finished, or staged, without that
        for offset, length, _, place, index, kind, flags in found.table.tolist():
            disk = self.disks.get(index)
            if disk is None or not disk.is_served or flags & Flag.SEED:
                continue
            if self._is_dirty(index, offset, length):
                self.regions[index].mark(offset, length)  # the whole of it, where a part was dirty
            elif kind == Kind.WRITE:
                disk.write(offset, found.payload[place : place + length])
            elif kind == Kind.ZERO:
                disk.zero(offset, length)

    def _is_dirty(self, disk: int, offset: int, length: int) -> bool:
        """Whether any of a range waits to be copied."""
        if self.extents is not None and self.extents.touch(disk, offset, length):
            return True
        regions = self.regions[disk]
        return regions.is_dirty(offset // regions.region_bytes, -(-(offset + length) // regions.region_bytes))
