"""Checks a machine's log to the last byte: chain, tables, every chunk decrypted, every frame, every audit.

`LogReader` stops at the first thing that is wrong, as recovery must. Verification is to find all that is wrong, so it
walks the stripes by itself (`scan`) and goes on behind the damage: a segment's digest can be had without opening it, so
the chain holds across one that does not open; behind bytes that are no segment it looks for the next one.

Audits say what a source disk held at some sequence. Each is compared with what recovery would give there, unless order
was not known or something before it is damaged (`audits_skipped`). One that fails is a problem of the source or of the
agent, not of the log: the others are compared all the same.

Of a log that was folded, what the floor and the kept checkpoints need is checked chunk by chunk (`recovery.keeping`),
and everything from the floor on as above.

Memory is bounded by AHEAD segments and the index of the extents that still count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from recovery.chunks import ChunkCache, ChunkSource, MachineLog
from recovery.extents import ExtentMap, merge
from recovery.index import Index, painted
from recovery.keeping import check_kept, floor_of
from recovery.records import Record, bytes_from, chunks_of, parse_records
from recovery.scan import Found, LogScan, Problem
from recovery.view import fill, first_error
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import segment
from replicar.formats.frame import AUDIT_DIGEST_BYTES, Flag, Kind, begins_anew
from replicar.formats.record import Disk, Gap
from replicar.log.index import open_index
from replicar.log.reader import Segment, Start

#: Segments that are opened while earlier ones are still being looked at; each takes up to 12 MiB meanwhile.
AHEAD: Final = 4
#: Problems that a report lists; the rest is only counted.
MAX_PROBLEMS: Final = 100
#: The longest stretch of a disk that one audit is compared for; an agent's are far shorter.
MAX_AUDIT_BYTES: Final = 64 << 20

#: Called after each segment with the number of segments and of sealed bytes so far.
Verified = Callable[[int, int], None]


@dataclass(slots=True)
class Report:
    """What was checked, and what is wrong."""

    machine_id: str
    segments: int = 0
    opened: int = 0  # segments whose data was checked as well
    chunks: int = 0
    frames: int = 0
    descriptors: int = 0
    sealed_bytes: int = 0
    raw_bytes: int = 0
    first_sequence: int = 0
    last_sequence: int = 0
    last_number: int = 0
    stored_number: int = 0
    audits: int = 0
    audits_failed: int = 0
    audits_skipped: int = 0
    kept_points: int = 0  # of a log that was folded; their chunks are counted once each
    kept_chunks: int = 0
    note: str = ""
    problem_count: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return self.problem_count == 0

    def add(self, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sound": self.is_sound}


@dataclass(frozen=True, slots=True)
class _Opened:
    """A segment after a thread has opened it: its table and records as far as they are sound, and what is not."""

    found: Found
    table: segment.SegmentTable | None
    records: list[Record] | None
    problems: tuple[Problem, ...]


async def verify(
    log: MachineLog,
    *,
    stored_number: int = 0,
    stored_digest: bytes | None = None,
    verified: Verified | None = None,
) -> Report:
    """Check everything; problems are in the report, not raised.

    Args:
        stored_number: the segment that was reported as stored last (0 if nobody knows); the log must reach it.
        stored_digest: its digest.

    Raises:
        PermanentError: container or credentials are not usable, or there is no log of this machine.
        TransientError: storage is away.
    """
    checker = _Checker(log, stored_number, stored_digest, verified)
    try:
        await checker.run()
    except BaseExceptionGroup as failed:
        raise first_error(failed) from None
    return checker.report


def nothing_there(log: MachineLog) -> PermanentError:
    """There is no log of this machine."""
    return PermanentError(
        f"there is nothing in storage of machine {log.machine_id}",
        hint="check container and machine; if protection was just enabled, wait for the first segment",
        machine_id=str(log.machine_id),
    )


class _Checker:
    def __init__(
        self, log: MachineLog, stored_number: int, stored_digest: bytes | None, verified: Verified | None
    ) -> None:
        self.report = Report(str(log.machine_id), stored_number=stored_number)
        self._log = log
        self._stored_digest = stored_digest
        self._verified = verified
        self._index: Index | None = Index(log)  # None once something is damaged
        self._cache = ChunkCache(ChunkSource(log))

    async def run(self) -> None:
        start = await self._begin()
        scan = LogScan(
            self._log.store, self._log.machine_id, stored_number=self.report.stored_number, start=start or Start()
        )
        queue: asyncio.Queue[asyncio.Task[_Opened] | Problem | None] = asyncio.Queue(AHEAD)

        async def produce() -> None:
            async for item in scan.walk():
                if isinstance(item, Problem):
                    await queue.put(item)
                else:
                    await queue.put(group.create_task(asyncio.to_thread(self._open, item)))
            await queue.put(None)

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            while (item := await queue.get()) is not None:
                if isinstance(item, Problem):
                    self._damaged(item)
                else:
                    await self._take(await item)
        if not scan.blobs:
            raise nothing_there(self._log)
        self.report.note = scan.note

    async def _begin(self) -> Start | None:
        """Check what is kept of a log that was folded; where it goes on."""
        known = await open_index(self._log.store, self._log.machine_id, self._log.keys)
        if known.fold.floor is None:
            return None
        floor = await floor_of(self._log, known)
        report, tail = self.report, floor.start.tail
        report.first_sequence, report.last_sequence, report.last_number = tail.sequence, tail.sequence, tail.number
        report.kept_points, report.kept_chunks, problems = await check_kept(self._log, known)
        for problem in problems:
            self._damaged(problem)
        if self._index is not None:
            self._index = floor.index
        return floor.start

    def _open(self, found: Found) -> _Opened:
        """For a thread: everything about a segment that needs no other."""
        header, problems = found.header, list[Problem]()
        key = self._log.key(header.key_id)
        try:
            sealed = found.data[header.table_offset : header.table_offset + header.table_bytes]
            table = segment.open_table(header, sealed, key)
        except CorruptionError as error:
            return _Opened(found, None, None, (found.problem(error.message),))
        edges = table.chunk_offsets.tolist()
        chunks: dict[int, bytes] = {}
        for index in range(header.chunk_count):
            try:
                chunks[index] = segment.open_chunk(table, index, found.data[edges[index] : edges[index + 1]], key)
            except CorruptionError as error:
                problems.append(found.problem(error.message, at=edges[index]))
        records: list[Record] | None = None
        if not problems:
            try:
                segment.check_run(table, b"".join(chunks.values()))
                records = parse_records(table, chunks)
            except CorruptionError as error:
                problems.append(found.problem(error.message))
        return _Opened(found, table, records, tuple(problems))

    async def _take(self, opened: _Opened) -> None:
        """In the log's order: what a segment says in the light of those before it."""
        report, header, table = self.report, opened.found.header, opened.table
        position = header.position
        for problem in opened.problems:
            self._damaged(problem)
        if position.number == report.stored_number and self._stored_digest not in (None, opened.found.digest):
            text = f"segment {position.number} is not the one that was reported as stored: an older state was put back"
            self._damaged(opened.found.problem(text))
        follows = position.first_sequence == report.last_sequence + 1
        jumps = position.first_sequence > report.last_sequence and (table is None or begins_anew(table.descriptors))
        is_next = position.number == report.last_number + 1
        if report.segments and is_next and not follows and not jumps:
            text = f"segment {position.number} begins with sequence {position.first_sequence}"
            self._damaged(opened.found.problem(f"{text}, where {report.last_sequence + 1} should follow"))
        await self._follow(opened)
        report.segments += 1
        report.opened += table is not None
        report.sealed_bytes += header.total_bytes
        report.raw_bytes += header.raw_bytes
        report.first_sequence = report.first_sequence or position.first_sequence
        report.last_sequence, report.last_number = position.last_sequence, position.number
        if table is not None:
            report.chunks += header.chunk_count
            report.frames += len(table.frame_headers)
            report.descriptors += len(table.descriptors)
        if self._verified is not None:
            self._verified(report.segments, report.sealed_bytes)

    def _damaged(self, problem: Problem) -> None:
        self.report.add(problem)
        self._index = None

    async def _follow(self, opened: _Opened) -> None:
        table = opened.table
        if table is None:
            return
        rows = np.flatnonzero(table.descriptors["kind"] == Kind.AUDIT).tolist()
        if self._index is None or opened.records is None:
            self.report.audits_skipped += len(rows)
            return
        found = Segment(table, opened.found.blob, opened.found.offset)
        unordered = _unordered(opened.records, len(table.descriptors), in_gap=self._index.history.open_gap is not None)
        for row in rows:
            if unordered[row] or int(table.descriptors[row]["length"]) > MAX_AUDIT_BYTES:
                self.report.audits_skipped += 1
                continue
            try:
                problem = await self._audit(self._index, found, row)
            except CorruptionError as error:
                self._damaged(opened.found.problem(error.message))
                return
            if problem is not None:  # the log is sound as far as it goes: what it says is not what the disk had
                self.report.audits_failed += 1
                self.report.add(problem)
        try:
            self._index.apply(found, opened.records)
        except CorruptionError as error:
            self._damaged(opened.found.problem(error.message))

    async def _audit(self, index: Index, found: Segment, row: int) -> Problem | None:
        """Compare one AUDIT with the disk as it is recovered at that sequence.

        Raises:
            CorruptionError: what recovery needs for it can't be opened.
        """
        entry, places = found.table.descriptors[row], found.table.payload_places()
        disk, offset, length = int(entry["disk"]), int(entry["offset"]), int(entry["length"])
        extents = await index.lookup(disk, offset, length)
        for painted_disk, columns in painted(found, places, 0, row):
            if painted_disk == disk:
                extents = merge(extents, ExtentMap.from_table(*columns).lookup(offset, length))
        out = bytearray(length)
        place, size = int(places[row]), AUDIT_DIGEST_BYTES
        named = [number for number in np.unique(extents.data().segment).tolist() if number != found.number]
        segments = {found.number: found, **await index.segments.load(named)}
        await fill(self._cache, segments, extents, offset, out)
        chunks = await self._cache.get(found, list(chunks_of(found.table, place, size)))
        self.report.audits += 1
        if xxhash.xxh3_128_digest(out) == bytes_from(found.table, chunks, place, size):
            return None
        sequence = found.table.header.position.first_sequence + row
        known = index.history.disks.get(disk)
        name = known.name if known is not None else str(disk)
        text = f"at sequence {sequence} the source held other bytes at {offset} of disk {name} ({length} bytes)"
        return Problem(f"{text} than recovery gives", found.number, found.blob, found.offset)


def _unordered(records: list[Record], rows: int, *, in_gap: bool) -> npt.NDArray[np.bool_]:
    """By row of a segment, whether order is not known there, or a disk's size may be another than it was before."""
    if any(isinstance(item.body, Disk) for item in records):
        return np.ones(rows, np.bool_)
    found = np.full(rows, in_gap)
    for item in records:
        if isinstance(item.body, Gap):
            found[item.row :] = not item.flags & Flag.GAP_END
    return found
