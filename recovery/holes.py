"""Holes of files and block devices: made, and stepped over."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final

#: What is read of a file at once.
READ_BYTES: Final = 1 << 20
#: fallocate(2): zeros that take no space, and the size stays; zeros in any way.
_PUNCH_HOLE: Final = 3
_ZERO_RANGE: Final = 0x11
_UNKNOWN: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def make_zeros(descriptor: int, offset: int, length: int) -> None:
    """Make a range of a file or a block device zeros: as a hole if it can be, else by the device, else by writing.

    Raises:
        OSError: there is no way.
    """
    for mode in (_PUNCH_HOLE, _ZERO_RANGE):
        if _libc.fallocate(descriptor, mode, offset, length) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNKNOWN:
            raise OSError(code, os.strerror(code))
    zeros, end = bytes(READ_BYTES), offset + length
    while offset < end:
        offset += os.pwrite(descriptor, zeros[: end - offset], offset)


def held(descriptor: int, start: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what a file has within a range, between its holes."""
    at, end = start, start + length
    while at < end:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if data >= end:
            return
        at = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        yield data, at
