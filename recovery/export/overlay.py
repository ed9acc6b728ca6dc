"""A file that takes what is written over a disk of a point, and gives it back: thrown away at the end, or kept.

The file's layout is `replicar.formats.overlay`; why it can be killed, or lose its power, is there too. A write puts the
data into the file and then its bits into the volatile bitmap; `flush` makes the data durable and then the bits that
stood before it. An overlay whose flush failed says so for good: the kernel forgets what it could not write.

A kept overlay is opened again over the same disk of the same point only, and by one process at a time. `changed` lists
what it holds, for whoever wants to know what differs from the point.

Weak: sectors that were zeroed are kept as holes of the file, so a file system without holes keeps them as zeros. That
the volatile bits are believed within one boot takes for granted that the overlay's file system was not lost meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from recovery.export.bitmap import Bitmap
from recovery.holes import READ_BYTES, held, make_zeros
from replicar.control.files import sync_directory
from replicar.errors import ConflictError, PermanentError, TransientError
from replicar.formats import overlay as layout
from replicar.formats.frame import SECTOR_BYTES, Buffer
from replicar.formats.overlay import PAGE_BYTES, Base, OverlayHeader

#: Of the bitmap, looked at in one piece: 8 GiB of the disk.
_WINDOW_SECTORS: Final = 1 << 24
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Overlay:
    """An open overlay. Its reads and writes are for the event loop, `flush` for a thread beside them."""

    def __init__(self, descriptor: int, header: OverlayHeader, *, kept: bool, writable: bool = True) -> None:
        self.base = header.base
        self._header, self._fd, self._kept, self._writable = header, descriptor, kept, writable
        self._bitmap = Bitmap(header.bitmap_bytes)
        self._failed = False
        self._flushing = threading.Lock()

    @classmethod
    def thrown_away(cls, directory: Path, base: Base) -> Self:
        """An overlay without a name: it is gone when it is closed, or its process ends in any way.

        Raises:
            PermanentError: there can be no file in that directory.
        """
        header = OverlayHeader(base, 0)
        try:
            descriptor, name = tempfile.mkstemp(prefix=".replicar-overlay-", dir=directory)
            os.unlink(name)
            os.ftruncate(descriptor, header.data_offset + base.disk_bytes)
        except OSError as error:
            raise _unusable(directory, error) from error
        return cls(descriptor, header, kept=False)

    @classmethod
    def kept(cls, path: Path, base: Base, *, created_ns: int, boot_id: uuid.UUID | None = None) -> Self:
        """The overlay at `path`, made if there is none.

        Args:
            boot_id: of the running system; None: as it says itself.

        Raises:
            PermanentError: the file can't be used, or is over another disk or point.
            CorruptionError: the file is no overlay.
            TransientError: somebody else has it open.
        """
        if not path.exists():
            _make(path, OverlayHeader(base, created_ns))
        opened = cls._open(path, writable=True)
        try:
            if opened.base != base:
                raise _other_base(path, opened.base, base)
            opened._begin(boot_id or system_boot_id())
        except BaseException:
            os.close(opened._fd)
            raise
        return opened

    @classmethod
    def to_read(cls, path: Path, *, boot_id: uuid.UUID | None = None) -> Self:
        """The overlay at `path`, to be read only; errors as for `kept`."""
        opened = cls._open(path, writable=False)
        opened._load(boot_id or system_boot_id())
        return opened

    @classmethod
    def _open(cls, path: Path, *, writable: bool) -> Self:
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            _lock(descriptor, path, exclusive=writable)
            header = layout.read_header(os.pread(descriptor, layout.HEADER_BYTES, 0))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, header, kept=True, writable=writable)

    # --- what is served ---

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the overlay's own sectors; of others nobody knows what they are."""
        data = os.pread(self._fd, length, self._header.data_offset + offset)
        if len(data) < length:
            raise OSError(errno.EIO, "the overlay's file was cut short")
        return data

    def write(self, offset: int, data: Buffer) -> None:
        """Put whole sectors over the disk.

        Raises:
            OSError: the file can't take them (there is no space); the sectors are what they were, or what was written.
        """
        view, place = memoryview(data), self._header.data_offset + offset
        while len(view):
            count = os.pwrite(self._fd, view, place)
            view, place = view[count:], place + count
        self._claim(offset, len(data))

    def zero(self, offset: int, length: int) -> None:
        """Make whole sectors zeros, and forget what they held. Raises as `write`."""
        place = self._header.data_offset + offset
        make_zeros(self._fd, place, length)
        self._claim(offset, length)

    def changed(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) of the sectors that are the overlay's, ascending; a long run may come in several."""
        end = (self.base.disk_bytes if length is None else offset + length) // SECTOR_BYTES
        for first in range(offset // SECTOR_BYTES, end, _WINDOW_SECTORS):
            for start, stop in self._bitmap.runs(first, min(first + _WINDOW_SECTORS, end)):
                yield start * SECTOR_BYTES, (stop - start) * SECTOR_BYTES

    def stretches(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """A range of the overlay's own sectors as (offset, length, whether it is a hole of the file)."""
        base, at = self._header.data_offset, offset
        for start, stop in held(self._fd, base + offset, length):
            start = max((start - base) // SECTOR_BYTES * SECTOR_BYTES, at)
            stop = min(-(-(stop - base) // SECTOR_BYTES) * SECTOR_BYTES, offset + length)
            if start > at:
                yield at, start - at, True
            if stop > start:
                yield start, stop - start, False
            at = max(stop, at)
        if at < offset + length:
            yield at, offset + length - at, True

    def flush(self) -> None:
        """All that was written before is durable when this returns. For threads.

        Raises:
            OSError: it may not be; neither will any later flush be believed.
        """
        if not self._kept or not self._writable:
            return
        with self._flushing:
            if self._failed:
                raise OSError(errno.EIO, "an earlier flush of the overlay failed")
            pages = self._bitmap.take_dirty()
            try:
                os.fdatasync(self._fd)
                for number, data in pages.items():
                    os.pwrite(self._fd, data, self._header.durable_offset + number * PAGE_BYTES)
                if pages:
                    os.fdatasync(self._fd)
            except OSError:
                self._failed = True
                raise

    def close(self) -> None:
        """Flush, and let go of the file; one that is kept needs no volatile bits after this. Raises as `flush`."""
        try:
            self.flush()
            if self._kept and self._writable:
                self._set_session(None)
        finally:
            os.close(self._fd)

    # --- bits ---

    def _claim(self, offset: int, length: int) -> None:
        first, last = offset // SECTOR_BYTES, (offset + length) // SECTOR_BYTES
        if self._kept:  # before memory knows of it, so that a write that fails has changed nothing
            bits = self._bitmap.preview(first, last).tobytes()
            os.pwrite(self._fd, bits, self._header.volatile_offset + first // 8)
        self._bitmap.add(first, last)

    def _load(self, boot_id: uuid.UUID) -> bool:
        """Read the bitmap that is to be believed; whether it is the volatile one."""
        session = layout.read_session(os.pread(self._fd, layout.SESSION_BYTES, layout.SESSION_OFFSET))
        same_boot = session == boot_id
        start = self._header.volatile_offset if same_boot else self._header.durable_offset
        for place, end in held(self._fd, start, self._header.bitmap_bytes):
            for at in range(place, end, READ_BYTES):
                self._bitmap.load(at - start, os.pread(self._fd, min(READ_BYTES, end - at), at))
        return same_boot

    def _begin(self, boot_id: uuid.UUID) -> None:
        """From here on the volatile bitmap is this boot's."""
        header = self._header
        try:
            if self._load(boot_id):
                self._bitmap.dirty.update(self._bitmap.set_pages())
                self.flush()  # what was only volatile: its data is in this system's memory at least
                return
            self._set_session(None)
            make_zeros(self._fd, header.volatile_offset, header.bitmap_bytes)
            for number in self._bitmap.set_pages():
                os.pwrite(self._fd, self._bitmap.page(number), header.volatile_offset + number * PAGE_BYTES)
            os.fdatasync(self._fd)
            self._set_session(boot_id)
        except OSError as error:
            raise PermanentError(
                f"the overlay can't be taken up: {error.strerror}", hint="it needs a file system with holes, and space"
            ) from error

    def _set_session(self, boot_id: uuid.UUID | None) -> None:
        os.pwrite(self._fd, layout.pack_session(boot_id), layout.SESSION_OFFSET)
        os.fdatasync(self._fd)


def _make(path: Path, header: OverlayHeader) -> None:
    """A new overlay, which is at its place only when it is whole."""
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, header.data_offset + header.base.disk_bytes)
            os.pwrite(descriptor, header.pack(), 0)
            os.fsync(descriptor)
            os.link(made, path)  # which, unlike a rename, replaces nobody else's
        finally:
            os.close(descriptor)
            os.unlink(made)
        sync_directory(path.parent)
    except FileExistsError:
        return  # somebody was faster; who opens it finds out who may have it
    except OSError as error:
        raise _unusable(path, error) from error


def system_boot_id() -> uuid.UUID:
    """Of the running kernel: another one after every start."""
    return uuid.UUID(_BOOT_ID.read_text(encoding="ascii").strip())


def _lock(descriptor: int, path: Path, *, exclusive: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TransientError(
            f"the overlay {path} is in use", hint="end the export that has it open, or choose another", path=str(path)
        ) from None


def _other_base(path: Path, found: Base, wanted: Base) -> ConflictError:
    def said(base: Base) -> str:
        return f"disk {base.disk_name} of machine {base.machine_id} after sequence {base.sequence}"

    return ConflictError(
        f"the overlay {path} lies over {said(found)}, not over {said(wanted)}",
        hint=f"choose that point again (--sequence {found.sequence}), or another file for the overlay",
        ours=said(wanted),
        theirs=said(found),
        path=str(path),
    )


def _unusable(path: Path, error: OSError) -> PermanentError:
    return PermanentError(
        f"there can be no overlay at {path}: {error.strerror}",
        hint="check that its directory is there, is yours and has space",
        path=str(path),
    )
