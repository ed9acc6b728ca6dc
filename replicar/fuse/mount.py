"""Mounting a FUSE file system by the system calls themselves, and taking it away again.

No helper program: whoever mounts is root, and the descriptor of /dev/fuse is the mount's other end. With the last one
of these the file system ends, and answers ENOTCONN until it is unmounted.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

DEVICE: Final = Path("/dev/fuse")
SOURCE: Final = "replicar"
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MNT_FORCE_DETACH: Final = 1 | 2
_PR_SET_IO_FLUSHER: Final = 57
_MOUNTS: Final = Path("/proc/self/mountinfo")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def check(disk: str, file: Path) -> None:
    """Whether a disk can be shown as `file` here.

    Raises:
        PermanentError: it can't, and why.
    """
    if os.geteuid() != 0:
        raise PermanentError(
            f"disk {disk} can't be shown as {file}: mounting takes root",
            hint="run the agent as root, or serve the disk over NBD",
            disk=disk,
        )
    if not DEVICE.exists():
        raise PermanentError(
            f"disk {disk} can't be shown as {file}: there is no {DEVICE}",
            hint="`modprobe fuse`, or serve the disk over NBD",
            disk=disk,
        )


def mount(directory: Path) -> int:
    """Mount at `directory`, which is made; the descriptor at which the kernel asks. Requests may be read at once.

    Raises:
        PermanentError: the kernel refuses.
    """
    if is_mounted(directory):
        unmount(directory, lazily=True)  # left by a process that died, and an agent's keeper with it
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise PermanentError(
            f"nothing can be mounted at {directory}: it holds something, which would be hidden",
            hint="give the disk's `file` a directory of its own",
            path=str(directory),
        )
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},max_read=1048576"
    where = os.fsencode(directory)
    if _libc.mount(SOURCE.encode(), where, b"fuse", _MS_NOSUID_NODEV_NOEXEC, options.encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise PermanentError(
            f"nothing can be mounted at {directory}: {os.strerror(code)}",
            hint="this takes root, with CAP_SYS_ADMIN, in the host's own mount name space",
            path=str(directory),
        )
    # Memory that the kernel frees by writing to this disk must not wait for memory that we ask for.
    _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    return fd


def unmount(directory: Path, *, lazily: bool = False) -> None:
    """Take it away; what is not mounted there is none.

    Args:
        lazily: also from those who use it: they get errors from now on.

    Raises:
        OSError: EBUSY, it is in use; or what else the kernel says.
    """
    if not is_mounted(directory):
        return
    if _libc.umount2(os.fsencode(directory), _MNT_FORCE_DETACH if lazily else 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(directory))


def is_mounted(directory: Path) -> bool:
    """Whether a file system of ours is mounted there; nobody is asked but the kernel's table."""
    path = str(directory).replace("\\", "\\134").replace(" ", "\\040")
    for line in _MOUNTS.read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[4] == path and right.split()[:2] == ["fuse", SOURCE]:
            return True
    return False
