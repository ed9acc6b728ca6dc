"""What file systems would say that they do not use: a stand-in for the product's parsers, as the story says.

The world's disks have no file systems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mobility_agent.allocation.source import Read
from mobility_agent.allocation.volumes import FreeSpace
from mobility_agent.capture.disk import Disk
from simulator.story import Story

Ask: TypeAlias = Callable[[Read, int], FreeSpace]


def said_by(story: Story) -> Ask:
    """As `volumes.free_space`; which disk it is asked of it knows by whose method `read` is."""
    free = {disk.name: np.array(disk.free, np.int64).reshape(-1, 2) for disk in story.disks}

    def ask(read: Read, size: int) -> FreeSpace:
        disk: Disk = getattr(read, "__self__")  # noqa: B009 - of a bound method
        return FreeSpace(free[disk.name], ())

    return ask
