"""Audits: the source disk read again, chunk after chunk, and what it held put into the stream as a hash at its place.

The stream says what was written; an AUDIT says what the disk has. Recovery that gives other bytes at that sequence is
proof that something is wrong, whatever it was: a write that went past the agent, a disk that lies, a fault in the agent
itself. `replicar verify` compares them all.

A chunk is read past the page cache, on another thread, under a watch: if it was written meanwhile it is read again, so
the hash is that of the disk right before the AUDIT's sequence. A chunk that is written all the time is read in smaller
pieces; a piece that never holds still is left out of the round and counted, and so is one with free space that is not
copied.
Inside a gap nothing is audited, since nothing there could be compared; while the change log is more than half full
audits wait, as all background reading does.

Where writes are learned of later than they happen, audits are told at points (`capture.trace.audits`), and where disks
are read in passes anyway, by a pass that a point rests on (`capture.scan.audits`).

The rate is the operator's: every byte read counts, those read again too. The position survives the process, at most
`SAVE_SECONDS` behind.

Weak: an idle machine's stream is not silent while it is audited, at 112 bytes a chunk. A read that the disk's own cache
answers proves the cache.
"""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import xxhash

from mobility_agent.capture.disk import Disk
from mobility_agent.ladder import Ladder
from replicar.clock import Clock
from replicar.control.files import PUBLIC_MODE, read_file, write_file
from replicar.control.messages import AuditReport
from replicar.errors import PermanentError
from replicar.observe.logs import fields

