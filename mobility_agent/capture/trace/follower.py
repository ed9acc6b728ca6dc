"""Takes events in as they come, and knows at which disks they can be trusted.

At the start, and after a loss, a disk's events prove nothing until a moment at rest: only from one on can what was
captured be compared with what the kernel counted, and is nothing under way of which no event is known. Until then
nothing of the disk is copied. A disk that happens to be idle gives that moment by itself; a busy one has to be frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mobility_agent.capture.trace.events import EventSource
from mobility_agent.capture.trace.tracked import TrackedDisk
from replicar.clock import Clock

#: Records lost are looked for this often; it costs a few system calls.
LOST_SECONDS: Final = 0.2
#: And completions that went missing this often; what waits for one is copied a little later.
REST_LOOK_SECONDS: Final = 0.3


class Follower:
    """The disks' side of an event source. Called from one thread at a time.

    Args:
        disks: which events are for.
        source: closed by the caller.
    """

    def __init__(self, disks: Sequence[TrackedDisk], source: EventSource, clock: Clock) -> None:
        self._disks, self._source, self._clock = disks, source, clock
        self._lost = source.lost()
        self._lost_looked = self._rest_looked = clock.monotonic()
        self._devices: set[int] = set()
        #: Since when a disk waits for a moment at rest; None: none does.
        self.restless_since: float | None = None
        #: When the first change happened that is in no point yet; None: there is none. Set back by whoever makes one.
        self.changed_since_ns: int | None = None

    @property
    def is_begun(self) -> bool:
        """Whether every disk's events can be trusted."""
        return all(disk.completeness.is_begun for disk in self._disks)

    @property
    def dirty_bytes(self) -> int:
        return sum(disk.extents.dirty_bytes for disk in self._disks)

    def watch(self) -> None:
        """Watch the disks and, where needed, partitions made since."""
        for disk in self._disks:
            disk.watched = sorted(disk.numbers())
            for number in {*disk.watched} - self._devices:
                self._source.watch(number)
                self._devices.add(number)

    def drain(self) -> None:
        """Take in every event there is; now and then see whether some were lost."""
        while (events := self._source.drain()).size:
            for disk in self._disks:
                before = disk.event_count
                disk.apply(events)
                if disk.event_count != before and self.changed_since_ns is None:
                    self.changed_since_ns = self._clock.now_ns()
        if self._clock.monotonic() >= self._lost_looked + LOST_SECONDS:
            self._look_for_lost()

    def drain_all(self) -> None:
        """Take in every event there is, and notice if any was lost so far."""
        self.drain()
        self._look_for_lost()

    def look_for_rest(self) -> None:
        """Where the kernel has no write under way, forget those whose completions went missing; now and then."""
        if self._clock.monotonic() < self._rest_looked + REST_LOOK_SECONDS:
            return
        self._rest_looked = self._clock.monotonic()
        for disk in self._disks:
            if disk.extents.under_way and not disk.counters.read().in_flight:
                before = disk.event_count
                self.drain()
                if disk.event_count == before:
                    disk.at_rest()

    def begin_counting(self) -> None:
        """Begin to trust the events of every disk that happens to be at rest."""
        restless = False
        for disk in self._disks:
            if disk.completeness.is_begun:
                continue
            self.drain()
            before, count = disk.event_count, disk.counters.read()
            self.drain_all()
            if not count.in_flight and disk.event_count == before and count == disk.counters.read():
                disk.at_rest()
                disk.missing()
            else:
                restless = True
        if not restless:
            self.restless_since = None
        elif self.restless_since is None:
            self.restless_since = self._clock.monotonic()

    def _look_for_lost(self) -> None:
        self._lost_looked = self._clock.monotonic()
        lost = self._source.lost()
        if lost != self._lost:
            self._lost = lost
            for disk in self._disks:  # nobody knows whose they were
                disk.doubt()
