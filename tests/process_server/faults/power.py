"""A layer under a process server's files that forgets what was not flushed, and kills it at a step that was chosen.

    python -m tests.process_server.faults.power JOURNAL STEP run --settings FILE

is `process-server run`, the real command, with a few calls of the operating system wrapped. Before bytes are written
over, what was there goes into the journal, which is emptied when a sync says that all is durable. So after SIGKILL, at
whatever instant, the journal names what a power cut may take back, and `cut` takes it: of every sector that was written
and not flushed, the disk has the new bytes or the old ones, at random; a file that was renamed into place and whose
directory was not flushed is there or is not; one that was never flushed itself may be empty.

STEP counts the beginnings and ends of these calls: at the so manieth the process kills itself, between a write and its
sync, say, where no timer would hit. 0 leaves it alone.

What it does not play: files that are made or removed without renaming are so durably; the cache's only writer is one
thread, so whatever a sync finds in the journal was written before it.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

SECTOR_BYTES: Final = 512
#: The least that an O_DIRECT read may take, and where it may begin.
_PAGE: Final = 4096
_RECORD = struct.Struct("<cHQQ")  # kind, bytes of the path, offset, bytes that follow
WRITTEN, RENAMED, MADE, UNFLUSHED = b"W", b"R", b"M", b"U"


class Layer:
    """The wrapped calls. `journal` is this process's own, and empty."""

    def __init__(self, journal: Path, die_at: int) -> None:
        self._journal = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self._die_at, self._steps = die_at, 0
        self._lock = threading.RLock()
        self._flushed: set[int] = set()  # inodes of files that were, since they were opened
        self._pending: dict[str, list[bytes]] = {}  # records by what makes them obsolete: a file's path, a directory's
        self._old = memoryview(mmap.mmap(-1, 8 << 20))
        self._sync, self._datasync = os.fsync, os.fdatasync
        self._replace, self._write = os.replace, os.pwritev

    def install(self) -> None:
        """Wrap the calls, for the whole process."""
        # By name, since what stands there takes less than the originals do.
        wrapped = {
            "fsync": self._flushing(self._sync),
            "fdatasync": self._flushing(self._datasync),
            "replace": self._replacing,
            "pwritev": self._writing,
        }
        for name, call in wrapped.items():
            setattr(os, name, call)

    def _step(self) -> None:
        with self._lock:
            self._steps += 1
            if self._steps == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def _writing(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        count = sum(len(buffer) for buffer in buffers)
        start, end = offset & -_PAGE, (offset + count + _PAGE - 1) & -_PAGE
        got = os.preadv(fd, [self._old[: end - start]], start)
        path = os.readlink(f"/proc/self/fd/{fd}")
        self._note(path, WRITTEN, path, start, bytes(self._old[:got]))
        self._step()
        done = self._write(fd, buffers, offset)
        self._step()
        return done

    def _flushing(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def flush(fd: int) -> None:
            self._step()
            sync(fd)
            with self._lock:
                status = os.fstat(fd)
                if stat.S_ISREG(status.st_mode):
                    self._flushed.add(status.st_ino)
                self._pending.pop(os.readlink(f"/proc/self/fd/{fd}"), None)
                os.ftruncate(self._journal, 0)
                os.write(self._journal, b"".join(record for records in self._pending.values() for record in records))
            self._step()

        return flush

    def _replacing(self, source: str | Path, target: str | Path) -> None:
        place, status = Path(target), os.stat(source)
        flushed = status.st_ino in self._flushed
        self._flushed.discard(status.st_ino)
        old = place.read_bytes() if place.exists() else None
        kind = UNFLUSHED if not flushed else MADE if old is None else RENAMED
        self._note(str(place.parent), kind, str(place), 0, old or b"")
        self._step()
        self._replace(source, target)
        self._step()

    def _note(self, until: str, kind: bytes, path: str, offset: int, old: bytes) -> None:
        """Keep what was there until `until` is flushed."""
        name = path.encode()
        record = _RECORD.pack(kind, len(name), offset, len(old)) + name + old
        with self._lock:
            self._pending.setdefault(until, []).append(record)
            os.write(self._journal, record)


def cut(journal: Path, draw: random.Random) -> int:
    """Take back, after the process's death, what a power cut might; how many bytes were lost."""
    luck = draw.choice((0.0, 0.3, 0.7, 1.0))  # how much of what was not flushed the disk had written by itself
    lost = 0
    kept: set[tuple[str, int]] = set()
    for kind, path, offset, old in reversed(list(_records(journal))):
        if kind == WRITTEN:
            lost += _take_back(path, offset, old, kept, draw, luck)
        elif draw.random() >= luck:
            place = Path(path)
            if kind == UNFLUSHED:
                place.write_bytes(b"")
            elif kind == RENAMED:
                place.write_bytes(old)
            else:
                place.unlink(missing_ok=True)
            lost += len(old)
    journal.unlink(missing_ok=True)
    return lost


def _take_back(path: str, offset: int, old: bytes, kept: set[tuple[str, int]], draw: random.Random, luck: float) -> int:
    """Newest first: a sector that has a version keeps it. Of a file that was removed since there is nothing left."""
    lost = 0
    if not os.path.exists(path):
        return 0
    with open(path, "r+b") as file:
        for at in range(0, len(old), SECTOR_BYTES):
            place = (path, offset + at)
            if place in kept:
                continue
            if draw.random() < luck:
                kept.add(place)
                continue
            file.seek(offset + at)
            file.write(old[at : at + SECTOR_BYTES])
            lost += SECTOR_BYTES
        file.flush()
        os.fsync(file.fileno())
    return lost


def _records(journal: Path) -> Iterator[tuple[bytes, str, int, bytes]]:
    data, at = journal.read_bytes() if journal.exists() else b"", 0
    while at + _RECORD.size <= len(data):
        kind, name_bytes, offset, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        name, old = data[at : at + name_bytes], data[at + name_bytes :][:length]
        at += name_bytes + length
        if at > len(data):
            return  # killed while it was noting: nothing was written over yet
        yield kind, name.decode(), offset, old


def main() -> None:
    """The process; see the module."""
    from process_server.cli import main as process_server

    journal, step = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv[1:3] = []
    Layer(journal, step).install()
    process_server()


if __name__ == "__main__":
    main()
