"""Makes checkpoints of a log as it grows, so that any point of it opens at once however long it is.

Each run goes on from the newest checkpoint: it reads the tables behind it and makes another one for every
CHECKPOINT_SEGMENTS of them. What is written is a tier (the extents that changed, merged with the small tiers before,
see `tierwriter`) and the checkpoint that names it, in this order; so a run that dies leaves a tier that nobody names,
which folding removes, and the next one does the work again. Two at work at once make the same thing twice, which costs
space until the next fold: whichever of two equal checkpoints is used, the bytes are the same.

A fold that somebody makes meanwhile gives up what this run may stand on, and frees it ten minutes later (`folding`).
So before a checkpoint is written, and when something is not there, it is seen whether the fold is still the one by
which the run began; if not, the run ends, and the next goes on from the last checkpoint.

Only what can't be replaced any more is indexed: what was reported as stored, or was verified to its last byte.

Memory: CHECKPOINT_SEGMENTS tables, and a slice of a merge.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from recovery.blobwriter import Author, BlobWriter
from recovery.checkpoint import checkpoint_fields
from recovery.chunks import ChunkSource, MachineLog
from recovery.index import Index
from recovery.points import base_of
from recovery.records import read_records
from recovery.requests import Latest
from recovery.tiers import read_tier
from recovery.tierwriter import to_merge, write_tier
from replicar.clock import Clock
from replicar.errors import CorruptionError, FencedError, PermanentError
from replicar.formats.indexblob import BlobKind, IndexHeader, IndexName
from replicar.log.index import Fold, LogIndex, open_index, open_root
from replicar.log.reader import LogReader, Start
from replicar.log.tail import Stored, sound_tail

#: Segments between two checkpoints: what opening a point has to read at most, one or two requests each.
CHECKPOINT_SEGMENTS: Final = 32


@dataclass(slots=True)
class Indexed:
    """What a run made, and how far the index reaches: `segment` of the log, which ends at `tail`."""

    checkpoints: list[str] = field(default_factory=list)
    written_bytes: int = 0
    segments: int = 0
    segment: int = 0
    sequence: int = 0
    tail: int = 0


async def make_index(
    log: MachineLog,
    *,
    clock: Clock,
    random: Callable[[int], bytes],
    stored: Stored = Stored(),  # noqa: B008 - a value that nobody can change
    every: int = CHECKPOINT_SEGMENTS,
    made: Callable[[int, int], None] | None = None,
) -> Indexed:
    """Bring a machine's index up to date, but for the last few segments.

    Args:
        stored: the segment that was reported as stored last.
        made: told after every segment how far it is, and how far there is to go.

    Raises:
        FencedError: somebody else folded it meanwhile.
        PermanentError: there is no log of this machine.
        CorruptionError: the log is damaged.
    """
    author = await Author.of(log, clock, random)
    known = await open_index(log.store, log.machine_id, log.keys)
    try:
        return await _go_on(author, known, stored, every, made or _ignore)
    except (CorruptionError, PermanentError):  # what it stands on is not there, or what it was about to write
        await _check_unfolded(log, known.fold)
        raise


async def _go_on(
    author: Author, known: LogIndex, stored: Stored, every: int, made: Callable[[int, int], None]
) -> Indexed:
    """From the newest checkpoint to the last segment that may be indexed."""
    log = author.log
    base = await base_of(known, Latest())
    index = await Index.on(log, base) if base is not None else Index(log)
    result = Indexed(segment=base.number if base else 0, sequence=base.place.sequence if base else 0)
    result.tail = (await sound_tail(LogReader(log.store, log.machine_id, log.keys), stored)).number
    reader, source = LogReader(log.store, log.machine_id, log.keys), ChunkSource(log)
    async for found in reader.segments(after=base.start if base is not None else None):
        if found.number > result.tail:
            break
        index.apply(found, await read_records(source, found))
        result.segments += 1
        if index.fresh_segments >= every:
            trim(index, known.fold)
            check = partial(_check_unfolded, log, known.fold)
            name, written = await write_checkpoint(author, index, reader.place, check)
            result.checkpoints.append(str(name))
            result.written_bytes += written
            result.segment, result.sequence = reader.tail.number, reader.tail.sequence
        made(found.number, result.tail)
    return result


async def _check_unfolded(log: MachineLog, fold: Fold) -> None:
    """Raises FencedError if somebody made a newer fold."""
    now = (await open_index(log.store, log.machine_id, log.keys)).fold
    if now.generation != fold.generation:
        raise FencedError(
            f"somebody else made fold {now.generation} of the log of machine {log.machine_id} while it was indexed",
            hint="nothing to do; the next run goes on from the last checkpoint",
            generation=now.generation,
        )


def _ignore(done: int, total: int) -> None:
    return None


async def write_checkpoint(
    author: Author, index: Index, start: Start | None, check: Callable[[], Awaitable[None]]
) -> tuple[IndexName, int]:
    """Write what is fresh in an index as a tier, and a checkpoint; the index stands on that afterwards.

    Args:
        start: where the log goes on; None in the middle of a segment.
        check: raises if what the index stands on may be gone; asked when all but the checkpoint is written.

    Returns:
        The checkpoint's name, and the bytes written.
    """
    history, fresh, written = index.history, index.fresh(), 0
    assert history.last is not None
    tiers = index.tiers
    segments = index.segments
    if segments.fresh or not tiers:
        stay = to_merge(tiers, fresh)
        under = tiers[stay:]
        numbers = [*segments.fresh, *(tier.root.header.name.first for tier in under)]
        numbers += [tier.root.header.name.last for tier in under]
        covered = (min(numbers, default=0), max(numbers, default=0))
        disks = frozenset(history.disks)
        header, written = await write_tier(author, index.pages, segments, under, fresh, covered, disks)
        root = await open_root(author.log.store, author.log.keys, header)  # read back: it must open before it is named
        tiers = (*tiers[:stay], read_tier(root))
    headers: tuple[IndexHeader, ...] = tuple(tier.root.header for tier in tiers)
    await check()
    name = author.name(BlobKind.CHECKPOINT, history.last.sequence, history.latest_ns)
    writer = BlobWriter(author, name)
    await writer.finish(checkpoint_fields(history, headers, start))
    index.settle(history, tiers, str(name))
    return name, written + writer.written_bytes


def trim(index: Index, fold: Fold) -> None:
    """Forget points and gaps that retention gave up."""
    if fold.floor is not None:
        index.history.trim(fold.floor_sequence, {item.checkpoint.first for item in fold.kept})
