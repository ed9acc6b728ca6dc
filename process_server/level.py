"""How hard to compress just now: harder while the link is the narrow place and processors have nothing else to do.

Two things say so. The hours' bandwidth says beforehand how wide the link is; below what a core can bring forth at a
higher level, that level costs time which nobody waits for. And what was measured (`load`) says it of a link of which
nobody said anything: while storing is held up by it, the level goes up a rung at a time, as far as the idle processors
carry it with some to spare, and comes down again when they are needed or when the link holds nothing up any more.

    held up by the link, idle processors enough for the next rung, two looks in a row   -> a rung up
    processors busy                                                                     -> a rung down at once
    hardly held up any more, two looks in a row                                         -> a rung down
    anything else                                                                       -> as it is

So a level changes at most once in a look, and not at all while things are in between; a rung that proves too much for
the link's own good (sealing becomes the slower one, so that nothing is held up) is left again.

Pure: numbers in, a level out. Weak: what a rung costs was measured on one processor and one mixture of data; on others
the answer is later by a look or two, since busy processors take it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from process_server.load import Load

#: Upload rates in bytes a second below which a core keeps up at such a level; a machine has other things to do as well.
LEVELS: Final = ((8 << 20, 6), (32 << 20, 3))
#: Levels worth their name, and cpu seconds for each GB at them (zstd, half text and half noise; level 1 takes 1.7).
RUNGS: Final = ((3, 2.3), (5, 5.0), (7, 7.2), (9, 9.0))
FIRST_COST: Final = 1.7
#: Held up for this share of the time, the link is the narrow place; for less than that one, it is not any more.
NARROW: Final = 0.5
WIDE: Final = 0.1
#: Of the idle processors, what a rung may take; and so few of them left are none.
SPARE: Final = 0.5
BUSY_CORES: Final = 0.2
#: Looks that have to agree before anything is changed but by need.
PATIENCE: Final = 2
LOOK_SECONDS: Final = 1.0


def level_for(configured: int, rate: int | None) -> int:
    """The level to use while `rate` bytes a second may be uploaded (None for no limit); never below `configured`.

    A configured 0 stays 0: whoever wants nothing compressed has a reason.
    """
    if rate is None or configured == 0:
        return configured
    return next((max(configured, level) for below, level in LEVELS if rate < below), configured)


@dataclass(frozen=True, slots=True)
class Drive:
    """Where the level stands: on which rung (0 for none), and how many looks in a row wanted it higher (or, below 0,
    lower)."""

    rung: int = 0
    streak: int = 0

    def level(self, configured: int, rate: int | None) -> int:
        """The level to use; never below what the settings and the hours' bandwidth make it."""
        least = level_for(configured, rate)
        return max(least, RUNGS[self.rung - 1][0]) if self.rung and configured else least

    def after(self, load: Load) -> Drive:
        """Where it stands after one more look."""
        if load.idle_cores < BUSY_CORES:
            return Drive(max(0, self.rung - 1))
        if load.held_up >= NARROW and self._carries(load):
            streak = max(0, self.streak) + 1
            return Drive(self.rung + 1) if streak >= PATIENCE else Drive(self.rung, streak)
        if load.held_up < WIDE and self.rung:
            streak = min(0, self.streak) - 1
            return Drive(self.rung - 1) if streak <= -PATIENCE else Drive(self.rung, streak)
        return Drive(self.rung)

    def _carries(self, load: Load) -> bool:
        """Whether the idle processors take the next rung, at what comes now."""
        if self.rung == len(RUNGS):
            return False
        now = RUNGS[self.rung - 1][1] if self.rung else FIRST_COST
        return load.bytes_per_second * (RUNGS[self.rung][1] - now) / 1e9 <= SPARE * load.idle_cores
