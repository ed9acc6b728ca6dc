"""Passes over volumes: all of them read from begin to end, and what the replica doesn't have is given to it.

A recovery point of volumes that nobody holds still needs two passes. Let pass A be whole before pass B begins, and let
B find nothing that the replica does not have. Every chunk c was read by A at a(c) and by B at b(c), and a(c) < T < b(c)
for every instant T between both passes, of all volumes. After A had read c the replica had what A read, since what
differed was given to it; nothing was given to it since, for B found nothing. So what c held at a(c), what it held at
b(c) and what the replica says of c are the same. Had c been something else at T, it would have been changed after a(c)
and changed back, byte for byte, before b(c). But for that, the replica is the volumes at T, all at the same T.

A chunk that is written while it is read may be read torn; then B reads something else, or what A read has come to be.

Weak: that a chunk is changed and put back between two reads can't be seen (a flag that is set and cleared). Whoever
can't live with it scans a snapshot, or quiesces what writes. A disk that is never left alone for two passes has no
points.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mobility_agent.capture.scan.volume import Volume
from replicar.clock import Clock

#: One read.
PIECE_BYTES: Final = 1 << 20


class Replica(Protocol):
    """What is known of a volume's copy."""

    async def take(self, offset: int, content: memoryview) -> int:
        """Bring the copy to `content` there; how many bytes were not known to be so."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A whole pass. `began_ns` is before its first read."""

    began_ns: int
    read_bytes: int
    changed_bytes: int


class Passes:
    """Passes over volumes that all begin and end together. One at a time.

    Args:
        volumes: with their replicas; the caller's to close.
        bytes_per_second: limit of reading; 0 for none.
    """

    def __init__(self, volumes: Sequence[tuple[Volume, Replica]], clock: Clock, *, bytes_per_second: int = 0) -> None:
        self._volumes, self._clock, self._rate = volumes, clock, bytes_per_second
        self._buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))  # page-aligned, as direct reads want it
        self._due = 0.0

    async def run(self) -> Pass:
        """Make one pass.

        Raises:
            OSError: a volume can't be read; nothing is known of the rest then.
        """
        began_ns, read, changed = self._clock.now_ns(), 0, 0
        for volume, replica in self._volumes:
            for offset in range(0, volume.size_bytes, PIECE_BYTES):
                target = self._buffer[: min(PIECE_BYTES, volume.size_bytes - offset)]
                await self._pace(len(target))
                await asyncio.to_thread(volume.read_into, offset, target)
                changed += await replica.take(offset, target)
                read += len(target)
        return Pass(began_ns, read, changed)

    async def _pace(self, length: int) -> None:
        if not self._rate:
            return
        now = self._clock.monotonic()
        self._due = max(self._due, now) + length / self._rate
        if self._due > now:
            await self._clock.sleep(self._due - now)
