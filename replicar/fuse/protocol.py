"""The kernel's FUSE protocol for a file system that is one directory with one file: bytes in, values and bytes out.

Structures and numbers are those of Linux's include/uapi/linux/fuse.h, protocol 7.31 and what came since as far as it is
asked for here; they are in the machine's own byte order. A request is one read of /dev/fuse, an answer one write.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from replicar.errors import CorruptionError

ROOT: Final = 1
FILE: Final = 2
#: What one write brings at most. A frame of the change log has room for several of these.
MAX_WRITE_BYTES: Final = 256 << 10
#: length, opcode, unique, node, uid, gid, pid, extension
HEADER: Final = struct.Struct("=IIQQIIIHH")
WRITE: Final = struct.Struct("=QQIIQII")
READ: Final = WRITE  # the same fields, of which the first three are of interest
FALLOCATE: Final = struct.Struct("=QQQII")
LSEEK: Final = struct.Struct("=QQII")
#: The largest request: the kernel wants this much room for every read of /dev/fuse.
MAX_REQUEST_BYTES: Final = HEADER.size + WRITE.size + MAX_WRITE_BYTES + 4096
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_OUT = struct.Struct("=IiQ")
_MAJOR: Final = 7
_MINOR: Final = 31
#: Reads run beside each other, writes are larger than a page, direct I/O is asynchronous, max_pages is given.
_WANTED: Final = 1 | 1 << 5 | 1 << 15 | 1 << 22
#: Past the page cache; and writes to places apart need not wait for each other.
_OPEN_FLAGS: Final = 1 | 1 << 6
_NOTIFY_INVALIDATE, _NOTIFY_RESEND = 2, 7
_MAX_BACKGROUND: Final = 64
#: Names and sizes do not change while it is mounted.
_VALID_SECONDS: Final = 3600
PUNCH_HOLE: Final = 0x02
KEEP_SIZE: Final = 0x01
ZERO_RANGE: Final = 0x10


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


#: Requests that nobody waits for an answer to.
SILENT: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))


@dataclass(frozen=True, slots=True)
class Request:
    """A request's header; its body begins at `body` of what was read."""

    opcode: int
    unique: int
    node: int
    body: int
    end: int


def read_request(data: memoryview) -> Request:
    """The request that one read of /dev/fuse gave.

    Raises:
        CorruptionError: it is none, which only somebody else's file at that number could cause.
    """
    if len(data) < HEADER.size:
        raise CorruptionError(f"a FUSE request of {len(data)} bytes")
    length, opcode, unique, node, *_ = HEADER.unpack_from(data)
    if length != len(data):
        raise CorruptionError(f"a FUSE request of {len(data)} bytes that says it has {length}")
    return Request(opcode, unique, node, HEADER.size, length)


def fields(layout: struct.Struct, data: memoryview) -> tuple[int, ...]:
    """A request's body by its layout; a kernel that is newer sends more, one that is older less.

    Raises:
        CorruptionError: it is too short.
    """
    if len(data) < layout.size:
        raise CorruptionError(f"the body of a FUSE request has {len(data)} bytes; {layout.size} are its fields")
    return layout.unpack_from(data)


def content_of(body: memoryview) -> tuple[int, int, memoryview]:
    """What a WRITE is about: offset, the length it claims, and the bytes that came.

    Raises:
        CorruptionError: as `fields`.
    """
    _, offset, length, *_ = fields(WRITE, body)
    return offset, length, body[WRITE.size : WRITE.size + length]


def range_of(body: memoryview) -> tuple[int, int]:
    """What a READ or READDIR is about: offset and length, in bytes.

    Raises:
        CorruptionError: as `fields`.
    """
    _, offset, length, *_ = fields(READ, body)
    return offset, length


def zeroes_of(body: memoryview) -> tuple[int, int] | None:
    """The offset and length in bytes that a FALLOCATE makes zeros; None where it asks for anything else.

    Raises:
        CorruptionError: as `fields`.
    """
    _, offset, length, mode, _ = fields(FALLOCATE, body)
    is_zeroing = mode & KEEP_SIZE and mode & ~KEEP_SIZE in (PUNCH_HOLE, ZERO_RANGE)
    return (offset, length) if is_zeroing else None


def written(unique: int, length: int) -> bytes:
    """The answer to a WRITE of which all is taken."""
    return answer(unique, struct.pack("=II", length, 0))


def answer(unique: int, body: bytes = b"") -> bytes:
    """An answer that went well."""
    return _OUT.pack(_OUT.size + len(body), 0, unique) + body


def answer_head(unique: int, length: int) -> bytes:
    """The head of an answer whose body of `length` bytes is written behind it."""
    return _OUT.pack(_OUT.size + length, 0, unique)


