"""One change-log file on disk: preallocated, mapped into memory, filled from front to back, reused when it is stored.

What lies in it is replicar.formats.changelog; this is the file around it. Bytes stored into the mapping are in the
page cache at once and so survive the process; `sync` makes them survive the machine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import uuid
from bisect import bisect_right
from pathlib import Path
from typing import Final

from replicar.errors import CorruptionError, LimitError, PermanentError
from replicar.formats import changelog, frame
from replicar.formats.changelog import FRAMES_OFFSET, ChangeLogHeader, Scan

#: One entry of the sparse index for so many bytes of frames: a seek walks at most this far.
_INDEX_STEP: Final = 1 << 20
_LENGTHS = struct.Struct("<II")  # payload bytes and count, at offset 8 of a frame's header


def unmap(mapping: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # a transport still holds a view; the mapping goes with it
        mapping.close()


def making(path: Path) -> Path:
    """Where the change log that is to be at `path` is made."""
    return path.with_suffix(".new")


class LogFile:
    """A mapped change-log file. `sealed_end` is behind the last whole frame, `next_sequence` what follows it."""

    def __init__(self, path: Path, fd: int, mapping: mmap.mmap, header: ChangeLogHeader) -> None:
        self.path = path
        self.header = header
        self.data = memoryview(mapping)
        self.sealed_end = FRAMES_OFFSET
        self.next_sequence = header.first_sequence
        self.dirty = False  # something was sealed since the last sync began
        self._fd = fd
        self._holders = 1  # of the descriptor, which the last one closes
        self._lock = threading.Lock()  # of that count, never held while the disk works
        self._mapping = mapping
        self._index_sequences = [header.first_sequence]
        self._index_offsets = [FRAMES_OFFSET]

    @property
    def first_sequence(self) -> int:
        return self.header.first_sequence

    @property
    def is_empty(self) -> bool:
        """Whether it holds no frame."""
        return self.next_sequence == self.first_sequence

    @classmethod
    def create(
        cls,
        path: Path,
        machine_id: uuid.UUID,
        first_sequence: int,
        file_bytes: int,
        created_ns: int,
        *,
        mapping: mmap.mmap | None = None,
    ) -> LogFile:
        """Make the file at `path`, over the space of what lies at `making(path)`, if anything does.

        It gets its name when it has its header, so that a file of that name is a change log whenever the agent dies.
        Whatever the reason why it can't be made, a full disk or a failing one, the log has no further room.

        Args:
            mapping: of what lies there, if it is mapped still.

        Raises:
            LimitError: it can't be made.
        """
        unfinished = making(path)
        try:
            fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, file_bytes)
                mapping = mmap.mmap(fd, file_bytes) if mapping is None else mapping
                header = ChangeLogHeader(machine_id, first_sequence, file_bytes, created_ns)
                created = cls(path, fd, mapping, header)
                changelog.stage_frame(created.data, 0, 0)
                created.data[: changelog.HEADER_BYTES] = header.pack()
                os.replace(unfinished, path)
                _sync_directory(path.parent)  # a frame that is durable in a file that is not there is lost
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            for left in (unfinished, path):
                with contextlib.suppress(OSError):
                    os.unlink(left)
            raise LimitError(
                f"no room for a change log of {file_bytes} bytes at {path}: {error.strerror}",
                hint="free space there, or set a smaller journal_bytes",
                path=str(path),
            ) from None
        return created

    @classmethod
    def open(cls, path: Path, *, trust_staging: bool) -> tuple[LogFile, Scan]:
        """Open an existing file and find its end.

        Raises:
            CorruptionError: it is no change log.
            PermanentError: it can't be opened.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PermanentError(f"the change log {path} can't be opened: {error.strerror}", path=str(path)) from None
        try:
            size = os.fstat(fd).st_size
            header = changelog.read_header(os.pread(fd, changelog.HEADER_BYTES, 0))
            mapping = mmap.mmap(fd, max(size, 1))
        except BaseException:
            os.close(fd)
            raise
        opened = cls(path, fd, mapping, header)
        try:
            found = changelog.scan(opened.data, trust_staging=trust_staging)
        except BaseException:
            opened.close()
            raise
        for entry in found.frames:
            opened.sealed(entry.frame_bytes, entry.next_sequence)
        return opened, found

    def sealed(self, frame_bytes: int, next_sequence: int) -> None:
        """A frame of so many bytes was finished at `sealed_end`."""
        if self.sealed_end - self._index_offsets[-1] >= _INDEX_STEP:
            self._index_sequences.append(self.next_sequence)
            self._index_offsets.append(self.sealed_end)
        self.sealed_end += frame_bytes
        self.next_sequence = next_sequence
        self.dirty = True

    def frames_from(self, sequence: int, most_bytes: int) -> memoryview | None:
        """Whole frames from the one that holds `sequence` on: at least one, else at most `most_bytes`.

        Raises:
            CorruptionError: a header is damaged, so that it can't be told where the next frame begins.
        """
        if not self.first_sequence <= sequence < self.next_sequence:
            return None
        row = bisect_right(self._index_sequences, sequence) - 1
        offset, at = self._index_offsets[row], self._index_sequences[row]
        length, count = self._lengths(offset)
        while at + count <= sequence:
            offset, at = offset + length, at + count
            length, count = self._lengths(offset)
        end = offset + length
        while end < self.sealed_end:
            length, count = self._lengths(end)
            if end + length - offset > most_bytes:
                break
            end += length
        return self.data[offset:end]

    def sync(self) -> None:
        """Make everything stored so far durable. May run on another thread, one at a time.

        A file that was retired by then, or is meanwhile, needs no syncing: all it held is in storage.
        """
        with self._lock:
            if not self._holders:
                return
            self._holders += 1
        try:
            os.fdatasync(self._fd)
        finally:
            self._let_go()

    def close(self) -> None:
        """Unmap; views handed out before keep their memory until they go."""
        unmap(self.retire())

    def retire(self) -> mmap.mmap:
        """Close all but the mapping, and give that away: with it the file's pages need not be faulted in again."""
        self.data.release()
        self._let_go()
        return self._mapping

    def _let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                os.close(self._fd)

    def _lengths(self, offset: int) -> tuple[int, int]:
        """Of the frame at `offset`: its length, in bytes, and its descriptors. Its checksum is its reader's matter."""
        if offset + frame.HEADER_BYTES <= self.sealed_end:
            payload_bytes, count = _LENGTHS.unpack_from(self.data, offset + 8)
            length: int = frame.HEADER_BYTES + frame.padded(payload_bytes) + count * frame.DESCRIPTOR_BYTES
            if offset + length <= self.sealed_end:
                return length, count
        raise CorruptionError(
            f"the change log {self.path} was damaged since it was written: no frame is at byte {offset}",
            hint="look for a fault of the disk that it is on; after a restart what it held is compared with the disks",
            path=str(self.path),
            offset=offset,
        )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
