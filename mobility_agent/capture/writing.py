"""Writes to a served disk, as every front does them: journalled, then done.

A disk that fails a write answers its error to the client, and the range is distrusted: a gap begins (`Ladder.declare`)
before the client learns of it.
"""

from __future__ import annotations

import errno
import logging

from mobility_agent.capture.disk import Disk
from mobility_agent.ladder import Ladder
from replicar.observe.logs import fields

_log = logging.getLogger(__name__)


class Writer:
    """One client's changes to one disk, out of the change log's open frame, which the client owns."""

    def __init__(self, ladder: Ladder, disk: Disk) -> None:
        self._ladder, self._changes, self._disk = ladder, ladder.log, disk
        #: Whether a range may be written now; else its regions have to be recorded as touched first.
        self.may_touch = ladder.touched[disk.index].covers

    def change(self, kind: int, offset: int, length: int, place: int, time_ns: int) -> int:
        """Journal and do one write or zeroing.

        Args:
            kind: `Kind.WRITE` or `Kind.ZERO`.
            place: of the bytes to be written, an index into the change log's `data`; 0 zeroes the range.

        Returns:
            0 or an error number: ENOSPC or EIO, which are NBD's too.
        """
        changes, disk = self._changes, self._disk
        if changes.ordered:
            changes.describe(kind, disk.index, offset, length, place, time_ns)
        else:
            self._ladder.note(disk.index, offset, length)
        if offset < disk.watch_end and offset + length > disk.watch_start:
            disk.touched(offset, length)
        try:
            if place:
                disk.write(offset, changes.data[place : place + length])
            else:
                disk.zero(offset, length)
        except OSError as error:
            _log.error(
                "disk %s fails a write of %d bytes at %d: %s",
                disk.name,
                length,
                offset,
                error,
                extra=fields(disk=disk.name, offset=offset),
            )
            self._ladder.distrust(disk.index, offset, length)
            return errno.ENOSPC if error.errno == errno.ENOSPC else errno.EIO
        return 0
