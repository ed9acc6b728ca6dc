"""What may be asked for: a named point, an instant, a sequence number, or the latest; and why it is refused if it is.

- `Named`: the state after everything before the MARK of that name. Agents give a name once; should a machine that was
  enrolled again have used it a second time, the first one is meant, and the other is reached by its sequence.
- `Instant`: after the last change at or before that time. The log must go on behind it, or the machine must have said
  that it captured nothing more until then: otherwise what lies past the log's end may just not be stored yet.
- `AtSequence`: after the change of that number.
- `Latest`: the last state in the log that lies in no gap.

A log whose beginning was folded away offers every state from its *floor* on, and before it only those that are kept.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from recovery.history import GapSpan, History, Place
from recovery.records import Record
from replicar.errors import PermanentError
from replicar.formats.indexblob import IndexName
from replicar.formats.record import Mark
from replicar.log.index import Fold
from replicar.log.reader import Segment
from replicar.moments import format_moment

#: How many other names an error about an unknown one lists.
NEAR_NAMES: Final = 5


class Request(Protocol):
    """What is asked for."""

    def begins(self, checkpoint: IndexName) -> bool:
        """Whether the state is that of the checkpoint, or comes after it in the log."""
        ...

    def is_at(self, checkpoint: IndexName) -> bool:
        """Whether the state is that of the checkpoint, whatever may follow it."""
        ...

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

    def begins(self, checkpoint: IndexName) -> bool:
        return True

    def is_at(self, checkpoint: IndexName) -> bool:
        return False

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

    def begins(self, checkpoint: IndexName) -> bool:
        return checkpoint.last <= self.time_ns

    def is_at(self, checkpoint: IndexName) -> bool:
        return checkpoint.last == self.time_ns

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
            return PermanentError(f"{what} lies before the log, which begins at {start}", hint=offered(history))
        if self.time_ns > _end_ns(history, last):
            end_ns = _end_ns(history, last)
            latest = (
                f"the latest instant that can be chosen is {format_moment(end_ns)}; " if not history.open_gap else ""
            )
            return PermanentError(
                f"{what} lies after the log, which ends at {format_moment(last.time_ns)} so far",
                hint=f"{latest}use --latest, or ask again when later changes are stored; {offered(history)}",
                last_time_ns=end_ns,
            )
        return _in_gap(what, Place(0, self.time_ns), history, time_ns=self.time_ns)


@dataclass(frozen=True, slots=True)
class AtSequence:
    sequence: int

    def begins(self, checkpoint: IndexName) -> bool:
        return checkpoint.first <= self.sequence

    def is_at(self, checkpoint: IndexName) -> bool:
        return checkpoint.first == self.sequence

    def cut(self, history: History, found: Segment, records: list[Record]) -> int | None:
        return self.sequence if self.sequence <= found.table.header.position.last_sequence else None

    def is_end(self, history: History) -> bool:
        return False

    def refusal(self, history: History) -> PermanentError:
        what = f"sequence {self.sequence}"
        first, last = history.first, history.last
        if first is None or last is None or not first.sequence <= self.sequence <= last.sequence:
            span = f"{first.sequence} to {last.sequence}" if first and last else "nothing"
            return PermanentError(f"{what} is not in the log, which holds {span}", hint=offered(history))
        return _in_gap(what, Place(self.sequence, 0), history, sequence=self.sequence)


@dataclass(frozen=True, slots=True)
class Latest:
    def begins(self, checkpoint: IndexName) -> bool:
        return True

    def is_at(self, checkpoint: IndexName) -> bool:
        return False

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


def thinned(request: Request, fold: Fold, history: History) -> PermanentError:
    """The refusal of what lies before the floor and is not kept; `history` is that of the floor or later."""
    assert fold.floor is not None
    what, at = "the point", 0
    if isinstance(request, AtSequence):
        what, at = f"sequence {request.sequence}", request.sequence
    elif isinstance(request, Instant):
        what, at = f"the instant {format_moment(request.time_ns)}", request.time_ns
    by_time = isinstance(request, Instant)
    kept = sorted((item.checkpoint.last, item.checkpoint.first) for item in fold.kept)
    before = [place for place in kept if place[0 if by_time else 1] < at][-1:]
    after = [place for place in kept if place[0 if by_time else 1] > at][:1]
    near = [f"--sequence {sequence} ({format_moment(time_ns)})" for time_ns, sequence in before + after]
    nearest = f"kept nearest to it: {', '.join(near)}; " if near else ""
    return PermanentError(
        f"{what} was given up by retention",
        hint=f"{nearest}any instant from {format_moment(fold.floor.last)} on is offered; {offered(history)}",
        floor_sequence=fold.floor.first,
    )


def _in_gap(what: str, place: Place, history: History, **fields: str | int) -> PermanentError:
    gap = _gap_around(place, history)
    if gap is None:
        return PermanentError(f"{what} is not offered", hint=offered(history), **fields)
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


def offered(history: History) -> str:
    """The stretch of time in which points are offered, in words."""
    if history.first is None or history.last is None:
        return "the log is empty"
    start = (history.floor or history.first).time_ns
    if history.gaps and history.gaps[0].before is None:
        if history.gaps[0].after is None:
            return "no point is offered before initial replication is complete"
        start = history.gaps[0].after.time_ns
    end_ns = _end_ns(history, history.last)
    if history.open_gap is not None and history.open_gap.before is not None:
        end_ns = history.open_gap.before.time_ns
    return f"points are offered from {format_moment(start)} to {format_moment(end_ns)}"
