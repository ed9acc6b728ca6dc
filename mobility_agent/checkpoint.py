"""Checkpoints: every so often log and disks are made durable, and the touched record forgets what was settled by that.

A checkpoint costs a sync of each, in threads; nobody waits for it. The order is what makes it right:

    0  disks of which a flush failed are mended; until that has succeeded, nothing is retired
    1  begin a round: what is written from here on stays recorded, and what waits to be copied as an extent
    2  the maps of dirty regions durable, then the log, then the digests, then the disks
    3  remember durably how far the log was: a log that comes back shorter has lost what no record covers
    4  retire what was not written since 1
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from mobility_agent.ladder import Ladder
from mobility_agent.mending import mend
from mobility_agent.touched import NO_RANGES
from replicar.clock import Clock

#: How long a region that is not written any more stays recorded, about; and how often a disk is synced for that.
CHECKPOINT_SECONDS: Final = 15.0

_log = logging.getLogger(__name__)


class Checkpointer:
    """Makes checkpoints while anything is recorded as touched."""

    def __init__(self, ladder: Ladder, clock: Clock) -> None:
        self._ladder = ladder
        self._clock = clock

    async def run(self) -> None:
        """Make checkpoints for ever; cancel to stop."""
        while True:
            await self._clock.sleep(CHECKPOINT_SECONDS)
            if any(touched.count for touched in self._ladder.touched.values()):
                try:
                    await self.checkpoint()
                except OSError as error:  # the regions stay recorded, and the next round tries again
                    _log.error("no checkpoint: %s", error)

    async def checkpoint(self) -> None:
        """Make one.

        Raises:
            OSError: something can't be made durable; nothing was retired.
        """
        ladder = self._ladder
        for disk in ladder.disks.values():
            if disk.is_served and disk.dropped:
                await mend(ladder, disk)
        for index, touched in ladder.touched.items():
            touched.begin_round(ladder.extents.ranges_of(index) if ladder.extents is not None else NO_RANGES)
        reached = ladder.log.next_sequence
        for regions in ladder.regions.values():
            await regions.file.sync_aside()
        await ladder.log.sync()
        for digests in ladder.digests.values():
            await digests.file.sync_aside()
        for index, skipped in ladder.skipped.items():  # behind the log, whose sealing changes both
            await ladder.regions[index].file.sync_aside()
            await skipped.file.sync_aside()
        for disk in ladder.disks.values():
            if not disk.is_served:
                continue  # what others write to it is theirs to make durable
            try:
                await asyncio.to_thread(disk.flush)
            except OSError:
                ladder.flush_failed(disk.index)
                ladder.declare()
                raise
        ladder.log.state.retired_sequence = reached
        ladder.log.state.save(durable=True)
        for touched in ladder.touched.values():
            await touched.retire()
