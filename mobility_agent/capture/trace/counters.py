"""What the kernel itself counts of a disk's writes: the proof that capture saw them all.

`/sys/block/X/stat` counts sectors as requests complete, independently of any event. Between two moments at which the
disk is at rest (no write is under way, and none began while that was looked at), the sectors it counted as written and
discarded must be those that were captured. Fields and units: the kernel's Documentation/block/stat.rst.

Weak: equal sums are no proof that no two errors cancelled out; they are independent counts of tens of millions of
sectors, and so far every loss that was provoked was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

_WRITE_SECTORS: Final = 6
_IN_FLIGHT: Final = 8
_DISCARD_SECTORS: Final = 13


@dataclass(frozen=True, slots=True)
class Count:
    """A reading: sectors of 512 bytes written (zeroed ones among them) and discarded, requests under way."""

    written: int
    discarded: int
    in_flight: int

    @property
    def sectors(self) -> int:
        return self.written + self.discarded


class Counters:
    """The counters of one whole disk.

    Args:
        directory: its directory in /sys/block.
    """

    def __init__(self, directory: Path) -> None:
        self._stat = directory / "stat"
        self._in_flight = directory / "inflight"

    def read(self) -> Count:
        """Raises:
        PermanentError: the disk is gone, or its kernel counts no discards (before 4.18).
        """
        try:
            values = [int(word) for word in self._stat.read_text().split()]
            writes_in_flight = int(self._in_flight.read_text().split()[1])
        except OSError as error:
            raise PermanentError(f"the counters in {self._stat} can't be read: {error.strerror}") from None
        if len(values) <= _DISCARD_SECTORS:
            raise PermanentError(f"{self._stat} counts no discards", hint="trace capture needs Linux 4.18 or later")
        return Count(values[_WRITE_SECTORS], values[_DISCARD_SECTORS], max(writes_in_flight, 0))


class Completeness:
    """Sums of what was captured against what was counted, from one moment at rest to the next."""

    def __init__(self) -> None:
        self.captured = 0
        self._baseline: int | None = None

    @property
    def is_begun(self) -> bool:
        """False: what was captured can't be judged yet, for want of a moment at rest to begin at."""
        return self._baseline is not None

    def begin(self, count: Count) -> None:
        """The disk is at rest now; count from here."""
        self._baseline, self.captured = count.sectors, 0

    def doubt(self) -> None:
        """Something was lost; begin again at the next rest."""
        self._baseline = None

    def missing(self, count: Count) -> int:
        """Sectors that the kernel counted and nobody captured; at rest it must be 0 (negative: more than it counted).

        Only after `begin`.
        """
        assert self._baseline is not None
        return count.sectors - self._baseline - self.captured
