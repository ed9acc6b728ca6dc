"""What was written to a disk between two states of it, asked of whoever knows: the log, or both states themselves."""

from __future__ import annotations

from typing import Final

from recovery.failback.spans import Spans, differing
from recovery.view import View
from replicar.formats.record import Disk

#: Of a disk, looked up in one go: its extents are in memory for a moment.
WINDOW_BYTES: Final = 16 << 30


class PointDisk:
    """A disk of a point, as an `Origin`."""

    def __init__(self, view: View, disk: Disk) -> None:
        self._view, self._disk = view, disk
        self.size_bytes = disk.size_bytes

    async def read(self, offset: int, length: int) -> bytes:
        """Raises as `View.read`."""
        return await self._view.read(self._disk, offset, length)


async def data_of(view: View, disk: Disk) -> Spans:
    """Where the disk has data at a point; the rest is zeros."""
    found = Spans.of(())
    for offset in range(0, disk.size_bytes, WINDOW_BYTES):
        there = await view.stretches(disk, offset, min(WINDOW_BYTES, disk.size_bytes - offset))
        found = found.union(Spans.of((start, end - start) for start, end in there))
    return found


async def written_between(one: View, other: View, disk: Disk) -> Spans:
    """Where two points of a log may differ on a disk of the first; all of one that is another disk by the second."""
    same = next((each for each in other.disks if each.index == disk.index and each.name == disk.name), None)
    if same is None:
        return Spans.whole(disk.size_bytes)
    found = Spans.of(())
    for offset in range(0, disk.size_bytes, WINDOW_BYTES):
        before, after = await one.lookup(disk, offset, WINDOW_BYTES), await other.lookup(same, offset, WINDOW_BYTES)
        found = found.union(differing(before, after))
    lost = [(same.size_bytes, disk.size_bytes - same.size_bytes)] if same.size_bytes < disk.size_bytes else []
    return found.union(Spans.of(lost))