#: One read, one AUDIT.
CHUNK_BYTES: Final = 1 << 20
#: What a chunk is divided into that is written while it is read, or of which something is left out.
PIECE_BYTES: Final = 64 << 10
#: How often a chunk or piece that is written while it is read is tried.
_TRIES: Final = 4
#: How often to look whether audits can go on when they can't.
IDLE_SECONDS: Final = 0.5
#: Audits wait while the log holds more than this share of its limit.
_BUSY_SHARE: Final = 0.5
SAVE_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over all disks. `skipped_bytes` were written too often, could not be read, or are left out."""

    began_ns: int
    ended_ns: int
    skipped_bytes: int


class Auditor:
    """Walks every disk, round after round.

    Args:
        path: where the position is remembered; a file that can't be read means a new round.
        bytes_per_second: what may be read, above 0.
    """

    def __init__(self, ladder: Ladder, clock: Clock, path: Path, *, bytes_per_second: int) -> None:
        self._ladder = ladder
        self._clock = clock
        self._path = path
        self._rate = bytes_per_second
        self._buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))  # page-aligned, as direct reads want it
        self._due = self._save_due = 0.0
        self._disk, self._offset = 0, 0  # where to go on: the disk's index, and its byte
        self._began_ns = self._skipped = 0  # of the round that is under way
        self.last_round: Round | None = None
        self.audits = 0
        self._load()

    @property
    def report(self) -> AuditReport:
        """How far the round is, and when the last whole one was."""
        disks, last = self._disks(), self.last_round
        passed = sum(disk.size_bytes for disk in disks if disk.index < self._disk)
        return AuditReport(
            bytes_per_second=self._rate,
            done_bytes=passed + self._offset,
            total_bytes=sum(disk.size_bytes for disk in disks),
            skipped_bytes=self._skipped,
            last_began_ns=last.began_ns if last is not None else None,
            last_ended_ns=last.ended_ns if last is not None else None,
            last_skipped_bytes=last.skipped_bytes if last is not None else 0,
        )

    async def run(self) -> None:
        """Audit for ever; cancel to stop."""
        try:
            while True:
                if not self._can_go_on():
                    await self._clock.sleep(IDLE_SECONDS)
                elif await self.step():
                    await self._save()
        finally:
            self._write()

    async def step(self) -> bool:
        """Audit the next chunk, or say that it can't be; False if the round waits at it (a gap, no room in the log)."""
        disk = self._next_disk()
        if disk is None:
            self._end_round()
            return True
        if not self._began_ns:
            self._began_ns = self._clock.now_ns()
        length = min(CHUNK_BYTES, disk.size_bytes - self._offset)
        if self._ladder.is_left_out(disk.index, self._offset, length, whole=True):
            self._skipped += length
            self._offset += length
            await self._clock.sleep(0)  # there may be much in a row, and the disk's clients come in between
            return True
        in_part = self._ladder.is_left_out(disk.index, self._offset, length)
        if in_part:
            await self._clock.sleep(0)  # likewise
        done = False if in_part else await self._audit(disk, self._offset, length)
        if done is False:
            done = await self._audit_pieces(disk, self._offset, length)
        if done is None:
            return False
        self._offset += length
        return True

    # --- inside ---

    async def _audit_pieces(self, disk: Disk, offset: int, length: int) -> bool | None:
        for start in range(offset, offset + length, PIECE_BYTES):
            piece = min(PIECE_BYTES, offset + length - start)
            left_out = self._ladder.is_left_out(disk.index, start, piece)
            done = False if left_out else await self._audit(disk, start, piece)
            if done is None:
                return None
            if not done:
                self._skipped += piece
        return True

    async def _audit(self, disk: Disk, offset: int, length: int) -> bool | None:
        """True: it is in the stream. False: it can't be read, or never held still. None: not now."""
        with disk.watch(offset, offset + length) as watch:
            for _ in range(_TRIES):
                await self._pace(length)
                if not self._can_go_on():
                    return None
                watch.hit = False
                try:
                    digest = await asyncio.to_thread(self._digest, disk, offset, length)
                except OSError as error:
                    _log.warning(
                        "disk %s can't be read for its audit at %d: %s",
                        disk.name,
                        offset,
                        error,
                        extra=fields(disk=disk.name, offset=offset),
                    )
                    return False
                # From here to the end of the append nothing else runs: the hash is the disk's at its place.
                if watch.hit:
                    continue
                if not self._can_go_on() or self._ladder.log.append_audit(disk.index, offset, length, digest) is None:
                    return None
                self.audits += 1
                return True
        return False

    def _digest(self, disk: Disk, offset: int, length: int) -> bytes:
        target = self._buffer[:length]
        disk.read_direct(offset, target)
        return xxhash.xxh3_128_digest(target)

    def _can_go_on(self) -> bool:
        return self._ladder.log.ordered and not self._ladder.in_gap and not self._log_is_busy()

    def _log_is_busy(self) -> bool:
        log = self._ladder.log
        return log.used_bytes > log.limit_bytes * _BUSY_SHARE

    async def _pace(self, length: int) -> None:
        """Wait until `length` bytes may be read; what was not read in time is not made up for."""
        now = self._clock.monotonic()
        self._due = max(self._due, now) + length / self._rate
        if self._due > now:
            await self._clock.sleep(self._due - now)

    def _disks(self) -> Sequence[Disk]:
        return sorted(self._ladder.disks.values(), key=lambda disk: disk.index)

    def _next_disk(self) -> Disk | None:
        """The disk to go on with, `_offset` within it; None at the end of a round."""
        for disk in self._disks():
            if disk.index < self._disk:
                continue
            if disk.index > self._disk:
                self._disk, self._offset = disk.index, 0
            if self._offset < disk.size_bytes:
                return disk
            self._disk, self._offset = disk.index + 1, 0
        return None

    def _end_round(self) -> None:
        if self._began_ns:
            self.last_round = Round(self._began_ns, self._clock.now_ns(), self._skipped)
            if self._skipped:
                _log.info("an audit round passed over %d bytes: free space, or what never held still", self._skipped)
        self._disk = self._offset = self._began_ns = self._skipped = 0
        self._save_due = 0.0

    # --- the position, over restarts ---

    async def _save(self) -> None:
        now = self._clock.monotonic()
        if now >= self._save_due:
            self._save_due = now + SAVE_SECONDS
            await asyncio.to_thread(self._write)

    def _position(self) -> dict[str, Any]:
        """Where to go on."""
        return {"disk": self._disk, "offset": self._offset, "began_ns": self._began_ns, "skipped": self._skipped}

    def _write(self) -> None:
        last = asdict(self.last_round) if self.last_round is not None else None
        try:
            write_file(self._path, json.dumps({**self._position(), "last_round": last}).encode(), mode=PUBLIC_MODE)
        except PermanentError as error:  # a full disk; a restart then repeats what was audited since
            _log.warning("the audits' position is not remembered now: %s", error)

    def _load(self) -> None:
        if not self._path.exists():
            return
        try:
            fields: dict[str, Any] = json.loads(read_file(self._path, what="the audits' position"))
            disk, offset = int(fields["disk"]), int(fields["offset"])
            began_ns, skipped, last = int(fields["began_ns"]), int(fields["skipped"]), fields["last_round"]
            if disk < 0 or offset < 0 or offset % PIECE_BYTES:
                raise ValueError("no position")
            if last is not None:
                last = Round(int(last["began_ns"]), int(last["ended_ns"]), int(last["skipped_bytes"]))
        except (PermanentError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("the audits' position in %s can't be read, a new round begins: %s", self._path, error)
            return
        self._disk, self._offset, self._began_ns, self._skipped = disk, offset, began_ns, skipped
        self.last_round = last