def refusal(unique: int, error: int) -> bytes:
    """An answer that is an error number."""
    return _OUT.pack(_OUT.size, -error, unique)


def resend() -> bytes:
    """What has the kernel ask again whatever was not answered (Linux 6.9)."""
    return _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0)


def forget_attributes() -> bytes:
    """What has the kernel ask for the file's size again, when it is next of interest; it keeps no content of it."""
    body = struct.pack("=Qqq", FILE, -1, 0)
    return _OUT.pack(_OUT.size + len(body), _NOTIFY_INVALIDATE, 0) + body


def init(unique: int, body: memoryview) -> bytes:
    """The answer to INIT: what is spoken here.

    Raises:
        CorruptionError: the kernel speaks another protocol.
    """
    major, _, readahead, offered = _INIT_IN.unpack(bytes(body[: _INIT_IN.size]).ljust(_INIT_IN.size, b"\0"))
    if major != _MAJOR:
        raise CorruptionError(f"the kernel speaks FUSE {major}, and Replicar {_MAJOR}")
    pages = MAX_WRITE_BYTES // os.sysconf("SC_PAGE_SIZE") + 1  # a buffer that begins within a page is not cut there
    out = _INIT_OUT.pack(
        *(_MAJOR, _MINOR, readahead, offered & _WANTED, _MAX_BACKGROUND, _MAX_BACKGROUND * 3 // 4, MAX_WRITE_BYTES),
        *(1, pages, 0, 0),
    )
    return answer(unique, out)


class Tree:
    """What the file system looks like: a directory with one file.

    Args:
        name: of the file.
        size_bytes: of the disk.
    """

    def __init__(self, name: str, size_bytes: int, *, owner: int, group: int, time_ns: int) -> None:
        self._name = os.fsencode(name)
        self._size = size_bytes
        self._owner, self._group = owner, group
        self._seconds = time_ns // 10**9

    def answer(self, request: Request, body: memoryview) -> bytes:
        """The answer to what is not about content; nothing (no bytes) where nobody waits for one.

        Raises:
            CorruptionError: nothing a kernel sends that speaks this protocol.
        """
        unique = request.unique
        match request.opcode:
            case Opcode.INIT:
                return init(unique, body)
            case Opcode.LOOKUP:
                return self.lookup(unique, body)
            case Opcode.GETATTR:
                return self.attributes(unique, request.node)
            case Opcode.OPEN | Opcode.OPENDIR:
                return self.opened(unique, request.node)
            case Opcode.READDIR:
                return self.listing(unique, *range_of(body))
            case Opcode.STATFS:
                return self.space(unique)
            case Opcode.FSYNC | Opcode.FLUSH | Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.DESTROY | Opcode.ACCESS:
                return answer(unique)
            case silent if silent in SILENT:
                return b""
            case _:
                return refusal(unique, errno.ENOSYS)

    def lookup(self, unique: int, body: memoryview) -> bytes:
        if bytes(body).rstrip(b"\0") != self._name:
            return refusal(unique, errno.ENOENT)
        entry = struct.pack("=QQQQII", FILE, 1, _VALID_SECONDS, _VALID_SECONDS, 0, 0)
        return answer(unique, entry + self._attributes(FILE))

    def attributes(self, unique: int, node: int) -> bytes:
        return answer(unique, struct.pack("=QII", _VALID_SECONDS, 0, 0) + self._attributes(node))

    def opened(self, unique: int, node: int) -> bytes:
        """Past the page cache, so that a write is answered when it is in the change log and on the disk."""
        return answer(unique, struct.pack("=QII", node, _OPEN_FLAGS if node == FILE else 0, 0))

    def listing(self, unique: int, offset: int, room: int) -> bytes:
        entries = [(ROOT, b".", stat.S_IFDIR), (ROOT, b"..", stat.S_IFDIR), (FILE, self._name, stat.S_IFREG)]
        found = b""
        for number, (node, name, mode) in enumerate(entries[offset:], offset + 1):
            entry = struct.pack("=QQII", node, number, len(name), mode >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > room:
                break
            found += entry
        return answer(unique, found)

    def space(self, unique: int) -> bytes:
        blocks = self._size // 4096
        return answer(unique, struct.pack("=QQQQQIIII24x", blocks, 0, 0, 1, 0, 4096, 255, 4096, 0))

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFREG | 0o600 if node == FILE else stat.S_IFDIR | 0o700
        size = self._size if node == FILE else 4096
        times = (self._seconds,) * 3
        return _ATTR.pack(
            *(node, size, -(-size // 512), *times, 0, 0, 0, mode, 1 if node == FILE else 2),
            *(self._owner, self._group, 0, 4096, 0),
        )
