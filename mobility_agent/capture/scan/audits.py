"""Audits of disks that are read in passes: what the pass that a point rests on has read, told at that point.

That pass found nothing that the stream did not say, so its content is the disks' at the point (see `passes`). Of all
that it reads a part is hashed for the stream, going on where the last point's part ended: as much as the operator's
rate gives for the time since. No byte is read for it.

Weak: a machine without points has no audits, and a time that gives more than `MAX_HELD` pieces is not made up for.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Final

import xxhash

from mobility_agent.auditing import CHUNK_BYTES, SAVE_SECONDS, Auditor
from mobility_agent.ladder import Ladder
from replicar.clock import Clock

#: Pieces hashed in one pass: 4 GiB of disk, and half a megabyte of AUDITs.
MAX_HELD: Final = 4096


class PassAuditor(Auditor):
    """See the module; the round and its memory are `Auditor`'s."""

    def __init__(self, ladder: Ladder, clock: Clock, path: Path, *, bytes_per_second: int) -> None:
        super().__init__(ladder, clock, path, bytes_per_second=bytes_per_second)
        self._held: deque[tuple[int, int, int, bytes]] = deque()  # disk, offset, length, digest
        self._room = 0.0
        self._from = clock.monotonic()  # what the rate gives since then may be told

    async def run(self) -> None:
        """Keep the position; the audits are made by passes, and told at points."""
        try:
            while True:
                await self._clock.sleep(SAVE_SECONDS)
                await self._save()
        finally:
            self._write()

    def begin(self) -> None:
        """A pass begins that a point may rest on."""
        self._held.clear()
        now = self._clock.monotonic()
        self._from = max(self._from, now - MAX_HELD * CHUNK_BYTES / self._rate)
        self._room = (now - self._from) * self._rate

    def saw(self, disk: int, offset: int, content: memoryview) -> None:
        """The pass has read this, on another thread, which the event loop waits for. Pieces come in order."""
        if self._room > 0 and (disk, offset) >= (self._disk, self._offset) and len(self._held) < MAX_HELD:
            self._held.append((disk, offset, len(content), xxhash.xxh3_128_digest(content)))
            self._room -= len(content)

    def tell(self) -> None:
        """The pass found nothing new, and this is its point: put the AUDITs into the stream."""
        self._began_ns = self._began_ns or self._clock.now_ns()
        while self._held:
            disk, offset, length, digest = self._held[0]
            if self._ladder.log.append_audit(disk, offset, length, digest) is None:
                break
            self.audits += 1
            self._disk, self._offset = disk, offset + length
            self._from += length / self._rate
            self._held.popleft()
        if self._next_disk() is None:
            self._end_round()
