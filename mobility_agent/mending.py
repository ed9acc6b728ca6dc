"""Mending a disk of which a flush failed: what the kernel dropped is written again.

When the kernel can't write a page it says so once, goes on showing what was written there, and takes it for clean. From
then on reads and medium differ, and no sync mends that. A power cut shows it: acknowledged writes would be gone, and
the replica, which has them, would not be the disk any more. So after a failed flush

    - every flush fails, for whoever asks (`Disk.dropped`), and no region is retired from the touched record;
    - everything written since the last flush that succeeded lies in recorded regions: these are read and written
      again, which makes them dirty, and flushed;
    - then they are compared with the replica once more, since the kernel may have read a dropped page anew meanwhile.

That a disk is in this state is noted in the touched record, in its page alone: it has to survive the process, and means
nothing after a restart of the machine.

Weak: what was dropped and read anew before it was mended is lost, of which the failed flush told.
"""

from __future__ import annotations

import asyncio
from typing import Final

from mobility_agent.capture.disk import Disk
from mobility_agent.ladder import Ladder

PIECE_BYTES: Final = 1 << 20
#: How often a piece that is written while it is read is tried again before the writers wait for it.
_TRIES: Final = 8


async def mend(ladder: Ladder, disk: Disk) -> None:
    """Write again what may have been dropped, and make it durable.

    Raises:
        OSError: it can't be; the disk stays as it is.
    """
    ranges = ladder.touched[disk.index].ranges()
    for start, length in ranges:
        for at in range(start, start + length, PIECE_BYTES):
            for offset, size, is_hole in list(disk.allocation(at, min(PIECE_BYTES, start + length - at))):
                if not is_hole:
                    await _write_again(disk, offset, size)
    await asyncio.to_thread(disk.mended)
    ladder.mended(disk.index, ranges)


async def _write_again(disk: Disk, offset: int, length: int) -> None:
    with disk.watch(offset, offset + length) as watch:
        for _ in range(_TRIES):
            watch.hit = False
            content = await asyncio.to_thread(disk.read, offset, length)
            if not watch.hit:
                break
        else:
            content = disk.read(offset, length)
        disk.write(offset, content)
