"""A block device as what a view is written to: all of the disk's bytes, its zeros made by the device where it can.

A device is written in place, so what was on it is gone with the first byte, and if the writing fails it holds neither
that nor the disk. So nothing is written before everything is known to fit: a device that is in use (mounted, swap, part
of LVM or RAID, or any of its partitions so) is refused whatever was said, and so is one that is too small; one that
holds something is refused unless it is to be replaced.

What a larger device has behind the disk's end is left as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from recovery.files import REPLACE_HINT, in_thread, write_at
from recovery.holes import make_zeros
from recovery.output import Written, written_at
from recovery.view import Piece, Progress, View
from replicar.errors import PermanentError
from replicar.formats.record import Disk

#: Where partition tables and file systems say what a device holds, and where copies of tables are, at its end.
LOOKED_AT_BYTES: Final = 1 << 20
#: Zeros are asked of the device in so large steps, so that a cancelled recovery ends soon.
ZERO_STEP_BYTES: Final = 256 << 20
#: Tells the kernel to read a device's partitions again.
_BLKRRPART: Final = 0x125F


async def write_device(
    view: View, disk: Disk, path: Path, *, replace: bool = False, progress: Progress | None = None
) -> Written:
    """The disk's bytes on a block device, durable.

    Raises:
        PermanentError: it is no block device, in use, too small, not empty, or can't be written.
        CorruptionError: the log is damaged where the disk's data lies; the device holds part of the disk then.
    """
    descriptor = _open(path)
    try:
        _check(descriptor, path, disk.size_bytes, replace=replace)
        written = 0

        async def sink(batch: Sequence[Piece]) -> None:
            nonlocal written
            for offset, data in batch:
                await in_thread(write_at, descriptor, data, offset)
                written += len(data)

        await _zero_rest(view, disk, descriptor)
        # Holes within what is copied come as zeros of the disk's own: a device has no holes that could be left alone.
        await view.copy(disk, sink, hole_bytes=0, progress=progress)
        await in_thread(os.fsync, descriptor)
    except OSError as error:
        raise PermanentError(
            f"the device {path} can't be written: {error.strerror or error}",
            hint="it holds part of the disk now; look for errors of the device in the kernel's log",
            path=str(path),
        ) from error
    finally:
        os.close(descriptor)
    _read_partitions_again(path)
    return written_at(view, disk, str(path), disk.size_bytes, written)


async def _zero_rest(view: View, disk: Disk, descriptor: int) -> None:
    """Make zeros of all that the view has no data for."""
    for start in range(0, disk.size_bytes, ZERO_STEP_BYTES):
        end = min(start + ZERO_STEP_BYTES, disk.size_bytes)
        at = start
        for data_start, data_end in [*await view.stretches(disk, start, end - start), (end, end)]:
            if data_start > at:
                await in_thread(make_zeros, descriptor, at, data_start - at)
            at = data_end


def _open(path: Path) -> int:
    try:
        if not stat.S_ISBLK(path.stat().st_mode):
            raise PermanentError(
                f"{path} is no block device", hint="for a file use --raw, --qcow2 or --vhd", path=str(path)
            )
        # On a block device O_EXCL asks the kernel to be its only user, and holds others off meanwhile.
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise PermanentError(
                f"the device {path} is in use",
                hint="unmount it, and stop swap, LVM or RAID on it (`lsblk` shows who has it), or choose another",
                path=str(path),
            ) from None
        raise PermanentError(
            f"the device {path} can't be opened: {error.strerror}", hint="check its name; it takes root", path=str(path)
        ) from error


def _check(descriptor: int, path: Path, size_bytes: int, *, replace: bool) -> None:
    there = os.lseek(descriptor, 0, os.SEEK_END)
    if there < size_bytes:
        raise PermanentError(
            f"the device {path} has {there} bytes, and the disk {size_bytes}",
            hint="choose a device that is at least as large as the disk",
            path=str(path),
            device_bytes=there,
            disk_bytes=size_bytes,
        )
    edges = (0, max(there - LOOKED_AT_BYTES, 0))
    if not replace and any(any(os.pread(descriptor, LOOKED_AT_BYTES, edge)) for edge in edges):
        raise PermanentError(f"the device {path} holds something", hint=REPLACE_HINT, path=str(path))


def _read_partitions_again(path: Path) -> None:
    """As good as it goes: a loop device without partitions has none to read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(descriptor, _BLKRRPART)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBUSY, errno.ENOTTY, errno.EACCES):
            raise
    finally:
        os.close(descriptor)
