"""A disk that stays as it is, mounted and in use, while its changes are followed: `/dev/sdb`, or a partition of it.

It is read by O_DIRECT only. A buffered read of the block device of a mounted file system may be stale, since what the
file system discards never passes the device's own cache: measured, one block in nine differed.

Events and counters are those of the whole disk, even where only a partition of it is protected.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent.capture.disk import Disk
from mobility_agent.capture.trace.counters import Completeness, Counters
from mobility_agent.capture.trace.events import EVENT, Events, What, device_number
from mobility_agent.capture.trace.extents import DirtyExtents, Numbers, sectors_to_bytes
from mobility_agent.regions import DirtyRegions
from replicar.errors import PermanentError

_SYSTEM: Final = Path("/sys/dev/block")
_LETTERS: Final = EVENT["rwbs"].itemsize


class BlockDevice:
    """Where a block device is in sysfs, and what it is part of.

    Raises:
        PermanentError: the path is no block device.
    """

    def __init__(self, path: Path) -> None:
        try:
            found = os.stat(path)
        except OSError as error:
            raise PermanentError(f"{path} can't be looked at: {error.strerror}", path=str(path)) from None
        if not stat.S_ISBLK(found.st_mode):
            raise PermanentError(
                f"{path} is no block device",
                hint="trace capture follows block devices; a file is served by inline capture",
                path=str(path),
            )
        self.path = path
        self.directory = (_SYSTEM / _text(found.st_rdev)).resolve()
        self.is_partition = (self.directory / "partition").exists()
        self.whole = self.directory.parent if self.is_partition else self.directory
        self.start_bytes = int((self.directory / "start").read_text()) << 9 if self.is_partition else 0

    @property
    def number(self) -> int:
        """Of the whole disk, as events name it."""
        return _number(self.whole)

    @property
    def follows_discard_ranges(self) -> bool:
        """Whether one discard request may be of several places, of which its events name the first only."""
        return int(self.setting("max_discard_segments", "1")) > 1

    def setting(self, name: str, default: str = "") -> str:
        """One of the request queue's settings."""
        try:
            return (self.whole / "queue" / name).read_text().strip()
        except OSError:
            return default

    def family(self) -> set[str]:
        """`major:minor` of everything whose content is on this device: itself, its partitions, what is mapped onto
        them (LVM, encryption), to any depth."""
        return set(_family(self.directory))

    def partition_numbers(self) -> set[int]:
        return {_number(path.parent) for path in self.whole.glob("*/partition")}


