"""What the parsers of allocation read from, and how they say that nothing can be known.

A parser is given a disk that may hold anything, made by anybody. It asks for bytes through a `Window`, which refuses
what lies outside of it and what is more than any sound structure needs; whatever does not add up ends it with
`NotKnownError`, whose reason the operator sees. Nothing else comes out of a parser but the ranges that are free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from replicar.errors import PermanentError

#: Reads `length` bytes at `offset`; raises OSError where it can't.
Read: TypeAlias = Callable[[int, int], bytes]
#: Byte ranges, rising and apart from each other: shape (ranges, 2), each (begin, end).
Ranges: TypeAlias = npt.NDArray[np.int64]

#: One read of a parser.
MAX_READ_BYTES: Final = 256 << 20
#: All reads of one parser in one window: the bitmaps of 256 TiB in blocks of 4 KiB are 8 GiB.
MAX_TOTAL_BYTES: Final = 8 << 30
#: What one disk may have; a disk in more pieces than that is copied.
MAX_RANGES: Final = 1 << 23


class NotKnownError(PermanentError):
    """What is free can't be told, or may not be believed; the message says why."""


class Window:
    """A part of a disk, as one parser sees it: offsets count from its start.

    Args:
        start, size_bytes: the part, within what `read` reads.
    """

    def __init__(self, read: Read, start: int, size_bytes: int) -> None:
        self._read, self.start, self.size_bytes = read, start, size_bytes
        self._left = MAX_TOTAL_BYTES

    def fetch(self, offset: int, length: int) -> bytes:
        """The bytes there.

        Raises:
            NotKnownError: they lie outside, are too many, or can't be read.
        """
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise NotKnownError(f"a structure points outside of its volume ({offset} + {length} bytes)")
        if length > MAX_READ_BYTES or length > self._left:
            raise NotKnownError("more has to be read than any volume needs")
        self._left -= length
        try:
            data = self._read(self.start + offset, length)
        except OSError as error:
            raise NotKnownError(f"it can't be read at {self.start + offset}: {error.strerror}") from None
        if len(data) != length:
            raise NotKnownError(f"it ends within a structure at {self.start + offset}")
        return data


def joined(parts: list[Ranges]) -> Ranges:
    """Ranges from parts, sorted, neighbours made one.

    Raises:
        NotKnownError: two overlap, or there are too many.
    """
    if not parts:
        return np.zeros((0, 2), np.int64)
    ranges = np.concatenate(parts)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    if len(ranges) > MAX_RANGES:
        raise NotKnownError(f"its free space is in more than {MAX_RANGES} pieces")
    if not len(ranges):
        return ranges
    gaps = ranges[1:, 0] - ranges[:-1, 1]
    if (gaps < 0).any():
        raise NotKnownError("two pieces of free space overlap")
    begins = np.concatenate(([True], gaps > 0))
    ends = np.concatenate((gaps > 0, [True]))
    return np.stack((ranges[begins, 0], ranges[ends, 1]), axis=1)
