"""The block traces of MSR Cambridge's servers (Write Off-Loading, FAST 2008), as their README describes them.

    Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime
    128166372003061629,hm,0,Write,7014912,4096,26

The time of issue is in Windows file time, 100 ns each; here it counts from the file's first line. Offset and size are
in bytes; the response time is not used. The files have no line of names, but copies of them do, so it is taken as the
first one. They have neither flushes nor trims. They come compressed: `gunzip` them first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from simulator.traces.record import Kind, Record, numbered

_NAMES: Final = "Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime"
_FIELDS: Final = _NAMES.count(",") + 1
_KINDS: Final = {"Read": Kind.READ, "Write": Kind.WRITE}
_NS_A_TICK: Final = 100
_HINT: Final = f"each line is {_NAMES}"


def parse(texts: Iterable[str], file: str) -> Iterator[Record]:
    """The operations of one file, which has one volume, or of several put together.

    Raises:
        PermanentError: a line is none of theirs.
        LimitError: a line is too long.
    """
    first: int | None = None
    for line in numbered(texts, file):
        if line.number == 1 and line.text == _NAMES:
            continue
        fields = line.text.split(",")
        if len(fields) != _FIELDS:
            raise line.wrong(f"{len(fields)} fields instead of {_FIELDS}", _HINT)
        ticks = line.count(fields[0], "timestamp")
        first = ticks if first is None else first
        kind = _KINDS.get(fields[3])
        if kind is None:
            raise line.wrong(f"type {fields[3][:20]!r}, neither Read nor Write", _HINT)
        if not fields[1]:
            raise line.wrong("no host", _HINT)
        disk = f"{fields[1]}.{line.count(fields[2], 'disk number')}"
        offset, size = line.count(fields[4], "offset"), line.count(fields[5], "size")
        line.count(fields[6], "response time")
        yield Record((ticks - first) * _NS_A_TICK, disk, kind, offset, size)
