"""What a machine takes of its container: log, index, the points that are kept, and how fast it grows.

Bytes are those of pages that were written and not cleared, as the service bills them. Growth is what was written behind
the floor over the time since then (or since the log's beginning): what a day adds before anything is given up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from recovery.chunks import MachineLog
from recovery.history import History
from recovery.keeping import floor_of
from recovery.live import written_ranges
from recovery.points import survey
from replicar.errors import CorruptionError
from replicar.formats import indexblob, logblob
from replicar.log.index import LogIndex, open_index
from replicar.log.reader import Start

_DAY_NS: Final = 24 * 3600 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class KeptPoint:
    """A state in front of the window that retention keeps."""

    sequence: int
    time_ns: int
    reason: str


@dataclass(frozen=True, slots=True)
class Usage:
    """See the module. `window_begin_ns` is from where on every instant is kept; None where there is nothing."""

    machine_id: str
    log_bytes: int
    kept_bytes: int  # of these, in front of the window: what the kept points and the oldest state need
    index_bytes: int
    log_blobs: int
    index_blobs: int
    checkpoints: int
    generation: int
    window_begin_ns: int | None
    window_end_ns: int | None
    bytes_per_day: int | None
    kept: tuple[KeptPoint, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def usage(log: MachineLog) -> Usage:
    """Look at everything that a machine has in its container.

    Raises:
        CorruptionError: the log was folded, and its index is damaged.
    """
    known = await open_index(log.store, log.machine_id, log.keys)
    floor = (await floor_of(log, known)).start if known.fold.floor is not None else Start()
    blobs = await log.store.list(logblob.log_prefix(log.machine_id))
    log_bytes = sum([await _written(log, info.name) for info in blobs])
    before = 0
    for name, ranges in (await written_ranges(log.store, blobs, floor)).items():
        limit = floor.offsets.get(name)
        for offset, length in ranges:
            end = offset + length if limit is None else min(offset + length, limit)
            before += max(end - offset, 0)
    index = await log.store.list(indexblob.index_prefix(log.machine_id))
    index_bytes = sum([await _written(log, info.name) for info in index])
    begin_ns, end_ns = await _window(log, known)
    spent_ns = end_ns - begin_ns if begin_ns is not None and end_ns is not None else 0
    return Usage(
        machine_id=str(log.machine_id),
        log_bytes=log_bytes,
        kept_bytes=before,
        index_bytes=index_bytes,
        log_blobs=len(blobs),
        index_blobs=len(index),
        checkpoints=len(known.listing.checkpoints),
        generation=known.fold.generation,
        window_begin_ns=begin_ns,
        window_end_ns=end_ns,
        bytes_per_day=(log_bytes - before) * _DAY_NS // spent_ns if spent_ns > 0 else None,
        kept=tuple(KeptPoint(item.checkpoint.first, item.checkpoint.last, item.reason) for item in known.fold.kept),
    )


async def _window(log: MachineLog, known: LogIndex) -> tuple[int | None, int | None]:
    try:
        history = await survey(log)
    except CorruptionError:
        history = History()  # what it takes is told of a damaged log too; `verify` tells what is wrong
    first = history.floor or history.first
    return first.time_ns if first is not None else None, history.last.time_ns if history.last is not None else None


async def _written(log: MachineLog, name: str) -> int:
    return sum(length for _, length in await log.store.page_ranges(name))
