"""The file systems on the protected disks, and holding them still: FIFREEZE, FITHAW, and the time in between.

FIFREEZE writes out everything and then stops every writer until FITHAW; the disk holds a state that mounts clean. It
can't be interrupted while it writes out, so `sync` is called before, to leave it little to do.

Found are the file systems whose device is the disk, a partition of it, or mapped onto those (LVM, encryption). They are
frozen in the reverse order of mounting: one that lies in a file on another comes first.

Weak: file systems mounted in another mount namespace only are not found. If they are written to while the others are
frozen, events say so, and the point is not made.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import time
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mobility_agent.capture.trace.guard import Guard
from replicar.errors import LimitError, TransientError

FIFREEZE: Final = 0xC0045877
FITHAW: Final = 0xC0045878
#: The guard is handed their descriptors in one message.
MAX_FILESYSTEMS: Final = 64

_MOUNTS: Final = Path("/proc/self/mountinfo")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A mounted, writable file system."""

    mountpoint: Path
    kind: str
    device: str  # major:minor


def filesystems_on(family: Set[str]) -> list[Filesystem]:
    """Those whose device is one of `family` (`major:minor` each), in the order in which they have to be frozen."""
    found: dict[str, Filesystem] = {}
    for line in _MOUNTS.read_text().splitlines():
        left, _, right = line.partition(" - ")
        _, _, device, _, mountpoint, *_ = left.split()
        kind, source, options = right.split()[:3]
        if device.startswith("0:"):  # btrfs gives its mounts numbers of their own
            device = _device_of(_unescape(source)) or device
        if device in family and "rw" in options.split(",") and device not in found:
            found[device] = Filesystem(Path(_unescape(mountpoint)), kind, device)
    if len(found) > MAX_FILESYSTEMS:
        raise LimitError(f"{len(found)} file systems on the protected disks; {MAX_FILESYSTEMS} is the limit")
    return list(reversed(found.values()))


def sync(filesystems: Sequence[Filesystem]) -> None:
    """Write out what they hold in memory (they go on being written to)."""
    for filesystem in filesystems:
        with suppress(FileNotFoundError):  # unmounted meanwhile
            fd = os.open(filesystem.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _libc.syncfs(fd)
            finally:
                os.close(fd)


def thaw_all(family: Set[str]) -> list[Path]:
    """Thaw whatever an agent that was killed together with its guard left frozen; the mount points that were."""
    thawed = []
    for filesystem in filesystems_on(family):
        fd = os.open(filesystem.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _ioctl(fd, FITHAW) == 0:
                thawed.append(filesystem.mountpoint)
        finally:
            os.close(fd)
    return thawed


@dataclass
class Freeze:
    """One freeze of several file systems, with `with`; all calls on one thread, and nothing in between may wait for a
    file system that is frozen (logging, for one).

    Args:
        budget_seconds: from now on until all is thawed; the guard sees to it.

    Raises (on entering):
        TransientError: the guard does not answer, or a file system refuses.
    """

    filesystems: Sequence[Filesystem]
    guard: Guard
    budget_seconds: float
    #: From the first freeze to the last thaw; measured even when it failed.
    seconds: float = 0.0
    #: Whether all of them were still frozen when `thaw` came to them.
    held: bool = False
    deadline: float = 0.0
    _open: list[int] = field(default_factory=list)
    _frozen: list[int] = field(default_factory=list)
    _began: float = 0.0

    def __enter__(self) -> Freeze:
        try:
            for filesystem in self.filesystems:
                self._open.append(os.open(filesystem.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._began = time.monotonic()
            self.deadline = self._began + self.budget_seconds
            if self._open:
                self.guard.arm(self._open, self.deadline)
            for filesystem, fd in zip(self.filesystems, self._open, strict=True):
                self._freeze(filesystem, fd)
        except OSError as error:
            self.thaw()
            raise TransientError(f"a file system can't be frozen: {error}") from None
        except BaseException:
            self.thaw()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()

    @property
    def remaining_seconds(self) -> float:
        return self.deadline - time.monotonic()

    def thaw(self) -> None:
        """Thaw what is frozen; afterwards `held` and `seconds` are known. Again does nothing."""
        if not self._open:
            if self._began and not self.seconds:  # nothing to freeze: the time during which the disk had to be still
                self.seconds, self.held = time.monotonic() - self._began, True
            return
        results = [_ioctl(fd, FITHAW) for fd in reversed(self._frozen)]
        self.held = not any(results)
        self.seconds = time.monotonic() - self._began if self._frozen else 0.0
        try:
            self.guard.disarm()
        except TransientError:
            self.guard.close()  # it thaws once more, which does no harm, and ends
        for fd in self._open:
            os.close(fd)
        self._open.clear()
        self._frozen.clear()

    def _freeze(self, filesystem: Filesystem, fd: int) -> None:
        code = _ioctl(fd, FIFREEZE)
        if code == errno.EOPNOTSUPP:
            return  # has no freezing (FAT, for one); written to in between, it is noticed
        if code:
            words = "somebody else has frozen it" if code == errno.EBUSY else os.strerror(code)
            raise TransientError(
                f"the {filesystem.kind} file system at {filesystem.mountpoint} can't be frozen: {words}",
                path=str(filesystem.mountpoint),
            )
        self._frozen.append(fd)


def _ioctl(fd: int, request: int) -> int:
    """0 or an error number."""
    try:
        fcntl.ioctl(fd, request, 0)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _device_of(source: str) -> str | None:
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if found.st_rdev else None


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)
