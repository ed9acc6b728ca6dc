"""How large, how fast and how long the demo is. The defaults take about a minute on two cores; tests take less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1 << 20
KIB: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes, rates in bytes a second, times in seconds.

    The disk is, on purpose, no whole number of MiB: a VHD must be, so filling up is shown as well. Of the database's
    files the last is its log, the others are its tables.
    """

    disk_bytes: int = 256 * MIB - 36 * KIB
    files_bytes: int = 80 * MIB
    database_bytes: tuple[int, ...] = (12 * MIB, 6 * MIB, 6 * MIB)
    churn_bytes_per_second: float = 5e6
    depth: int = 8
    seed: int = 2026
    #: Writes go on this long after each of: the end of initial replication, the mark, the chosen instant, the restart.
    phase_seconds: float = 2.0
    #: How long the process server stays dead.
    outage_seconds: float = 1.5
    initial_replication_seconds: float = 90.0
