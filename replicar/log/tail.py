"""Where a log ends for somebody who will write on: behind the last segment that is sound down to its last byte.

A walk reads tables alone. That is enough for what was acknowledged, since a segment is acknowledged when all its bytes
are in storage. But a Put Page need not be atomic: where a writer died in the middle of one, a sound table can lie
behind torn chunks. To go on behind such a segment would be to acknowledge what can never be read, when the agent still
has it. So whatever may have been under way when the last writer died is read in full and verified: at most
MAX_UNDER_WAY segments, all in the newest run (an older one was looked at before the next began), and of those only what
lies behind the last that is known to be stored; and that one itself, since the chain goes on from there.

What is unsound and was never known to be stored is where the log ends. What was known to be stored and is unsound is
damage, and nobody may write over it.

Weak: between the last report and a death segments are acknowledged that nobody knows of here. If one of those is
damaged *later*, it looks like one that was torn; its agent has trimmed it, so it is refused with a ConflictError and
nothing is lost silently.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace

from replicar.errors import CorruptionError
from replicar.formats import logblob, segment
from replicar.log.index import open_index
from replicar.log.reader import LogReader, Segment, Tail, replaced


@dataclass(frozen=True, slots=True)
class Stored:
    """A lower bound of what is in storage: segment `number` (0: nothing is known), its last sequence, its digest.

    An empty digest is one that nobody knows.
    """

    number: int = 0
    sequence: int = 0
    digest: bytes = b""


async def sound_tail(reader: LogReader, stored: Stored) -> Tail:
    """Walk the log and verify its end. `stored` beyond the end is no error here: the caller knows what that means.

    The walk begins at the newest checkpoint before the segment that is known to be stored.

    Raises:
        CorruptionError: what is known to be stored is damaged, or another segment is in its place.
        TransientError, PermanentError: storage.
    """
    suspects: deque[tuple[Tail, Segment]] = deque(maxlen=logblob.MAX_UNDER_WAY)
    index = await open_index(reader.store, reader.machine_id, reader.keys)
    start = await index.start(before=stored.number or None)
    before = start.tail
    async for found in reader.segments(after=start):
        if found.number == stored.number and stored.digest not in (b"", found.table.digest):
            raise replaced(found.number, found.blob)
        if found.number >= max(reader.newest_first, stored.number):
            suspects.append((before, found))
        before = reader.tail
    if reader.tail.damaged and reader.tail.number < stored.number:
        raise _damaged(reader.tail.number + 1, stored, reader.tail.reason)
    for before, found in suspects:
        try:
            data = await reader.read_sealed(found)
            await asyncio.to_thread(_verify, reader, found, data)
        except CorruptionError as error:
            if found.number <= stored.number:
                raise _damaged(found.number, stored, error.message) from error
            return replace(before, reason=f"what was to follow is torn: {error.message}", damaged=True)
    return reader.tail


def _verify(reader: LogReader, found: Segment, data: bytes) -> None:
    segment.check_run(found.table, reader.open_run(found, data))


def _damaged(number: int, stored: Stored, why: str) -> CorruptionError:
    return CorruptionError(
        f"segment {number} is damaged, but {stored.number} was stored: {why}",
        hint="put the log blob back as it was (soft delete, snapshot), or enrol the machine again to start anew",
        number=number,
        stored_number=stored.number,
    )
