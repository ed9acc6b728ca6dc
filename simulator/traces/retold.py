"""A story whose disks are used as a trace says, for as long as the story lasts.

Everything else is the seed's: sizes, settings, faults. The trace's records become part of the story, so that one kept
in a file needs the trace no more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from replicar.errors import LimitError, PermanentError
from simulator.story import Story
from simulator.traces.record import Record
from simulator.traces.replay import Format, Replay, changes, read

#: Records of a story's disks together: a story is a minute, and is kept as a file that a person may want to read.
MOST_STORY_RECORDS: Final = 20_000
_NS: Final = 1_000_000_000


def with_trace(story: Story, path: Path, layout: Format, speed: float = 1.0) -> Story:
    """The story, its disks used as the trace says: as much of it as is due before the story ends.

    The trace's disks, in the order in which they appear, are given to the story's round and round; a disk that gets
    none keeps its workload.

    Raises:
        PermanentError: the file is no such trace, or has nothing that a disk would notice in that time.
        LimitError: more than `MOST_STORY_RECORDS` are due in that time.
    """
    shares: dict[str, list[Record]] = {disk.name: [] for disk in story.disks}
    names = list(shares)
    owners: dict[str, str] = {}
    first: int | None = None
    kept = 0
    for record in read(path, layout):
        first = record.time_ns if first is None else first
        if (record.time_ns - first) / _NS / speed >= story.seconds:
            break
        if not changes(record):
            continue
        kept += 1
        if kept > MOST_STORY_RECORDS:
            raise LimitError(
                f"{path} has more than {MOST_STORY_RECORDS} changes and flushes in {story.seconds * speed:g} s",
                hint="replay it slower (`--speed 0.1`), or cut the file short",
                path=str(path),
            )
        owner = owners.setdefault(record.disk, names[len(owners) % len(names)])
        shares[owner].append(replace(record, time_ns=record.time_ns - first))
    if not kept:
        raise PermanentError(
            f"{path} changes no disk in its first {story.seconds * speed:g} s",
            hint="take a trace with writes, or replay it faster (`--speed 100`)",
            path=str(path),
        )
    disks = tuple(
        replace(disk, workload=Replay(path.name, tuple(shares[disk.name]), speed)) if shares[disk.name] else disk
        for disk in story.disks
    )
    return replace(story, disks=disks)
