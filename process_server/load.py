"""What holds storing up, as the choice of a compression level needs to know it: a processor, the link, or nothing.

Storing is *held up* while somebody waits (for a turn at the gate, or for an upload to end) and nothing is being sealed:
then all that is under way is on the link, and no processor of ours could make it faster. The share of time that this
takes tells a narrow link from a busy processor without anybody's having said how wide the link is. A service that
answers slowly, and a schedule that lets little through, look the same, and ask for the same.

Weak: a disk that gives slots back slowly looks like sealing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from process_server.vitals import Host


@dataclass(frozen=True, slots=True)
class Load:
    """How it was between two looks.

    `held_up`: the share of time; `idle_cores`: processors that nobody used, whoever might have; `bytes_per_second`: of
    what was sealed, before compression.
    """

    held_up: float
    idle_cores: float
    bytes_per_second: float


class Meter:
    """Counts, where things happen; `look` says what came of it.

    Args:
        now: monotonic seconds.
        cores: processors of this host.
    """

    def __init__(self, now: Callable[[], float], cores: int) -> None:
        self._now, self._cores = now, cores
        self._sealing = self._waiting = self._bytes = 0
        self._held_up = 0.0
        self._since = self._looked = now()
        self._host: Host | None = None

    @contextmanager
    def sealing(self, raw_bytes: int) -> Iterator[None]:
        """So many bytes are being sealed."""
        self._turn(sealing=1)
        try:
            yield
        finally:
            self._bytes += raw_bytes
            self._turn(sealing=-1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Somebody waits for its turn, or for an upload to end."""
        self._turn(waiting=1)
        try:
            yield
        finally:
            self._turn(waiting=-1)

    def look(self, host: Host) -> Load | None:
        """Since the last look; None at the first one, and where the kernel does not count processors' time."""
        self._turn()
        before, self._host = self._host, host
        passed, held_up, count = self._since - self._looked, self._held_up, self._bytes
        self._looked, self._held_up, self._bytes = self._since, 0.0, 0
        if before is None or passed <= 0 or host.ticks <= before.ticks:
            return None
        busy = (host.busy_ticks - before.busy_ticks) / (host.ticks - before.ticks)
        return Load(held_up / passed, self._cores * max(0.0, 1 - busy), count / passed)

    def _turn(self, *, sealing: int = 0, waiting: int = 0) -> None:
        now = self._now()
        if self._waiting and not self._sealing:
            self._held_up += now - self._since
        self._since = now
        self._sealing += sealing
        self._waiting += waiting
