"""A trace done again: its records fitted to a disk of another size, as a workload like those of `workloads`.

    records = read(Path("hm_0.csv"), Format.MSR)
    Application(socket, oracle, fitted(records, size_bytes, speed=10), ...)       a real disk, as long as the trace is
    retold.with_trace(story_of(7), Path("iolog"), Format.FIO)                     a simulated story's disks

How it is fitted:

    place    grown to whole sectors; what is beyond the disk's end comes around at its beginning (modulo its size), so
             what was next to each other stays so; nothing is longer than the disk
    size     in pieces, as a block layer would: writes of `MOST_WRITE_BYTES`, trims of `MOST_TRIM_BYTES`
    time     from the first record, divided by `speed`; a record that is earlier than one before it in the file is due
             with that one, since the order of lines is what is kept
    what     writes, trims and flushes; reads change nothing and are left out, but their time passes
    content  the application's own: self-describing sectors, since no trace has content

Weak: what depends on answers (a database that waits for its log) is done by time alone. A large trace on a small disk
overwrites more than it did.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from simulator import workload
from simulator.traces import blktrace, fio, msr
from simulator.traces.record import Kind, Record, texts_of
from simulator.workload import SECTOR_BYTES, Action, Operation

MOST_WRITE_BYTES: Final = 256 << 10
MOST_TRIM_BYTES: Final = 1 << 20
#: Between the end of a trace and its next round.
PAUSE_SECONDS: Final = 1.0
_NS: Final = 1_000_000_000
_ACTIONS: Final = {Kind.WRITE: (Action.WRITE, MOST_WRITE_BYTES), Kind.TRIM: (Action.TRIM, MOST_TRIM_BYTES)}


class Format(StrEnum):
    FIO = "fio"
    BLKTRACE = "blktrace"
    MSR = "msr"


_PARSERS: Final = {Format.FIO: fio.parse, Format.BLKTRACE: blktrace.parse, Format.MSR: msr.parse}


def read(path: Path, layout: Format) -> Iterator[Record]:
    """The records of a file, read as they are asked for.

    Raises:
        PermanentError: it can't be read, or a line is not of that format.
        LimitError: a line is too long.
    """
    return _PARSERS[layout](texts_of(path), str(path))


def changes(record: Record) -> bool:
    """Whether a disk is asked for more than what it holds: a flush, or a write or trim of at least a byte."""
    return record.kind is Kind.FLUSH or (record.kind in _ACTIONS and record.length > 0)


def fitted(
    records: Iterable[Record], size_bytes: int, speed: float = 1.0, *, began_ns: int | None = None
) -> Iterator[tuple[float, Operation]]:
    """What to do with a disk of that size, each with the second, counted from the start, at which it is due; once.

    Args:
        speed: 2 does it in half of the time.
        began_ns: the trace's time at the start, instead of the first record's.
    """
    if not (math.isfinite(speed) and speed > 0) or size_bytes < SECTOR_BYTES:
        raise ValueError(f"a speed of {speed} on {size_bytes} bytes")
    space = workload.whole_disk(size_bytes // SECTOR_BYTES * SECTOR_BYTES)
    first = began_ns
    due = 0.0
    for record in records:
        first = record.time_ns if first is None else first
        due = max(due, (record.time_ns - first) / _NS / speed)
        if record.kind is Kind.FLUSH:
            yield due, Operation(Action.FLUSH)
        elif changes(record):
            action, most = _ACTIONS[record.kind]
            begin = record.offset // SECTOR_BYTES * SECTOR_BYTES
            end = -(-(record.offset + record.length) // SECTOR_BYTES) * SECTOR_BYTES
            end = min(end, begin + space.length)
            for start in range(begin, end, most):
                for operation in workload.at(space, action, start, min(most, end - start), fua=record.fua):
                    yield due, operation


@dataclass(frozen=True, slots=True)
class Replay:
    """One simulated disk's part of a trace. It has its records, not the file's name, so a kept story is whole.

    Args:
        name: for people.
        records: at least one that changes something, or a flush; times from the trace's beginning.
    """

    name: str
    records: tuple[Record, ...]
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not any(changes(record) for record in self.records):
            raise ValueError("a replay without anything to do, which would go round for ever")

    @property
    def kind(self) -> str:
        """What it is called where a workload's kind is."""
        return f"the trace {self.name}"

    def operations(self, size_bytes: int, randomness: random.Random) -> Iterator[tuple[float, Operation]]:
        """Round and round, as workloads have no end. It draws nothing."""
        del randomness
        begins = 0.0
        while True:
            due = 0.0
            for due, operation in fitted(self.records, size_bytes, self.speed, began_ns=0):
                yield begins + due, operation
            begins += due + PAUSE_SECONDS
