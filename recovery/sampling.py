"""Verifies a share of a log at a time: the chain and every table always, the data of some segments in turn.

What a full verification costs is reading everything. Here each segment belongs, by a hash of machine and number, to one
of as many parts as the share asks for, and a *turn* takes one part: so a verification every day with a share of 5 % has
seen all of the log in 20 days, whatever was added meanwhile, and needs to remember nothing.

Of a log that was folded this is so from the floor on; what the floor and the kept states need is checked, all of it, in
the first turn.

Of every segment are checked: its place, its table's seal, and that it follows the one before. Of those in the turn's
part also: every chunk, every frame, every record. Audits are not compared: each would need data of other parts.

It stops at the first break of chain or table, as recovery does; a full `verify` goes on behind it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

import xxhash

from recovery.chunks import MachineLog
from recovery.keeping import check_kept, floor_of
from recovery.records import parse_records
from recovery.scan import Problem
from recovery.verify import Report, Verified, nothing_there
from replicar.errors import CorruptionError
from replicar.formats import segment
from replicar.log.index import open_index
from replicar.log.reader import LogReader, Segment, Start

#: Segments whose data is fetched and opened at once; each takes up to 12 MiB meanwhile.
AHEAD: Final = 4
#: The smallest share: a segment in ten thousand.
MAX_PARTS: Final = 10_000


def part_of(log: MachineLog, number: int, parts: int) -> int:
    """Which of `parts` a segment belongs to."""
    return xxhash.xxh3_64_intdigest(log.machine_id.bytes + number.to_bytes(8, "little")) % parts


async def verify_share(
    log: MachineLog,
    *,
    parts: int,
    turn: int,
    stored_number: int = 0,
    stored_digest: bytes | None = None,
    verified: Verified | None = None,
) -> Report:
    """Check chain and tables, and the data of one part of `parts`; problems are in the report, not raised.

    Args:
        turn: which part, modulo `parts`.
        stored_number, stored_digest, verified: as for `verify`.

    Raises:
        PermanentError: container or credentials are not usable, or there is no log of this machine.
        TransientError: storage is away.
    """
    report = Report(str(log.machine_id), stored_number=stored_number)
    reader = LogReader(log.store, log.machine_id, log.keys)
    opening: deque[tuple[Segment, asyncio.Task[None]]] = deque()

    async def settle(most: int) -> None:
        while len(opening) > most:
            found, task = opening[0]
            try:
                await task
            except CorruptionError as error:
                report.add(Problem(error.message, found.number, found.blob, found.offset))
            opening.popleft()

    start: Start | None = None
    try:
        start = await _begin(log, report, checks_kept=turn % parts == 0)
        async for found in reader.segments(after=start, stored_number=stored_number, stored_digest=stored_digest):
            _count(report, found)
            if part_of(log, found.number, parts) == turn % parts:
                report.opened += 1
                report.chunks += found.table.header.chunk_count
                opening.append((found, asyncio.create_task(_open(log, reader, found))))
                await settle(AHEAD - 1)
            if verified is not None:
                verified(report.segments, report.sealed_bytes)
        await settle(0)
    except CorruptionError as error:
        await settle(0)
        report.add(Problem(error.message, error.fields.get("number"), error.fields.get("blob")))
    finally:
        for _, task in opening:
            task.cancel()
        await asyncio.gather(*(task for _, task in opening), return_exceptions=True)
    if not report.segments and report.is_sound and start is None:
        raise nothing_there(log)
    if report.is_sound and reader.tail.damaged:
        report.note = f"behind segment {reader.tail.number}: {reader.tail.reason}"
    return report


async def _begin(log: MachineLog, report: Report, *, checks_kept: bool) -> Start | None:
    """Where a log that was folded goes on; None for one that was not.

    Raises:
        CorruptionError: its floor is damaged.
    """
    known = await open_index(log.store, log.machine_id, log.keys)
    if known.fold.floor is None:
        return None
    start = (await floor_of(log, known)).start
    report.first_sequence, report.last_sequence = start.tail.sequence, start.tail.sequence
    report.last_number = start.tail.number
    if checks_kept:
        report.kept_points, report.kept_chunks, problems = await check_kept(log, known)
        for problem in problems:
            report.add(problem)
    return start


def _count(report: Report, found: Segment) -> None:
    header = found.table.header
    report.segments += 1
    report.sealed_bytes += header.total_bytes
    report.raw_bytes += header.raw_bytes
    report.frames += len(found.table.frame_headers)
    report.descriptors += len(found.table.descriptors)
    report.first_sequence = report.first_sequence or header.position.first_sequence
    report.last_sequence, report.last_number = header.position.last_sequence, found.number


async def _open(log: MachineLog, reader: LogReader, found: Segment) -> None:
    """Everything about a segment's data that needs no other segment."""
    data = await reader.read_sealed(found)

    def check() -> None:
        table, key = found.table, log.key(found.table.header.key_id)
        edges, sealed = table.chunk_offsets.tolist(), memoryview(data)
        chunks = {
            index: segment.open_chunk(table, index, sealed[edges[index] : edges[index + 1]], key)
            for index in range(table.header.chunk_count)
        }
        segment.check_run(table, b"".join(chunks.values()))
        parse_records(table, chunks)

    await asyncio.to_thread(check)
