"""What a log says about itself: the machine's disks over time, its named points, its gaps, how far it goes.

A history follows a log segment by segment and may stop within one. It holds no extents: where a disk's map has to
change at a record (a disk that was replaced or shrunk), it says so as `Step`s, which the index
carries out.

A checkpoint carries a history on; what lies before the point from which a log is whole it may leave out (`trim`).

Gaps. Between GAP_BEGIN and GAP_END order is not known, so no state in there ever was. The sequence of GAP_END is the
first that is offered again; the one before GAP_BEGIN the last. Two things count as the start of a gap besides: a
stream that begins anew (its DISK records describe a machine whose bytes are not there yet), and the time between the
last change of a lost change log and the first of its successor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from recovery.records import Record
from replicar.errors import CorruptionError
from replicar.formats.frame import Flag, begins_anew
from replicar.formats.record import Consistency, Disk, DiskAction, Gap, Mark
from replicar.log.reader import Segment


@dataclass(frozen=True, slots=True)
class Place:
    """A descriptor's sequence number and time."""

    sequence: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class NamedPoint:
    """A MARK of the log. Inside a gap it is not offered."""

    name: str
    consistency: Consistency
    place: Place
    in_gap: bool


@dataclass(frozen=True, slots=True)
class GapSpan:
    """A stretch without offered points: `before` is the last one in front of it (None at the log's start), `after` the
    first behind it (None while it lasts), `begin` where it starts itself."""

    before: Place | None
    begin: Place
    after: Place | None
    reason: str

    def holds(self, sequence: int) -> bool:
        """Whether the state after that sequence lies inside."""
        return sequence >= self.begin.sequence and (self.after is None or sequence < self.after.sequence)


class Action(Enum):
    """What a step does to the maps, before the descriptor of its row is applied."""

    FORGET = auto()  # the disk is another one from here on, or none
    ZERO = auto()  # the disk has become shorter


@dataclass(frozen=True, slots=True)
class Step:
    row: int
    action: Action
    disk: int = 0
    start: int = 0
    end: int = 0


class History:
    """Follows a log; see the module. Pure: fed with opened tables and parsed records."""

    def __init__(self) -> None:
        self.first: Place | None = None
        self.last: Place | None = None
        self.floor: Place | None = None  # from where on every state is left, if the log was folded
        self.disks: dict[int, Disk] = {}
        self.marks: list[NamedPoint] = []
        self.gaps: list[GapSpan] = []
        self.latest_ns = 0  # the latest time so far; a clock may have gone back
        self.quiet_until_ns = 0  # nothing was captured behind `last` up to then; 0 when nobody says so
        self.listed: set[int] | None = None  # disks named since the stream began anew, until its gap ends

    @property
    def open_gap(self) -> GapSpan | None:
        """The gap that the last sequence lies in."""
        return self.gaps[-1] if self.gaps and self.gaps[-1].after is None else None

    def gap_at(self, sequence: int) -> GapSpan | None:
        return next((gap for gap in self.gaps if gap.holds(sequence)), None)

    def trim(self, floor: int, kept: set[int]) -> None:
        """Forget the gaps that ended before sequence `floor`, and the points before it that are not in `kept`."""
        self.marks = [mark for mark in self.marks if mark.place.sequence >= floor or mark.place.sequence in kept]
        self.gaps = [gap for gap in self.gaps if gap.after is None or gap.after.sequence > floor]

    def follows(self, found: Segment) -> bool:
        """Whether the segment's sequences go on where the last one ended."""
        return self.last is not None and found.table.header.position.first_sequence == self.last.sequence + 1

    def follow(self, found: Segment, records: list[Record], until: int | None = None) -> list[Step]:
        """Take in a segment, or its part up to sequence `until` (inclusive, not before the segment's first).

        Returns:
            What has to be done to the maps, ascending by row.

        Raises:
            CorruptionError: its sequences don't go on where the last ones ended.
        """
        position, times = found.table.header.position, found.table.descriptors["time_ns"]
        end = position.last_sequence if until is None else min(until, position.last_sequence)
        steps: list[Step] = []
        if not self.follows(found):
            self._begin(found)
        for item in records:
            if item.sequence > end:
                break
            match item.body:
                case Disk():
                    self._disk(item.row, item.body, steps)
                case Mark(name, consistency, _):
                    place = Place(item.sequence, item.time_ns)
                    self.marks.append(NamedPoint(name, consistency, place, self.open_gap is not None))
                case Gap(reason):
                    self._gap(found, item, reason, steps)
        rows = end - position.first_sequence
        self.last = Place(end, int(times[rows]))
        self.latest_ns = max(self.latest_ns, int(times[: rows + 1].max()))
        return steps

    def _begin(self, found: Segment) -> None:
        position = found.table.header.position
        begin = Place(position.first_sequence, int(found.table.descriptors["time_ns"][0]))
        anew = begins_anew(found.table.descriptors)
        if self.last is not None and (not anew or position.first_sequence <= self.last.sequence):
            raise CorruptionError(
                f"segment {found.number} begins with sequence {position.first_sequence}, "
                f"but the one before ends with {self.last.sequence}",
                hint="recover to a point before it; `replicar verify` shows what else is wrong",
                number=found.number,
                blob=found.blob,
                offset=found.offset,
            )
        if self.first is None:
            self.first = begin
        if anew:
            self.listed = set()
            if self.open_gap is None:
                self.gaps.append(GapSpan(self.last, begin, None, ""))

    def _disk(self, row: int, disk: Disk, steps: list[Step]) -> None:
        old = self.disks.get(disk.index)
        if self.listed is not None:
            self.listed.add(disk.index)
        if disk.action is DiskAction.REMOVED:
            self.disks.pop(disk.index, None)
            steps.append(Step(row, Action.FORGET, disk.index))
            return
        if old is None or old.name != disk.name:
            steps.append(Step(row, Action.FORGET, disk.index))
        elif disk.size_bytes < old.size_bytes:
            steps.append(Step(row, Action.ZERO, disk.index, disk.size_bytes, old.size_bytes))
        self.disks[disk.index] = disk

    def _gap(self, found: Segment, item: Record, reason: str, steps: list[Step]) -> None:
        place, gap = Place(item.sequence, item.time_ns), self.open_gap
        if item.flags & Flag.GAP_BEGIN:
            if gap is not None:
                self.gaps[-1] = replace(gap, reason=gap.reason or reason)
            else:
                self.gaps.append(GapSpan(self._place_before(found, item.row), place, None, reason))
        elif item.flags & Flag.GAP_END and gap is not None:
            # Agents name their disks in front of the gap or behind its beginning; what they have not named by its end
            # is gone. Whoever is named keeps what it had: only what may differ was sent again.
            if self.listed is not None:
                self._drop_unlisted(item.row, steps)
            self.gaps[-1] = replace(gap, after=place)

    def _drop_unlisted(self, row: int, steps: list[Step]) -> None:
        for index in sorted(self.disks.keys() - (self.listed or set())):
            del self.disks[index]
            steps.append(Step(row, Action.FORGET, index))
        self.listed = None

    def _place_before(self, found: Segment, row: int) -> Place | None:
        if row == 0:
            return self.last
        first = found.table.header.position.first_sequence
        return Place(first + row - 1, int(found.table.descriptors["time_ns"][row - 1]))
