"""fio's iologs, version 2 and 3, as `--write_iolog` writes them and the HOWTO's "Trace file format" describes them.

    fio version 2 iolog                     fio version 3 iolog
    /file add                               21 /file add
    /file open                              110 /file open
    /file write 4096 8192                   112 /file write 4096 8192
    /file wait 500 0                        1240115 /file sync 163840 0
    /file close                             1242503 /file close

Version 2 has no times but `wait`: "wait for offset microseconds; everything below 100 is discarded; relative to the
previous wait", so here time is the sum of the waits. Version 3 has a time before everything and no `wait`. Its unit is
not in the HOWTO; fio 3.33 writes microseconds, which a test holds against the running time that it reports.

A file has to be added before anything else is done to it. Whether it is open is not asked: fio itself syncs files
behind its own `close`. What a name with blanks in it means fio's own reader doesn't know either; it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from simulator.traces.record import Kind, Line, Record, numbered

_VERSIONS: Final = {"fio version 2 iolog": 2, "fio version 3 iolog": 3}
_FILE_ACTIONS: Final = frozenset({"add", "open", "close"})
_KINDS: Final = {
    "read": Kind.READ,
    "write": Kind.WRITE,
    "trim": Kind.TRIM,
    "sync": Kind.FLUSH,
    "datasync": Kind.FLUSH,
}
_NS_A_MICROSECOND: Final = 1000
#: A shorter wait is none.
_LEAST_WAIT_MICROSECONDS: Final = 100
#: Files of one iolog.
MOST_FILES: Final = 4096
_HINT: Final = "write one with fio --write_iolog=FILE, one file a job"


def parse(texts: Iterable[str], file: str) -> Iterator[Record]:
    """The operations of an iolog.

    Raises:
        PermanentError: it is none, or has a line that fio's documentation does not.
        LimitError: a line is too long.
    """
    lines = numbered(texts, file)
    head = next(lines, Line("", file, 1))
    version = _VERSIONS.get(head.text)
    if version is None:
        raise head.wrong("no `fio version 2 iolog` or `fio version 3 iolog`", _HINT)
    files: set[str] = set()
    now_ns = 0
    for line in lines:
        words = line.text.split(" ")
        if version == 3:
            now_ns = line.count(words.pop(0), "time") * _NS_A_MICROSECOND
        if len(words) == 2:
            _manage(line, words[0], words[1], files)
            continue
        if len(words) != 4:
            raise line.wrong("neither `file action` nor `file action offset length`", _HINT)
        name, action = words[:2]
        offset, length = line.count(words[2], "offset"), line.count(words[3], "length")
        if name not in files:
            raise line.wrong("a file that was not added before", _HINT)
        if action == "wait" and version == 2:
            now_ns += offset * _NS_A_MICROSECOND if offset >= _LEAST_WAIT_MICROSECONDS else 0
        elif action not in _KINDS:
            raise line.wrong(f"an action {action!r} that version {version} has not", _HINT)
        elif _KINDS[action] is Kind.FLUSH:
            yield Record(now_ns, name, Kind.FLUSH)
        else:
            yield Record(now_ns, name, _KINDS[action], offset, length)


def _manage(line: Line, name: str, action: str, files: set[str]) -> None:
    if action not in _FILE_ACTIONS:
        raise line.wrong(f"an action {action!r} on a file as a whole", _HINT)
    if action == "add":
        files.add(name)
        if len(files) > MOST_FILES:
            raise line.wrong(f"more than {MOST_FILES} files", "trace fewer files at once")
    elif name not in files:
        raise line.wrong("a file that was not added before", _HINT)
