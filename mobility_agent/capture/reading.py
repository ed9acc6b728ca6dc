"""Reads of a served disk, and questions what lies where on it: carried out, and put as the client wants its answers."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Final

from mobility_agent.capture.disk import Disk
from replicar.formats.frame import SECTOR_BYTES
from replicar.nbd import protocol, replies
from replicar.nbd.protocol import CommandFlag, Errno
from replicar.observe.logs import fields

#: A read this long is looked at for holes, if the client can be told of them.
SPARSE_BYTES: Final = 64 << 10
#: Of what lies where, extents in one answer; the client asks on from there.
MAX_EXTENTS: Final = 1024
_UNALIGNED: Final = SECTOR_BYTES - 1

_log = logging.getLogger(__name__)


class Reader:
    """Answers one client's reads.

    Args:
        chosen: what the client negotiated.
    """

    def __init__(self, disk: Disk, chosen: protocol.Chosen) -> None:
        self._disk = disk
        self._structured = chosen.structured
        self.tells_allocation = chosen.allocation

    def read(self, flags: int, handle: int, offset: int, length: int) -> list[bytes]:
        """The whole answer to a read."""
        error = invalid(self._disk, offset, length)
        if not error and length > protocol.MAX_REQUEST_BYTES:
            error = Errno.EOVERFLOW
        if not error:
            try:
                parts = self._parts(flags, offset, length)
            except OSError as failure:
                _log.error(
                    "disk %s can't be read at %d: %s",
                    self._disk.name,
                    offset,
                    failure,
                    extra=fields(disk=self._disk.name, offset=offset),
                )
                error = Errno.EIO
            else:
                return replies.chunks(handle, parts) if self._structured else replies.simple(handle, 0, parts[0][2])
        if not self._structured:
            return replies.simple(handle, error)
        return replies.failure(handle, error, f"disk {self._disk.name} can't give {length} bytes at {offset}")

    def allocation(self, flags: int, handle: int, offset: int, length: int) -> list[bytes]:
        """The answer to the question what lies where."""
        error = invalid(self._disk, offset, length)
        if error:
            return replies.failure(handle, error, f"disk {self._disk.name} has no {length} bytes at {offset}")
        most = 1 if flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        found = islice(self._disk.allocation(offset, length), most)
        return replies.block_status(
            handle, ((size, replies.HOLE_AND_ZERO if is_hole else replies.ALLOCATED) for _, size, is_hole in found)
        )

    def _parts(self, flags: int, offset: int, length: int) -> list[replies.Part]:
        """What is on the disk there; holes as such only where they can be told and are worth looking for."""
        disk = self._disk
        if not self._structured or flags & CommandFlag.DF or length < SPARSE_BYTES:
            return [(offset, length, disk.read(offset, length))]
        return [
            (start, size, None if is_hole else disk.read(start, size))
            for start, size, is_hole in disk.allocation(offset, length)
        ]


def invalid(disk: Disk, offset: int, length: int) -> int:
    """Why a range can't be asked for, as an NBD error; 0 if it can."""
    if (offset | length) & _UNALIGNED or not length:
        return Errno.EINVAL
    return Errno.ENOSPC if offset + length > disk.size_bytes else 0
