"""What scanning reads: anything of a known size that gives its bytes at an offset.

`FileVolume` is a file or a block device on any platform that Python runs on. A block device is read past the page cache
where the platform can: beside a mounted file system the cache of its device may be stale.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, Protocol

from replicar.errors import PermanentError

#: What direct reads want their offsets, lengths and memory to be multiples of, on the disks there are.
ALIGNMENT: Final = 4096


class Volume(Protocol):
    """A source of bytes. `alignment` is what offsets, lengths and buffers of reads have to be multiples of; only the
    volume's end may be off it."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def alignment(self) -> int: ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`. May run on another thread.

        Raises:
            OSError: it can't be read there.
        """

    def close(self) -> None: ...


class FileVolume:
    """A file or block device, opened for reading.

    Args:
        path: it.
        size_bytes: how much of it there is.

    Raises:
        PermanentError: it can't be opened.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path, self.size_bytes = path, size_bytes
        try:
            is_device = stat.S_ISBLK(os.stat(path).st_mode)
            # Always past the page cache, which does not see what a file system writes: a device of an odd size has
            # blocks of 512 bytes, and its last piece is whole ones of them.
            direct = getattr(os, "O_DIRECT", 0) if is_device else 0
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | direct)
        except OSError as error:
            raise PermanentError(
                f"{path} can't be opened: {error.strerror}", hint="may the agent read it?", path=str(path)
            ) from None
        self.alignment = ALIGNMENT if direct else 1

    def read_into(self, offset: int, target: memoryview) -> None:
        """See `Volume`."""
        done = 0
        while done < len(target):
            if hasattr(os, "preadv"):
                count = os.preadv(self._fd, [target[done:]], offset + done)
            else:
                os.lseek(self._fd, offset + done, os.SEEK_SET)  # one reader at a time
                piece = os.read(self._fd, len(target) - done)
                target[done : done + len(piece)] = piece
                count = len(piece)
            if count == 0:
                raise OSError(5, f"{self.path} ends at {offset + done}")
            done += count

    def close(self) -> None:
        """Read it no longer."""
        os.close(self._fd)
