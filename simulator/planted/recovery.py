"""Bugs of recovery."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from recovery import extents, history
from recovery.history import NamedPoint

Names = tuple[tuple[Any, str, Any], ...]


def points_in_gaps() -> Names:
    """A mark inside a gap is offered like any other."""

    def offered(*args: Any, **options: Any) -> NamedPoint:
        return replace(NamedPoint(*args, **options), in_gap=False)

    return ((history, "NamedPoint", offered),)


def newest_write_loses() -> Names:
    """Where writes of one segment overlap, the earlier one is recovered."""

    def first_painter(left: Any, right: Any, cells: int) -> Any:
        owner = np.full(cells, -1, np.int64)
        for painter in range(len(left) - 1, -1, -1):
            owner[left[painter] : right[painter]] = painter
        return owner

    return ((extents, "_last_painter", first_painter),)
