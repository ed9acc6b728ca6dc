"""What a reader in order will want next, guessed from the ranges it asked for.

A machine that boots reads files from their beginning to their end, some at a time, and each read would wait for storage
once for every chunk. So a read that goes on where an earlier one ended has the bytes behind it fetched: twice as many
each time, up to a limit. Reads elsewhere fetch nothing more than they need.

Pure: ranges in, a range out.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

#: Readers in order that are told apart: files that a booting machine reads at once.
STREAMS: Final = 16
#: A read that begins so little behind the end of an earlier one goes on from there: file systems leave small holes.
SLACK_BYTES: Final = 64 << 10
FIRST_BYTES: Final = 256 << 10
MOST_BYTES: Final = 4 << 20


class ReadAhead:
    """Of one disk. `follow` is told of every read."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        # Where a reader is, by age: how much it was ahead at last, and up to where bytes were fetched for it.
        self._streams: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def follow(self, offset: int, length: int) -> tuple[int, int] | None:
        """A read of `length` bytes at `offset` came; the (offset, length) to be fetched for the reads after it."""
        end = offset + length
        stream = next((at for at in self._streams if at <= offset <= at + SLACK_BYTES), None)
        if stream is None:
            self._keep(end, 0, end)
            return None
        ahead, fetched = self._streams.pop(stream)
        fetched = max(fetched, end)
        if fetched - end > ahead // 2:  # far enough ahead still
            self._keep(end, ahead, fetched)
            return None
        ahead = min(max(2 * ahead, FIRST_BYTES), MOST_BYTES)
        until = min(end + ahead, self._size)
        self._keep(end, ahead, max(until, fetched))
        return (fetched, until - fetched) if until > fetched else None

    def _keep(self, at: int, ahead: int, fetched: int) -> None:
        self._streams[at] = (ahead, fetched)
        self._streams.move_to_end(at)
        if len(self._streams) > STREAMS:
            self._streams.popitem(last=False)
