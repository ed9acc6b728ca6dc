"""What is left of a log in front of its floor: the checkpoints that are kept, and whether their bytes are all there.

Checking opens every page of their tiers, and every chunk that any of them reads, once. Memory: the chunks' names, and
one segment's table at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from recovery.checkpoint import Checkpoint, read_checkpoint
from recovery.chunks import ChunkSource, MachineLog
from recovery.directory import read_segment
from recovery.index import Index
from recovery.live import Live
from recovery.scan import Problem
from replicar.errors import CorruptionError
from replicar.formats.indexblob import IndexName
from replicar.log.index import LogIndex, floor_missing
from replicar.log.reader import Start


@dataclass(frozen=True, slots=True)
class Floor:
    """The state that the log goes on from."""

    checkpoint: Checkpoint
    index: Index
    start: Start


async def opened(known: LogIndex, name: IndexName) -> Checkpoint | None:
    """A checkpoint; None where it is not there."""
    root = await known.root(name)
    return read_checkpoint(root) if root is not None else None


async def floor_of(log: MachineLog, known: LogIndex) -> Floor:
    """The floor of a log that was folded.

    Raises:
        CorruptionError: it is damaged or not there.
    """
    assert known.fold.floor is not None
    found = await opened(known, known.fold.floor)
    if found is None or found.start is None:
        raise floor_missing(log.machine_id, known.fold)
    return Floor(found, await Index.on(log, found), found.start)


async def check_kept(log: MachineLog, known: LogIndex) -> tuple[int, int, list[Problem]]:
    """Open all that the floor and the kept states read; how many states and chunks that were, and what is wrong."""
    live, problems = Live(), list[Problem]()
    names = [item.checkpoint for item in known.fold.kept]
    if known.fold.floor is not None and known.fold.floor not in names:
        names.append(known.fold.floor)
    for name in names:
        try:
            found = await opened(known, name)
            if found is None:
                raise CorruptionError(f"the kept checkpoint {name} is not there")
            await live.add((await Index.on(log, found)).state())
        except CorruptionError as error:
            problems.append(Problem(error.message, None, str(name)))
    source, count = ChunkSource(log), 0
    for number, chunks in sorted(live.chunks.items()):
        item = live.places[number]
        try:
            table = await read_segment(log, item)
        except CorruptionError as error:
            problems.append(Problem(error.message, number, item.blob, item.offset))
            continue
        for chunk in sorted(chunks):
            try:
                await source.open(table, [chunk])
                count += 1
            except CorruptionError as error:
                problems.append(Problem(error.message, number, item.blob, item.offset))
    return len(known.fold.kept), count, problems
