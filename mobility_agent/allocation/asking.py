"""Leaving free space out of initial replication: the file systems are asked once, before their disk is first served.

`copy_free_space = false` is the operator's choice to have free space come back as zeros. The answer is believed for a
disk that is dirty all over and was never asked before: then nobody can have written through this agent, and the disk is
held exclusively, so what its file systems say about themselves is complete, if they were unmounted cleanly. An agent
that starts again while its clients hold a file system in their memory does not ask: it copies.

Going back to `copy_free_space = true` makes all that was left out dirty, to be copied in the background.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from mobility_agent.allocation.skipped import SkippedPages
from mobility_agent.allocation.volumes import free_space
from mobility_agent.capture.disk import Disk
from mobility_agent.ladder import Ladder
from mobility_agent.regions import DirtyRegions
from replicar.observe.logs import fields

_log = logging.getLogger(__name__)


def open_map(path: Path, regions: DirtyRegions, *, copy_free_space: bool) -> SkippedPages | None:
    """A disk's map; None if nothing of it is left out, and nothing is to be."""
    if copy_free_space and not path.exists():
        return None
    return SkippedPages(path, regions)


def settle(ladder: Ladder, disks: Iterable[Disk], *, copy_free_space: bool) -> None:
    """Ask the file systems, or end what was left out. Call after `Ladder.start`, before anything is served."""
    for disk in disks:
        skipped, regions = ladder.skipped.get(disk.index), ladder.regions[disk.index]
        if skipped is None:
            continue
        is_whole = regions.count == regions.regions
        if copy_free_space or (is_whole and not skipped.is_new):
            skipped.leave_all()
        elif is_whole:
            found = free_space(disk.read, disk.size_bytes)
            skipped.put(found.ranges)
            for reason in found.reasons:
                _log.info("disk %s is copied with its free space: %s", disk.name, reason, extra=fields(disk=disk.name))
            _log.info(
                "disk %s: %d free bytes are left out", disk.name, skipped.byte_count, extra=fields(disk=disk.name)
            )
