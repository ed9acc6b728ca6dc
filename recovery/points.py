"""Which state is meant: a named point, an instant, a sequence number, or the latest; and whether it is offered.

`locate` reads the log just as far as the request needs, so a point in front of some damage is recovered in spite of it.
Only when a request is refused is the rest of the log read, to say what could have been asked for instead.

- `Named`: the state after everything before the MARK of that name. Agents give a name once; should a machine that was
  enrolled again have used it a second time, the first one is meant, and the other is reached by its sequence.
- `Instant`: after the last change at or before that time. The log must go on behind it, or the machine must have said
  that it captured nothing more until then: otherwise what lies past the log's end may just not be stored yet.
- `AtSequence`: after the change of that number.
- `Latest`: the last state in the log that lies in no gap.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from recovery.chunks import ChunkSource, MachineLog
from recovery.history import GapSpan, History, Place
from recovery.index import Index, State
from recovery.moments import format_moment
from recovery.records import Record, read_records
from replicar.errors import CorruptionError, PermanentError, ReplicarError
from replicar.formats.record import Mark
from replicar.log.reader import LogReader, Segment, Tail

#: Called with the number of segments and the sequence that were reached.
Reached = Callable[[int, int], None]
#: How many other names an error about an unknown one lists.
NEAR_NAMES: Final = 5


class Request(Protocol):
    """What is asked for."""

    def cut(self, history: History, found: Segment, records: list[Record]) -> int | None:
        """The sequence up to which to apply, if it lies before the end of this segment; None to read on. One before
        the segment's first means: nothing of it."""
        ...

    def is_end(self, history: History) -> bool:
        """Whether the state at the log's end is meant, when no segment was cut."""
        ...

    def refusal(self, history: History) -> PermanentError:
        """Why the point is not offered, with what is offered near it; `history` knows as much as the log holds."""
        ...


@dataclass(frozen=True, slots=True)
class Named:
    name: str

    def cut(self, history: History, found: Segment, records: list[Record]) -> int | None:
        marks = (item for item in records if isinstance(item.body, Mark) and item.body.name == self.name)
        return next((item.sequence for item in marks), None)

    def is_end(self, history: History) -> bool:
        return False

    def refusal(self, history: History) -> PermanentError:
        for mark in history.marks:
            if mark.name == self.name:
                return _in_gap(f"point {self.name!r}", mark.place, history, point=self.name)
        names = list(dict.fromkeys(mark.name for mark in history.marks if not mark.in_gap))
        near = difflib.get_close_matches(self.name, names, NEAR_NAMES, cutoff=0.4) or names[-NEAR_NAMES:]
        hint = f"there is {', '.join(near)}" if near else "the log holds no named point yet; use --latest or --at"
        return PermanentError(f"there is no point named {self.name!r}", hint=hint, point=self.name, near=near)


@dataclass(frozen=True, slots=True)
class Instant:
    time_ns: int

    def cut(self, history: History, found: Segment, records: list[Record]) -> int | None:
        if found.table.header.last_time_ns <= self.time_ns:
            return None
        rows = int(np.searchsorted(found.table.descriptors["time_ns"], np.uint64(self.time_ns), side="right"))
        return found.table.header.position.first_sequence + rows - 1

    def is_end(self, history: History) -> bool:
        return history.last is not None and history.last.time_ns <= self.time_ns <= _end_ns(history, history.last)

    def refusal(self, history: History) -> PermanentError:
        what = f"the instant {format_moment(self.time_ns)}"
        first, last = history.first, history.last
        if first is None or last is None or self.time_ns < first.time_ns:
            start = format_moment(first.time_ns) if first is not None else "nowhere"
            return PermanentError(f"{what} lies before the log, which begins at {start}", hint=_offered(history))
        if self.time_ns > _end_ns(history, last):
            end_ns = _end_ns(history, last)
            latest = (
                f"the latest instant that can be chosen is {format_moment(end_ns)}; " if not history.open_gap else ""
            )
            return PermanentError(
                f"{what} lies after the log, which ends at {format_moment(last.time_ns)} so far",
                hint=f"{latest}use --latest, or ask again when later changes are stored; {_offered(history)}",
                last_time_ns=end_ns,
            )
        return _in_gap(what, Place(0, self.time_ns), history, time_ns=self.time_ns)


@dataclass(frozen=True, slots=True)
class AtSequence:
    sequence: int

    def cut(self, history: History, found: Segment, records: list[Record]) -> int | None:
        return self.sequence if self.sequence <= found.table.header.position.last_sequence else None

    def is_end(self, history: History) -> bool:
        return False

    def refusal(self, history: History) -> PermanentError:
        what = f"sequence {self.sequence}"
        first, last = history.first, history.last
        if first is None or last is None or not first.sequence <= self.sequence <= last.sequence:
            span = f"{first.sequence} to {last.sequence}" if first and last else "nothing"
            return PermanentError(f"{what} is not in the log, which holds {span}", hint=_offered(history))
        return _in_gap(what, Place(self.sequence, 0), history, sequence=self.sequence)


@dataclass(frozen=True, slots=True)
class Latest:
    def cut(self, history: History, found: Segment, records: list[Record]) -> int | None:
        return None

    def is_end(self, history: History) -> bool:
        return True

    def refusal(self, history: History) -> PermanentError:
        gap = history.open_gap
        why = f" ({gap.reason})" if gap is not None and gap.reason else ""
        return PermanentError(
            f"the log offers no point yet: it has been in a gap{why} since its beginning",
            hint="wait until initial replication is complete; `replicar machines` shows how far it is",
        )


