"""The process server's own measurements over 15 minutes, for `replicar.signals`: a bounded ring of samples.

Processor and memory are the host's, as the kernel counts them (/proc/stat, /proc/meminfo), since a neighbour that takes
them starves this server just as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.signals import WINDOW_SECONDS, Sample, Signal, of_server

SAMPLE_SECONDS: Final = 5.0
MAX_SAMPLES: Final = int(WINDOW_SECONDS / SAMPLE_SECONDS)


@dataclass(frozen=True, slots=True)
class Host:
    """Ticks of all processors since the start, those that were busy, and the share of memory in use."""

    ticks: int = 0
    busy_ticks: int = 0
    memory_share: float = 0.0


def read_host(proc: Path = Path("/proc")) -> Host:
    """The host as it is now; zeros for what the kernel does not say, as in some containers."""
    try:
        ticks = [int(word) for word in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        memory = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        total, available = (int(memory[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError, IndexError):
        return Host()
    idle = sum(ticks[3:5])  # waiting for disks included
    return Host(sum(ticks), sum(ticks) - idle, 1 - available / total if total else 0.0)


class Vitals:
    """Takes samples, at most one in `SAMPLE_SECONDS`, and judges them.

    Args:
        host: reads the host.
    """

    def __init__(self, host: Callable[[], Host] = read_host) -> None:
        self._host = host
        self._before: Host | None = None
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def sample(self, at_seconds: float, pending_bytes: int, stored_bytes: int) -> None:
        """Look, if it is time to."""
        if self._samples and at_seconds - self._samples[-1].at_seconds < SAMPLE_SECONDS:
            return
        host, before = self._host(), self._before or Host()
        passed = host.ticks - before.ticks
        busy = (host.busy_ticks - before.busy_ticks) / passed if passed > 0 else 0.0
        self._before = host
        self._samples.append(Sample(at_seconds, busy, host.memory_share, pending_bytes, stored_bytes))

    def signals(self, cache_free: int, cache_total: int) -> tuple[Signal, ...]:
        """How things are."""
        return of_server(tuple(self._samples), cache_free, cache_total)
