"""A protected disk: a file or block device that is read and written in place, and never cached here.

The agent keeps no copy of it and no state about it beyond its size; what is written goes straight to the kernel, and a
`flush` means that the kernel has put it down durably.

Background readers (seeding, auditing) learn by a `Watch` whether what they read was written meanwhile. A write asks one
question for all of them, whether it touches the span from the first watched byte to the last; only then is it looked at
more closely, so a watch costs the writes elsewhere nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from replicar.errors import PermanentError
from replicar.formats.frame import MAX_DISK_BYTES, SECTOR_BYTES, Buffer

_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02
_ZERO_PIECE: Final = bytes(1 << 20)
#: Ranges watched at once: one for each background reader there is, and some to spare.
MAX_WATCHES: Final = 8
#: A file system or device that can't punch holes answers with one of these; zeros are written instead.
_CANNOT_PUNCH: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Watch:
    """A range of a disk, and whether it was written since `hit` was last set to False."""

    __slots__ = ("end", "hit", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.hit = start, end, False


class Disk:
    """One disk of the machine, opened for reading and writing.

    Writers (capture) call `touched` before they write what overlaps [`watch_start`, `watch_end`), the span of all
    watches; writers and whoever watches run on one thread.

    Args:
        index: its number in descriptors.
        name: the operator's name for it.
        path: a block device or a file whose size is a whole number of sectors.
        flags: of open(2); a disk that is only read need not be writable.

    Raises:
        PermanentError: it is missing, can't be opened, or has a size that no disk has.
    """

    #: Whether writes to it pass the agent, so that one that is logged may have to be done again.
    is_served = True

    def __init__(self, index: int, name: str, path: Path, *, flags: int = os.O_RDWR) -> None:
        self.index = index
        self.name = name
        self.path = path
        self.watch_start = self.watch_end = 0
        self._watches: list[Watch] = []
        self._direct_fd: int | None = None
        #: A flush failed, and what the kernel dropped then was not written again yet.
        self.dropped = False
        self.on_dropped: Callable[[], None] = lambda: None
        self._syncing = threading.Lock()  # held by whoever the kernel may tell of what it could not write
        try:
            # Somebody who only reads may share a disk, even one that is mounted.
            exclusive = os.O_EXCL if self.is_served and path.is_block_device() else 0
            self.fd = os.open(path, flags | exclusive | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _in_use(name, path) from None
            raise PermanentError(
                f"disk {name} ({path}) can't be opened: {error.strerror}",
                hint="check the path and that the agent may read and write it",
                disk=name,
                path=str(path),
            ) from None
        try:
            _lock(self.fd, name, path)
            self.size_bytes = _size_bytes(self.fd, name, path)
        except BaseException:
            os.close(self.fd)
            raise

    @contextmanager
    def watch(self, start: int, end: int) -> Iterator[Watch]:
        """Watch a range while the block runs: every write that touches it sets the watch's `hit`."""
        assert len(self._watches) < MAX_WATCHES, "every background reader watches one range at a time"
        watch = Watch(start, end)
        self._watches.append(watch)
        self._span()
        try:
            yield watch
        finally:
            self._watches.remove(watch)
            self._span()

    def touched(self, offset: int, length: int) -> None:
        """A write of this range is about to be done."""
        for watch in self._watches:
            if offset < watch.end and offset + length > watch.start:
                watch.hit = True

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"disk {self.name} gave {len(data)} of {length} bytes at {offset}")
        return data

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes at `offset`."""
        self._fill(self.fd, offset, target)

    def read_direct(self, offset: int, target: memoryview) -> None:
        """The same past the page cache: what the disk itself has, and nobody's cached pages are driven out for it.

        Where that is refused (a file system without direct I/O, sectors that the range does not fit) it is read as
        usual.

        Args:
            target: page-aligned.
        """
        if self._direct_fd is None:
            try:
                self._direct_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct_fd = os.dup(self.fd)
        try:
            self._fill(self._direct_fd, offset, target)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fill(self.fd, offset, target)

    def write(self, offset: int, data: Buffer) -> None:
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):  # a short write is legal; the rest says why
            done += os.pwrite(self.fd, memoryview(data)[done:], offset + done)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, giving its space back where that is possible."""
        if _libc.fallocate(self.fd, _KEEP_SIZE_PUNCH_HOLE, offset, length) == 0:
            return
        code = ctypes.get_errno()
        if code not in _CANNOT_PUNCH:
            raise OSError(code, os.strerror(code))
        end = offset + length
        while offset < end:
            piece = _ZERO_PIECE[: end - offset]
            self.write(offset, piece)
            offset += len(piece)

    def flush(self) -> None:
        """What was written is durable when this returns.

        Raises:
            OSError: it may not be. The kernel says so once, to whoever asks, drops what it could not write and takes it
                for clean, and the next sync would succeed; so from then on every flush fails, until `mended`.
        """
        with self._syncing:  # a flush that began meanwhile would be told nothing
            if self.dropped:
                raise OSError(errno.EIO, "what could not be written when it was flushed is not written again yet")
            self._sync()

    def mended(self) -> None:
        """Whatever may have been dropped was written again: flush, and have flushes count again. Raises OSError."""
        with self._syncing:
            self._sync()
            self.dropped = False

    def grown_bytes(self) -> int:
        """By how much it is larger now than when it was opened."""
        return max(os.lseek(self.fd, 0, os.SEEK_END) - self.size_bytes, 0)

    def data_end(self, offset: int) -> tuple[int, bool]:
        """How far the range from `offset` on is alike: (its end, whether it holds data). Holes read as zeros."""
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return self.size_bytes, False
            return self.size_bytes, True  # a device that does not know of holes
        if data > offset:
            return min(data, self.size_bytes), False
        return min(os.lseek(self.fd, offset, os.SEEK_HOLE), self.size_bytes), True

    def allocation(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """A range as (offset, length, whether it is a hole), in order."""
        end = offset + length
        while offset < end:
            alike_end, is_data = self.data_end(offset)
            following = min(max(alike_end, offset + 1), end)
            yield offset, following - offset, not is_data
            offset = following

    def close(self) -> None:
        os.close(self.fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)
            self._direct_fd = None

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError:
            self.dropped = True
            self.on_dropped()
            raise

    def _span(self) -> None:
        self.watch_start = min((watch.start for watch in self._watches), default=0)
        self.watch_end = max((watch.end for watch in self._watches), default=0)

    def _fill(self, fd: int, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(fd, [target[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"disk {self.name} ends at {offset + done}")
            done += count


def _lock(fd: int, name: str, path: Path) -> None:
    """Keep a second agent off a file: it would acknowledge writes that this one never sees. Devices have O_EXCL."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(name, path) from None


def _in_use(name: str, path: Path) -> PermanentError:
    return PermanentError(
        f"disk {name} ({path}) is in use by another process",
        hint="what that writes would be missing in the replica: stop the other agent, or unmount the device",
        disk=name,
        path=str(path),
    )


def _size_bytes(fd: int, name: str, path: Path) -> int:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise PermanentError(f"disk {name} ({path}) is neither a file nor a block device", disk=name, path=str(path))
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0 or size % SECTOR_BYTES or size >= MAX_DISK_BYTES:
        raise PermanentError(
            f"disk {name} ({path}) has {size} bytes, which is no whole number of sectors of {SECTOR_BYTES}",
            hint=f"grow it to a multiple of {SECTOR_BYTES}, for example with `truncate -s %{SECTOR_BYTES} {path}`",
            disk=name,
            path=str(path),
            size_bytes=size,
        )
    return size
