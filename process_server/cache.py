"""The cache file: what agents sent and storage does not have yet, durable across the death of this process.

    slot 0 | slot 1 | ...          each slot:  header page 4096 | 4 MiB of frames, back to back

    header page:  magic 8 | version u32 | header bytes u32 | machine id 16 | serial u64 | first sequence u64 |
                  XXH3-64 of these 48 bytes u64 | zeros

One slot belongs to one machine at a time and holds a run of whole frames. `serial` rises over the whole file, so the
slots of a machine have an order; `first sequence` is what was expected next when the slot was taken. Where the frames
end is not written down: frames carry checksums and sequences, so a reader goes on while they are sound and in order,
and what an earlier use of the slot left behind is never both. A frame that was rewritten with its page holds the same
bytes in both versions, so no crash can take back what a sync has made durable.

The file is preallocated and written with O_DIRECT: measured, going past the page cache halves the server's cost. Where
the filesystem refuses O_DIRECT (some in-memory ones), buffered writes and the same fdatasync do.

Promise 1 does not hang on this file: agents keep everything until it is *stored*. It is here so that a restart need not
fetch it all again, and so that a machine's link need not be as slow as storage is at the moment.

All methods block and are called in threads. Weak: a reused slot's first page is its header, so two pages of a slot are
written where one would do; and the first use of a preallocated place costs the filesystem a journal entry.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from replicar.errors import CorruptionError, LimitError, PermanentError

MAGIC: Final = b"RPCACHE\x01"
VERSION: Final = 1
PAGE_BYTES: Final = 4096
PAYLOAD_BYTES: Final = 4 << 20
SLOT_BYTES: Final = PAGE_BYTES + PAYLOAD_BYTES
#: One slot to receive into and one to store from, for two machines at once; less is no cache.
MIN_SLOTS: Final = 4

_HEADER = struct.Struct("<8sII16sQQ")
_MODE = 0o600


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """The first page of a slot: whose it is, and where in its stream."""

    machine_id: uuid.UUID
    serial: int
    first_sequence: int

    def pack(self) -> bytes:
        body = _HEADER.pack(MAGIC, VERSION, PAGE_BYTES, self.machine_id.bytes, self.serial, self.first_sequence)
        return (body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))).ljust(PAGE_BYTES, b"\0")


@dataclass(frozen=True, slots=True)
class PageWrite:
    """Bytes [start, end) of slot `index`'s payload, whole pages; with `header` when the slot has none on disk yet."""

    index: int
    header: SlotHeader | None
    buffer: memoryview
    start: int
    end: int


