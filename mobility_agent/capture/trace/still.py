"""The moment at which everything is held still: what is checked there, and what is read.

It runs on a thread of its own, in which the events are drained too, and waits for nothing but the disks: no log, no
logging, since those may lie on what is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from mobility_agent.capture.trace.freeze import Freeze
from mobility_agent.capture.trace.stage import Stage
from mobility_agent.capture.trace.tracked import TrackedDisk

_LOOK_SECONDS: Final = 0.0005
#: Of what is left of the budget, for the disks to come to rest.
_REST_SHARE: Final = 0.5


def hold_still(
    held: Freeze,
    disks: Sequence[TrackedDisk],
    drain: Callable[[], None],
    stage: Stage | None,
    settle: Callable[[], None],
) -> str:
    """Freeze, see that nothing moves and nothing is missing, read what is dirty into `stage`, thaw.

    Args:
        drain: takes in every event there is, and notices lost ones.
        stage: None: only begin to count; nothing is read.
        settle: called when everything is read, every event is known, and all is still frozen.

    Returns:
        Why this is no point; empty if it is one.

    Raises:
        TransientError: something can't be frozen, or a disk can't be read.
    """
    with held:
        why = _look(held, disks, drain, stage, settle)
    if not why and not held.held:
        why = "the freeze budget was over"
    return why


def _look(
    held: Freeze,
    disks: Sequence[TrackedDisk],
    drain: Callable[[], None],
    stage: Stage | None,
    settle: Callable[[], None],
) -> str:
    if held.remaining_seconds <= 0:
        return f"freezing alone took longer than {held.budget_seconds * 1000:.0f} ms"
    if not _come_to_rest(held, disks, drain):
        return "writes go on past the file systems"
    why = _account(disks)
    if why or stage is None:
        return why
    before = _moved(disks)
    for disk in disks:
        if not stage.add(disk, disk.extents.take(disk.size_bytes, at_rest=True)):
            return f"{stage.byte_count} bytes were left to copy, more than are read while frozen"
    try:
        if not stage.read(held):
            return "the freeze budget was over before everything was read"
    except OSError as error:
        return f"a disk can't be read: {error}"
    drain()
    if _moved(disks) != before:
        return "something was written while the file systems were frozen"
    settle()
    return ""


def _come_to_rest(held: Freeze, disks: Sequence[TrackedDisk], drain: Callable[[], None]) -> bool:
    """Whether, at one moment, no disk had a write under way, and every event of before is known."""
    until = time.monotonic() + held.remaining_seconds * _REST_SHARE
    while True:
        drain()
        before = _moved(disks)
        idle = not any(disk.counters.read().in_flight for disk in disks)
        drain()
        if idle and _moved(disks) == before:
            for disk in disks:
                disk.at_rest()
            return True
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_SECONDS)


def _account(disks: Sequence[TrackedDisk]) -> str:
    """Why what was captured can't be trusted; then those disks are dirty as a whole, and counted anew from here."""
    why = ""
    for disk in disks:
        began = disk.completeness.is_begun
        if words := disk.missing():
            disk.doubt()
            disk.missing()
            why = f"disk {disk.name} has to be compared in full: {words}"
        elif not began and not why:
            why = f"disk {disk.name} is followed without a break only since now"
    return why


def _moved(disks: Sequence[TrackedDisk]) -> list[tuple[int, int, int]]:
    return [(disk.event_count, disk.doubts, disk.counters.read().sectors) for disk in disks]
