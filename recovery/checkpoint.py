"""A checkpoint: a machine's index as it was at one sequence, so that nothing before it has to be read again.

It holds what the log said of itself so far (disks, gaps, points), names the tiers that make the disks' maps, and says
with which segment the log goes on, unless it was made in the middle of one. A tier is named with its header, so
that it is the very one which was meant, and one request opens it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from recovery.history import GapSpan, History, NamedPoint, Place
from replicar.errors import CorruptionError
from replicar.formats import indexblob
from replicar.formats.fields import Fields
from replicar.formats.indexblob import BlobKind, IndexHeader, IndexName, Root
from replicar.formats.record import MAX_DISK_INDEX, Consistency, Disk
from replicar.log.index import read_start, start_fields
from replicar.log.reader import Start

#: Tiers of a checkpoint. Each is a few times as large as all that lie on it together, so there are far fewer.
MAX_TIERS: Final = 64


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """See the module. `start` is None where it was made in the middle of a segment."""

    name: IndexName
    history: History
    tiers: tuple[IndexHeader, ...]  # from the oldest to the newest
    start: Start | None

    @property
    def place(self) -> Place:
        assert self.history.last is not None
        return self.history.last

    @property
    def number(self) -> int:
        """The last segment that it knows all of; 0 if it was made in the middle of one."""
        return self.start.tail.number if self.start is not None else 0


def checkpoint_fields(history: History, tiers: tuple[IndexHeader, ...], start: Start | None) -> dict[str, Any]:
    """A checkpoint as the JSON object of its root."""
    return {
        "first": _pair(history.first),
        "last": _pair(history.last),
        "tail": start_fields(start) if start is not None else None,
        "disks": [_disk(disk) for _, disk in sorted(history.disks.items())],
        "listed": [[index] for index in sorted(history.listed)] if history.listed is not None else None,
        "gaps": [_gap(gap) for gap in history.gaps],
        "points": [_point(mark) for mark in history.marks],
        "tiers": [{"blob": str(header.name), "header": header.pack()[:TIER_HEADER_BYTES].hex()} for header in tiers],
    }


#: What a header has before its reserved bytes.
TIER_HEADER_BYTES: Final = 168


def read_checkpoint(root: Root) -> Checkpoint:
    """What a checkpoint's root says.

    Raises:
        CorruptionError: it says something that can't be.
    """
    fields, name = root.fields, root.header.name
    history = History()
    history.first, history.last = _place(fields, "first"), _place(fields, "last")
    history.latest_ns = name.last
    for item in fields.each("disks"):
        disk = Disk(item.integer("index", MAX_DISK_INDEX), item.text("name"), item.integer("size_bytes"))
        history.disks[disk.index] = disk
    if fields.has("listed"):
        history.listed = {index for (index,) in fields.rows("listed", 1)}
    history.gaps = [_read_gap(item) for item in fields.each("gaps")]
    history.marks = [_read_point(item) for item in fields.each("points")]
    tiers = tuple(_read_tier(item, name) for item in fields.each("tiers"))
    start = read_start(fields)
    if history.last is None or history.last.sequence != name.first or len(tiers) > MAX_TIERS:
        raise CorruptionError(f"checkpoint {name} is of another sequence than its name says, or names too many tiers")
    if start is not None and start.tail.sequence != name.first:
        raise CorruptionError(f"checkpoint {name} lets the log go on with another sequence than its own")
    return Checkpoint(name, history, tiers, start)


def _read_tier(item: Fields, of: IndexName) -> IndexHeader:
    name = indexblob.read_name(item.text("blob"))
    raw = item.binary("header", TIER_HEADER_BYTES).ljust(indexblob.HEADER_BYTES, b"\0")
    if name is None or name.kind is not BlobKind.TIER or name.machine_id != of.machine_id:
        raise CorruptionError(f"checkpoint {of} names something that is no tier")
    header = indexblob.read_header(raw, name)
    assert header is not None  # its magic alone is not zeros, or read_header raised
    return header


def _pair(place: Place | None) -> list[int] | None:
    return [place.sequence, place.time_ns] if place is not None else None


def _place(fields: Fields, name: str) -> Place | None:
    if not fields.has(name):
        return None
    values = fields.integers(name, most=(1 << 64) - 1, count=2)
    if len(values) != 2:
        raise CorruptionError(f"a checkpoint whose {name!r} is no place")
    return Place(*values)


def _disk(disk: Disk) -> dict[str, Any]:
    return {"index": disk.index, "name": disk.name, "size_bytes": disk.size_bytes}


def _gap(gap: GapSpan) -> dict[str, Any]:
    places = {"before": _pair(gap.before), "begin": _pair(gap.begin), "after": _pair(gap.after)}
    return {**places, "reason": gap.reason}


def _read_gap(item: Fields) -> GapSpan:
    begin = _place(item, "begin")
    if begin is None:
        raise CorruptionError("a checkpoint has a gap without a beginning")
    return GapSpan(_place(item, "before"), begin, _place(item, "after"), item.text("reason"))


def _point(mark: NamedPoint) -> dict[str, Any]:
    return {
        "name": mark.name,
        "consistency": mark.consistency.value,
        "place": _pair(mark.place),
        "in_gap": mark.in_gap,
    }


def _read_point(item: Fields) -> NamedPoint:
    place, consistency = _place(item, "place"), item.text("consistency")
    if place is None or consistency not in list(Consistency):
        raise CorruptionError("a checkpoint has a point that is none")
    return NamedPoint(item.text("name"), Consistency(consistency), place, item.flag("in_gap"))