async def locate(
    log: MachineLog,
    request: Request,
    *,
    stored_number: int = 0,
    stored_digest: bytes | None = None,
    quiet: tuple[int, int] | None = None,
    source: ChunkSource | None = None,
    reached: Reached | None = None,
) -> State:
    """The machine's state at the point that is asked for.

    Args:
        stored_number: the segment that was reported as stored last; a log that ends before it is damaged.
        stored_digest: that segment's digest; a log that holds another one there is an older state put back.
        quiet: a sequence, and a time up to which the machine captured nothing behind it, as it reported itself.
        reached: told about progress after every segment.

    Raises:
        PermanentError: no such point, or one that is not offered; the hint names what is.
        CorruptionError: the log is damaged before the point.
    """
    source = source or ChunkSource(log)
    reader, index = LogReader(log.store, log.machine_id, log.keys), Index()
    history = index.history
    async for found in reader.segments(stored_number=stored_number, stored_digest=stored_digest):
        records = await read_records(source, found)
        cut = request.cut(history, found, records)
        if cut is None or cut >= found.table.header.position.first_sequence:
            index.apply(found, records, cut)
            offered = history.open_gap is None
        else:
            offered = _is_between(request, history, found) and history.open_gap is None
        if reached is not None:
            reached(found.number, found.table.header.position.last_sequence)
        if cut is not None:
            if not offered:
                raise request.refusal(await survey(log, source))
            return index.state()
    if history.last is None:
        raise _nothing(log, reader.tail)
    if quiet is not None and history.last.sequence >= quiet[0]:
        history.quiet_until_ns = quiet[1]
    if request.is_end(history) and history.open_gap is None:
        return index.state()
    settled = index.settled() if isinstance(request, Latest) else None
    if settled is None:
        raise _with_end(request.refusal(history), reader.tail)
    return settled


async def survey(log: MachineLog, source: ChunkSource | None = None) -> History:
    """The history of the whole log, as far as it is sound."""
    source = source or ChunkSource(log)
    history, reader = History(), LogReader(log.store, log.machine_id, log.keys)
    try:
        async for found in reader.segments():
            history.follow(found, await read_records(source, found))
    except CorruptionError:
        # Only for telling what is offered in front of the damage; whoever asks for something behind it is told.
        if history.last is None:
            raise
    return history


def _is_between(request: Request, history: History, found: Segment) -> bool:
    """Whether a request that fell in front of `found` means the state after the last sequence before it."""
    if history.last is None or not isinstance(request, Instant):
        return False
    return history.follows(found) or request.time_ns == history.last.time_ns


def _in_gap(what: str, place: Place, history: History, **fields: str | int) -> PermanentError:
    gap = _gap_around(place, history)
    if gap is None:
        return PermanentError(f"{what} is not offered", hint=_offered(history), **fields)
    begin = gap.before or gap.begin
    reason = f" ({gap.reason})" if gap.reason else ""
    end = f"to {format_moment(gap.after.time_ns)}" if gap.after is not None else "and has not ended yet"
    return PermanentError(
        f"{what} lies in a gap{reason}, where the order of changes is not known: "
        f"it goes from {format_moment(begin.time_ns)} {end}",
        hint=_nearest(gap),
        gap_first_sequence=gap.begin.sequence,
        gap_last_sequence=gap.after.sequence - 1 if gap.after is not None else None,
        **fields,
    )


def _gap_around(place: Place, history: History) -> GapSpan | None:
    if place.sequence:
        return history.gap_at(place.sequence)
    for gap in history.gaps:
        begin = gap.before or gap.begin
        if begin.time_ns <= place.time_ns and (gap.after is None or place.time_ns < gap.after.time_ns):
            return gap
    return None


def _nearest(gap: GapSpan) -> str:
    """What to ask for instead, by sequence: a change and the start of a gap may carry the same time."""
    places = (("last point before it", gap.before), ("first point after it", gap.after))
    found = [f"{text}: --sequence {at.sequence} ({format_moment(at.time_ns)})" for text, at in places if at is not None]
    return "; ".join(found) or "wait until initial replication is complete"


def _end_ns(history: History, last: Place) -> int:
    """The latest instant whose state is known to be the log's last one."""
    return max(last.time_ns, history.quiet_until_ns if history.open_gap is None else 0)


def _offered(history: History) -> str:
    """The stretch of time in which points are offered, in words."""
    if history.first is None or history.last is None:
        return "the log is empty"
    start = history.first.time_ns
    if history.gaps and history.gaps[0].before is None:
        if history.gaps[0].after is None:
            return "no point is offered before initial replication is complete"
        start = history.gaps[0].after.time_ns
    end_ns = _end_ns(history, history.last)
    if history.open_gap is not None and history.open_gap.before is not None:
        end_ns = history.open_gap.before.time_ns
    return f"points are offered from {format_moment(start)} to {format_moment(end_ns)}"


def _with_end(error: PermanentError, tail: Tail) -> PermanentError:
    """The refusal, saying where and why the log ends if that is not just where it was written to."""
    if not tail.damaged:
        return error
    where = f"the log can be read up to segment {tail.number}, sequence {tail.sequence}, only: {tail.reason}"
    return PermanentError(error.message, hint=f"{error.hint}; {where}", **error.fields, tail=where)


def _nothing(log: MachineLog, tail: Tail) -> ReplicarError:
    if not tail.damaged:
        return PermanentError(
            f"there is nothing in storage of machine {log.machine_id}",
            hint="check container and machine; if protection was just enabled, wait for the first segment",
            machine_id=str(log.machine_id),
        )
    return CorruptionError(
        f"nothing of the log of machine {log.machine_id} can be read: {tail.reason}",
        hint="check that the key is this machine's, then run `replicar verify`",
        machine_id=str(log.machine_id),
    )
