"""A trace's operation, and the numbered lines that parsers read it from.

Lines are bounded (`MOST_CHARACTERS`), and so is what a number may be, so that no file can ask for memory. What is wrong
with a line is said with the file's name and the line's number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from replicar.errors import LimitError, PermanentError

#: Characters of one line: a path may have 4096, the longest that any of the formats has in a line.
MOST_CHARACTERS: Final = 8192
_MOST_NUMBER: Final = (1 << 64) - 1
_MOST_DIGITS: Final = 20


class Kind(StrEnum):
    """What was done. Reads are told too, since they are part of the trace; a workload has none."""

    READ = "read"
    WRITE = "write"
    TRIM = "trim"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Record:
    """One operation as the trace has it, not fitted to anything.

    Args:
        time_ns: since the trace began; not always rising (see `replay`), and negative where a trace says so.
        disk: the trace's own name for it: a file, a device's major and minor number, a host's volume.
        offset, length: in bytes; 0 of a flush.
    """

    time_ns: int
    disk: str
    kind: Kind
    offset: int = 0
    length: int = 0
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end, and where it was read."""

    text: str
    file: str
    number: int

    def wrong(self, what: str, hint: str) -> PermanentError:
        """The error that says so."""
        shown = self.text[:80]
        return PermanentError(
            f"{self.file} line {self.number}: {what} in {shown!r}", hint=hint, path=self.file, line=self.number
        )

    def count(self, text: str, what: str) -> int:
        """A number of 64 bits without a sign.

        Raises:
            PermanentError: it is none.
        """
        if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS) or int(text) > _MOST_NUMBER:
            raise self.wrong(f"the {what} is no number of 64 bits", "repair the line, or trace again")
        return int(text)


def numbered(texts: Iterable[str], file: str) -> Iterator[Line]:
    """Lines, counted from 1.

    Raises:
        LimitError: one is longer than `MOST_CHARACTERS`.
    """
    for number, text in enumerate(texts, 1):
        if len(text) > MOST_CHARACTERS:
            raise LimitError(
                f"{file} line {number} has more than {MOST_CHARACTERS} characters",
                hint="this is no trace of the format that was named; is it compressed, or binary?",
                path=file,
                line=number,
            )
        yield Line(text.rstrip("\r\n"), file, number)


def texts_of(path: Path) -> Iterator[str]:
    """A file's lines, none read further than shows that it is too long.

    Raises:
        PermanentError: it can't be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            while text := file.readline(MOST_CHARACTERS + 1):
                yield text
    except OSError as error:
        raise PermanentError(
            f"{path} can't be read: {error.strerror}", hint="name a trace's file", path=str(path)
        ) from None
