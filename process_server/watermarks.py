"""How full the cache may get, who may fill it how far, and what that is called: pure, numbers in, numbers out.

Three watermarks, as shares of the cache that are free: below 30 % a warning, below 25 % it is critical, and below 20 %
receiving is throttled: what is left is for machines that hold next to nothing, so that each of them goes on.

Above that a machine may hold slots in proportion to what is still free: at most `GENEROSITY` times as many, times its
weight. So one machine alone gets four fifths of what may be had, two get four ninths each, and there is always room for
a newcomer; nobody has to know who is active. (Dynamic thresholds, as switches share their packet memory: Choudhury and
Hahne, IEEE/ACM Transactions on Networking 6(2), 1998.) Shares shrink by themselves when others come, since what a
machine holds beyond its share is stored and not replaced.

Weak: nothing is taken back. A machine that filled its share while it was alone keeps it until storage has it.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Final

WARNING_SHARE: Final = 0.30
CRITICAL_SHARE: Final = 0.25
THROTTLE_SHARE: Final = 0.20
#: What any machine may hold, however full the cache is: one slot to receive into and one to store from.
LEAST_SLOTS: Final = 2
#: Slots that a machine of weight 1 may hold for each that is free above the lowest watermark.
GENEROSITY: Final = 4
MAX_WEIGHT: Final = 100


class Level(StrEnum):
    """How full the cache is, in words."""

    WELL = "well"
    WARNING = "warning"
    CRITICAL = "critical"
    THROTTLED = "throttled"


def level_of(free: int, total: int) -> Level:
    """The level of a cache of which `free` of `total` (same unit, above 0) are free."""
    share = free / total
    if share < THROTTLE_SHARE:
        return Level.THROTTLED
    if share < CRITICAL_SHARE:
        return Level.CRITICAL
    return Level.WARNING if share < WARNING_SHARE else Level.WELL


def allowance(free: int, total: int, weight: int = 1) -> int:
    """How many slots a machine may hold while `free` of `total` slots are free."""
    above = free - math.ceil(THROTTLE_SHARE * total)
    return max(LEAST_SLOTS, weight * GENEROSITY * above)