def read_header(page: bytes | memoryview) -> SlotHeader | None:
    """Decode a slot's first page; None for a slot that was never used, or whose header is damaged.

    Raises:
        CorruptionError: a later version wrote it.
    """
    body = bytes(page[: _HEADER.size])
    magic, version, header_bytes, machine, serial, first = _HEADER.unpack(body)
    if magic != MAGIC or struct.unpack_from("<Q", page, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(body):
        return None
    if version != VERSION or header_bytes != PAGE_BYTES:
        raise CorruptionError(f"cache version {version} is not known here", hint="upgrade this process server")
    return SlotHeader(uuid.UUID(bytes=machine), serial, first)


class CacheFile:
    """The open cache file. `slots` is how many it has; `direct` whether it goes past the page cache."""

    def __init__(self, path: Path, descriptor: int, slots: int, *, direct: bool) -> None:
        self.path = path
        self.slots = slots
        self.direct = direct
        self._descriptor = descriptor
        # O_DIRECT wants aligned memory for headers too; one page each for the writer's and the scanner's thread.
        self._header_page = memoryview(mmap.mmap(-1, PAGE_BYTES))

    @classmethod
    def open(cls, path: Path, cache_bytes: int) -> CacheFile:
        """Open or make the file, with all its space really there.

        Raises:
            PermanentError: too small a size, not enough space, or somebody else has the file; naming path and sizes.
        """
        slots = cache_bytes // SLOT_BYTES
        if slots < MIN_SLOTS:
            raise PermanentError(
                f"a cache of {cache_bytes} bytes is too small: {MIN_SLOTS * SLOT_BYTES} is the least",
                hint="raise cache_bytes",
                cache_bytes=cache_bytes,
            )
        try:
            descriptor, direct = _open(path)
        except OSError as error:
            raise PermanentError(
                f"can't open the cache {path}: {error.strerror}", hint="check `directory` and its owner", path=str(path)
            ) from None
        try:
            _lock(descriptor, path)
            _allocate(descriptor, path, slots * SLOT_BYTES)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, slots, direct=direct)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def write(self, writes: Sequence[PageWrite]) -> None:
        """Write all ranges, then make them durable with one sync. Called by one thread at a time.

        Raises:
            LimitError: there is no space; the same may be written again when there is.
            PermanentError: the disk refused; nothing of it counts as durable.
        """
        try:
            for each in writes:
                self._write(each)
            os.fdatasync(self._descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full() from None
            raise self._failed("write", error) from None

    def sync(self) -> None:
        """Make durable what an earlier process may have written without its last sync."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failed("sync", error) from None

    def read(self, index: int, start: int, end: int, into: memoryview) -> None:
        """Read bytes [start, end) of a slot's payload to the same place in `into`; whole pages, aligned memory.

        Raises:
            CorruptionError: the disk can't give them back (a bad sector).
        """
        try:
            while start < end:
                got = os.preadv(self._descriptor, [into[start:end]], _place(index) + PAGE_BYTES + start)
                if not got:
                    raise OSError(errno.EIO, "the file is shorter than it was")
                start += got
        except OSError as error:
            raise CorruptionError(
                f"slot {index} of the cache {self.path} can't be read: {error.strerror}",
                hint="the agent will be asked for it again; look at the disk's health",
                path=str(self.path),
                slot=index,
            ) from None

    def headers(self) -> list[tuple[int, SlotHeader]]:
        """The headers of all slots that have one, with their indices. A page that can't be read is as none."""
        page = memoryview(mmap.mmap(-1, PAGE_BYTES))
        found: list[tuple[int, SlotHeader]] = []
        for index in range(self.slots):
            try:
                if os.preadv(self._descriptor, [page], _place(index)) != PAGE_BYTES:
                    continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise self._failed("read", error) from None
                continue
            header = read_header(page)
            if header is not None:
                found.append((index, header))
        return found

    def _write(self, each: PageWrite) -> None:
        start, place = each.start, _place(each.index)
        if each.header is not None:
            self._header_page[:] = each.header.pack()
            if start == 0:  # header and first pages lie side by side: one write
                done = os.pwritev(self._descriptor, [self._header_page, each.buffer[: each.end]], place) - PAGE_BYTES
                start = max(done, 0)
                if done < 0:
                    raise OSError(errno.EIO, "a header was written in part")
            elif os.pwritev(self._descriptor, [self._header_page], place) != PAGE_BYTES:
                raise OSError(errno.EIO, "a header was written in part")
        while start < each.end:
            start += os.pwritev(self._descriptor, [each.buffer[start : each.end]], place + PAGE_BYTES + start)

    def _full(self) -> LimitError:
        return LimitError(
            f"the disk of the cache {self.path} is full",
            hint="free some space there; until then changes are stored from memory, slower, and none are refused",
            path=str(self.path),
        )

    def _failed(self, what: str, error: OSError) -> PermanentError:
        return PermanentError(
            f"can't {what} the cache {self.path}: {error.strerror}",
            hint="replace or free the disk and start again; agents keep everything that is not in storage yet",
            path=str(self.path),
            errno=error.errno,
        )


def page_floor(offset: int) -> int:
    """`offset` down to a page's start."""
    return offset & -PAGE_BYTES


def page_ceiling(offset: int) -> int:
    """`offset` up to a page's end."""
    return (offset + PAGE_BYTES - 1) & -PAGE_BYTES


def _place(index: int) -> int:
    return index * SLOT_BYTES


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, _MODE), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, _MODE), False


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermanentError(
            f"another process server has the cache {path} open",
            hint="stop it first, or give this one a directory of its own",
            path=str(path),
        ) from None


def _allocate(descriptor: int, path: Path, wanted: int) -> None:
    status = os.fstat(descriptor)
    space = os.fstatvfs(descriptor)
    free = space.f_bavail * space.f_frsize + status.st_blocks * 512
    refusal = PermanentError(
        f"no room for the cache {path}: cache_bytes wants {wanted} bytes, {free} are free",
        hint="free some space, lower cache_bytes, or put `directory` on a larger disk",
        path=str(path),
        wanted_bytes=wanted,
        free_bytes=free,
    )
    if free < wanted:
        raise refusal
    try:
        if status.st_size > wanted:  # a smaller cache than before: agents still have what lay beyond
            os.ftruncate(descriptor, wanted)
        os.posix_fallocate(descriptor, 0, wanted)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise refusal from None
        raise PermanentError(f"can't allocate the cache {path}: {error.strerror}", path=str(path)) from None
