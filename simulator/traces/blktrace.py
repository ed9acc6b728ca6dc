"""blktrace's events as `blkparse` prints them by default.

      8,0    3        1     0.000000000   697  Q  WS 223490 + 8 [kjournald]
    device  cpu  sequence      seconds    pid  |  |  sector + sectors of 512 bytes
                                          action  RWBS

Taken is Q, the queue event: what was asked of the device, once each, in the order in which it was asked, before the
kernel merges and splits (which is what the disk of a virtual machine gets to see). The others that blkparse has are
passed over. RWBS is what its source composes: F before the letter of data is a flush first, D W R N the data (discard,
write, read, none), F behind it FUA, then A B S M E; B, a barrier, is taken as a flush first, as older kernels meant it.

Payloads of pass-through commands (`36 (12 00 ..) [name]`) are no input or output at a place and passed over, and so are
the `Input file ... added` at the beginning and the summary at the end; an event behind a summary is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from simulator.traces.record import Kind, Line, Record, numbered

SECTOR_BYTES: Final = 512
_NS: Final = 1_000_000_000
#: Of blkparse(1), and R (requeue), UT (unplug by timer) and m (message), which only its source has.
_ACTIONS: Final = frozenset({"A", "B", "C", "D", "F", "G", "I", "M", "P", "Q", "R", "S", "T", "U", "UT", "X", "m"})
_KINDS: Final = {"R": Kind.READ, "W": Kind.WRITE, "D": Kind.TRIM}
_EVENT: Final = re.compile(
    r" *(?P<disk>\d{1,4},\d{1,7}) +\d{1,6} +\d{1,20} +(?P<seconds>\d{1,10})\.(?P<ns>\d{9}) +\d{1,10} +"
    r"(?P<action>[A-Za-z]{1,2}) +(?P<rwbs>[A-Z]{1,8})(?: (?P<rest>.*))?",
    re.ASCII,
)
_RWBS: Final = re.compile(r"(?P<flush>F?)(?P<data>[DWRN])(?P<fua>F?)A?(?P<barrier>B?)S?M?E?")
#: With -t the time that passed stands in parentheses.
_PLACE: Final = re.compile(r"(?P<sector>\d{1,20}) \+ (?P<count>\d{1,10}) (?:\( *\d{1,20}\) )?\[.*\]", re.ASCII)
_NO_PLACE: Final = re.compile(r"(?:\( *\d{1,20}\) )?\[.*\]", re.ASCII)
_PAYLOAD: Final = re.compile(r"\d{1,10} (?:\([0-9a-f .]*\) )?\[.*\]", re.ASCII)
_SUMMARY: Final = re.compile(r"CPU *\d+ \(|Total \(", re.ASCII)
_HINT: Final = "print it with `blkparse -i NAME`, without -f or -F"


def parse(texts: Iterable[str], file: str) -> Iterator[Record]:
    """The queue events of a device or several.

    Raises:
        PermanentError: a line is none of blkparse's.
        LimitError: a line is too long.
    """
    is_over = False
    for line in numbered(texts, file):
        found = _EVENT.fullmatch(line.text)
        if found is None:
            is_over = is_over or _SUMMARY.match(line.text) is not None
            if line.text.strip() and not is_over and not line.text.startswith("Input file "):
                raise line.wrong("no event of blkparse's default output", _HINT)
            continue
        if is_over:
            raise line.wrong("an event behind the summary", "give one output of blkparse at a time")
        if found["action"] not in _ACTIONS:
            raise line.wrong(f"an action {found['action']!r} that blkparse has not", _HINT)
        if found["action"] == "Q":
            time_ns = int(found["seconds"]) * _NS + int(found["ns"])
            yield from _queued(line, time_ns, found["disk"], found["rwbs"], found["rest"] or "")


def _queued(line: Line, time_ns: int, disk: str, flags: str, rest: str) -> Iterator[Record]:
    rwbs = _RWBS.fullmatch(flags)
    if rwbs is None:
        raise line.wrong(f"RWBS {flags!r} that blkparse has not", _HINT)
    place = _PLACE.fullmatch(rest)
    if place is None and not _NO_PLACE.fullmatch(rest) and not _PAYLOAD.fullmatch(rest):
        raise line.wrong("a queue event without sector, payload or process", _HINT)
    if rwbs["flush"] or rwbs["barrier"]:
        yield Record(time_ns, disk, Kind.FLUSH)
    kind = _KINDS.get(rwbs["data"])
    if place is None or kind is None:
        return
    offset = line.count(place["sector"], "sector") * SECTOR_BYTES
    length = line.count(place["count"], "number of sectors") * SECTOR_BYTES
    if length:  # older ones print `0 + 0` for a flush without data
        yield Record(time_ns, disk, kind, offset, length, fua=bool(rwbs["fua"]) and kind is Kind.WRITE)
