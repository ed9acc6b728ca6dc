"""The ladder: what capture does when it can't keep every write in order, and how it climbs back by itself.

    ordered   every write is in the change log                      (the log has room)
    regions   a write only marks the region it touched as dirty     (the log is full)

Between the rungs the stream says GAP. A gap is open from the moment order is lost until every dirty region was copied
into the log again; no recovery point inside it is offered. Initial replication is the same thing: the whole disk is
dirty, and the gap that the stream begins with ends when it is copied.

Rungs and the gap are changed in an order that any instant's death leaves sound: the flag before GAP_BEGIN, GAP_END
before the flag. A gap that is begun twice is one gap.

Weak: between "ordered" and "regions" the design has dirty extents, which are not built yet; a full log therefore costs
the copying of whole regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from mobility_agent.capture.disk import Disk
from mobility_agent.changelog import ChangeLog, Owner, Past
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import TouchedRegions
from replicar.formats import frame, record
from replicar.formats.frame import Flag, Kind

#: Order begins again when the log is this empty, so that it does not flap.
CLIMB_SHARE: Final = 0.5


class Rung(StrEnum):
    ORDERED = "ordered"
    REGIONS = "regions"


class Ladder:
    """Keeps log, regions and the stream's GAP records in step."""

    def __init__(
        self,
        log: ChangeLog,
        disks: Sequence[Disk],
        regions: Mapping[int, DirtyRegions],
        touched: Mapping[int, TouchedRegions],
    ) -> None:
        self.log = log
        self.disks = {disk.index: disk for disk in disks}
        self.regions = regions
        self.touched = touched
        self._doubt = False

    @property
    def rung(self) -> Rung:
        return Rung.ORDERED if self.log.ordered else Rung.REGIONS

    @property
    def in_gap(self) -> bool:
        """Whether a mark set now would lie in a gap."""
        return self.log.state.gap_open

    @property
    def dirty_bytes(self) -> int:
        return sum(regions.dirty_bytes for regions in self.regions.values())

    def start(self) -> None:
        """Call once, before anything is captured: finish what a killed process began, say which disks there are."""
        if self.log.survived:
            self._redo()
        else:
            self._mark_doubtful()
        # Where numbers were left out the gap has to be the first thing that the stream says.
        if self.log.state.gap_open or self.dirty_bytes:
            first = self.log.state.is_new
            self.open_gap("initial replication" if first else "what happened before the agent started is not known")
        for disk in self.disks.values():
            self.log.append_record(Kind.DISK, record.Disk(disk.index, disk.name, disk.size_bytes))

    def open_gap(self, reason: str) -> None:
        """Say in the stream that order is not known from here."""
        self.log.state.gap_open = True
        self.log.state.save()
        self.log.append_record(Kind.GAP, record.Gap(reason), flags=Flag.GAP_BEGIN)

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

    def declare(self) -> None:
        """Open the gap for what was distrusted, if anything was."""
        if self._doubt:
            self._doubt = False
            if not self.log.state.gap_open:
                self.open_gap("the disk failed a write or a flush")

    def climb(self) -> bool:
        """Capture in order again if the log has room; true if order is kept now."""
        if not self.log.ordered and self.log.used_bytes <= self.log.limit_bytes * CLIMB_SHARE:
            self.log.seal()
            self.log.ordered = True
        return self.log.ordered

    def close_gap(self) -> bool:
        """End the gap if nothing is dirty and order is kept; true if no gap is open now."""
        if not self.log.state.gap_open:
            return True
        if not self.log.ordered or self.dirty_bytes:
            return False
        self.log.append_record(Kind.GAP, record.Gap("all dirty regions are copied"), flags=Flag.GAP_END)
        self.log.state.gap_open = False
        self.log.state.save()
        return True

    def _mark_doubtful(self) -> None:
        """Mark what may differ between disk and log: after a power cut what the touched record says, else all of it."""
        for index, regions in self.regions.items():
            touched = self.touched[index]
            if self.log.past is Past.TOUCHED and touched.known:
                for offset, length in touched.ranges():
                    regions.mark(offset, length)
            else:
                regions.mark_all()

    def _redo(self) -> None:
        """Do the last frame's writes again: a process that was killed may have logged one and not done it."""
        last = self.log.take(self.log.next_sequence - 1)
        if last is None:
            return
        found = frame.read_frame(last)
        if found is None:
            return
        for offset, length, _, place, index, kind, flags in found.table.tolist():
            disk = self.disks.get(index)
            if disk is None or not disk.is_served or flags & Flag.SEED:
                continue
            if kind == Kind.WRITE:
                disk.write(offset, found.payload[place : place + length])
            elif kind == Kind.ZERO:
                disk.zero(offset, length)