class TrackedDisk(Disk):
    """A `Disk` that is only read, with what is known of its changes. Call `follow` before anything else.

    Args:
        index, name, path: see `Disk`.
        discard_ranges: follow discards by bio; default: if the device needs it.

    Raises:
        PermanentError: it is no block device, or can't be opened.
    """

    is_served = False
    regions: DirtyRegions
    extents: DirtyExtents

    def __init__(self, index: int, name: str, path: Path, *, discard_ranges: bool | None = None) -> None:
        self.device = BlockDevice(path)
        super().__init__(index, name, path, flags=os.O_RDONLY | os.O_DIRECT)
        self.counters = Counters(self.device.whole)
        self.completeness = Completeness()
        self.discard_ranges = self.device.follows_discard_ranges if discard_ranges is None else discard_ranges
        self.event_count = 0
        self.doubts = 0
        self.watched: list[int] = []  # device numbers whose events are its
        self._discards: list[tuple[Numbers, Numbers]] = []  # queued, not known to be done
        self._discard_sectors = 0  # queued less completed
        self._discard_drift = 0  # queued less issued: 0 at rest

    def follow(self, regions: DirtyRegions) -> None:
        """Keep the coarse record of its changes in `regions`, which stay the caller's to close."""
        self.regions = regions
        self.extents = DirtyExtents(regions)

    def numbers(self) -> set[int]:
        """The devices to watch; more of them after the disk was partitioned."""
        return {self.device.number, *(self.device.partition_numbers() if self.discard_ranges else ())}

    def read(self, offset: int, length: int) -> bytes:
        with mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE) as pages, memoryview(pages) as view:
            self.read_into(offset, view[:length])
            return bytes(view[:length])

    def apply(self, events: Events) -> None:
        """Take in what of these events is this disk's."""
        if len(self.watched) == 1:
            mine = events["device"] == self.watched[0]
        else:
            mine = np.isin(events["device"], self.watched)
        if not mine.all():
            events = events[mine]
        if not events.size:
            return
        # Columns, once: a selection of whole records costs more than all that is done with them.
        kinds = np.ascontiguousarray(events["what"])
        sectors = events["sectors"].astype(np.int64)
        issued = kinds == What.ISSUE
        ended = (kinds == What.COMPLETE) | (kinds == What.REQUEUE)
        requeued = kinds == What.REQUEUE
        self.event_count += int(np.count_nonzero(kinds != What.COMPLETE))
        self.completeness.captured += int(sectors[issued].sum()) - int(sectors[requeued].sum())
        offsets, lengths, inside = self._ranges(events["sector"], sectors)
        marked = (issued | (kinds == What.QUEUE)) & inside
        self.extents.mark(offsets[marked], lengths[marked])
        counted = (issued | ended) & inside
        signs = np.where(issued[counted], np.int32(1), np.int32(-1))
        self.extents.count(offsets[counted], lengths[counted], signs)
        if self.discard_ranges:
            self._discard_drift -= _discarded(events[issued]) - _discarded(events[requeued])
            for what in What:
                chosen = kinds == what
                if chosen.any():
                    ranges = offsets[chosen & inside], lengths[chosen & inside]
                    self._follow_discards(what, events[chosen], ranges)

    def at_rest(self) -> None:
        """Nothing is being written, and all events are drained: forget what events said is under way."""
        self.extents.at_rest()
        self._discards, self._discard_sectors = [], 0

    def missing(self) -> str:
        """In words, how the capture since the last check differs from what the kernel counted; empty if it doesn't.

        Only at rest, with all events drained. Begins anew if nothing was begun.
        """
        count = self.counters.read()
        drift = self._discard_drift if self.discard_ranges else 0
        self._discard_drift = 0
        if not self.completeness.is_begun:
            self.completeness.begin(count)
            return ""
        if missing := self.completeness.missing(count):
            return f"{missing} sectors differ between what was captured and what the kernel counted"
        return f"{drift} sectors of discards differ between what was queued and what was issued" if drift else ""

    def doubt(self) -> None:
        """Something of this disk was not captured: everything is dirty, and counting begins again at the next rest."""
        self.doubts += 1
        self.completeness.doubt()
        self.extents.mark_all()

    def _ranges(
        self, sector: npt.NDArray[np.uint64], sectors: Numbers
    ) -> tuple[Numbers, Numbers, npt.NDArray[np.bool_]]:
        """Offsets and lengths in bytes within this disk, and which of them lie in the partition at all."""
        begin = sectors_to_bytes(sector) - self.device.start_bytes
        end = np.minimum(begin + (sectors << 9), self.size_bytes)
        begin = np.maximum(begin, 0)
        return begin, end - begin, end > begin

    def _follow_discards(self, what: What, events: Events, ranges: tuple[Numbers, Numbers]) -> None:
        if what is What.QUEUE:
            sectors = int(events["sectors"].sum(dtype=np.int64))
            self._discard_drift += sectors
            self._discard_sectors += sectors
            self.extents.begin(*ranges)
            self._discards.append(ranges)
        elif what is What.COMPLETE:
            self._discard_sectors -= _discarded(events)
            if not self._discard_sectors:  # as many sectors are done as were asked for, so all of them are
                for done in self._discards:
                    self.extents.finish(*done)
                self._discards.clear()


def _discarded(events: Events) -> int:
    letters = np.ascontiguousarray(events["rwbs"]).view(np.uint8).reshape(len(events), _LETTERS)
    discards = (letters[:, 0] == ord("D")) | ((letters[:, 0] == ord("F")) & (letters[:, 1] == ord("D")))
    return int(events["sectors"][discards].sum(dtype=np.int64))


def _family(directory: Path) -> Iterable[str]:
    try:
        yield (directory / "dev").read_text().strip()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return
    for part in directory.glob("*/partition"):
        yield from _family(part.parent)
    for holder in directory.glob("holders/*"):
        yield from _family(holder.resolve())


def _number(directory: Path) -> int:
    major, minor = (directory / "dev").read_text().split(":")
    return device_number(int(major), int(minor))


def _text(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
