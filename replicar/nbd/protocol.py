"""NBD, the network block device protocol: its words, and the handshake as a state machine without a socket.

Fixed newstyle handshake: EXPORT_NAME, ABORT, LIST, INFO, GO, STARTTLS, STRUCTURED_REPLY, and the meta context
base:allocation. The specification is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; names here are
its names without the prefix.

Where TLS is required nothing is told to anybody before it: every other option is refused (or, where there is no way to
refuse, hung up on). What was negotiated before TLS counts for nothing after it, and a client that sends anything behind
STARTTLS before TLS stands is no client but somebody in between (CVE-2021-3716 is of that kind): it is hung up on.

The transmission phase is not here: it is the hot path, and lives with each server where its bytes move.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Final

from replicar.errors import CorruptionError
from replicar.formats.frame import SECTOR_BYTES, Buffer

_NBDMAGIC: Final = b"NBDMAGIC"
_IHAVEOPT: Final = 0x49484156454F5054
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698

#: magic, command flags, type, handle, offset, length
REQUEST: Final = struct.Struct(">IHHQQI")
#: magic, error, handle
REPLY: Final = struct.Struct(">IIQ")

#: Addresses that lead to this machine alone. Elsewhere NBD needs TLS: whoever reaches it owns the disk.
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
#: What a client should send at most. Larger writes are taken in pieces, larger reads are refused.
PREFERRED_MAX_BYTES: Final = 1 << 20
#: What a client may send that never asked (the specification's default).
MAX_REQUEST_BYTES: Final = 32 << 20
_PREFERRED_BLOCK: Final = 4096
_MAX_OPTION_BYTES: Final = 8192


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4  # the whole read in one chunk
    REQ_ONE = 8  # one extent only


class Errno(IntEnum):
    """The protocol's own error numbers (those of Linux)."""

    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ESHUTDOWN = 108


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class _Reply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_INVALID = 0x80000003
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006


class _Info(IntEnum):
    EXPORT = 0
    NAME = 1
    BLOCK_SIZE = 3


#: HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN: a flush on one connection covers
#: what any connection was told is done, because all of them write through one log to one disk.
TRANSMISSION_FLAGS: Final = 1 | 4 | 8 | 0x20 | 0x40 | 0x100
#: HAS_FLAGS, READ_ONLY, SEND_FLUSH (which is nothing then), CAN_MULTI_CONN.
READ_ONLY_FLAGS: Final = 1 | 2 | 4 | 0x100
_SEND_DF: Final = 0x80
_ALLOCATION: Final = b"base:allocation"


class Tls(Enum):
    """Whether a client may, or must, ask for TLS."""

    NONE = "none"
    OFFERED = "offered"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The handshake's result: the client goes on with this export, and has reads answered by structured replies, and
    may ask what lies where (`allocation`), if it wanted that."""

    export: str
    structured: bool = False
    allocation: bool = False


class Handshake:
    """The server's end of the handshake, from greeting to a chosen export.

    `receive(bytes)` returns what to send; then `chosen` is set when transmission begins, `finished` when the client
    gave up. `rest` is what came behind the handshake (requests that were sent ahead). With `starts_tls` set, what was
    returned is the last to be sent plainly; call `secured` when TLS stands.

    Args:
        exports: sizes in bytes by export name. The empty name means the only export, where there is one.
        tls: whether TLS can be had, and whether it is required (which it can only be where it can be had).
        read_only: whether clients are told that they may not write.
    """

    def __init__(self, exports: Mapping[str, int], tls: Tls = Tls.NONE, *, read_only: bool = False) -> None:
        self._exports = exports
        self._tls = tls
        self._allowed = READ_ONLY_FLAGS if read_only else TRANSMISSION_FLAGS
        self._secure = False
        self._structured = False
        self._allocation: str | None = None  # the export that the context was chosen for
        self.starts_tls = False
        self._data = bytearray()
        self._no_zeroes: bool | None = None
        self.chosen: Chosen | None = None
        self.finished = False

    @staticmethod
    def greeting() -> bytes:
        """FIXED_NEWSTYLE and NO_ZEROES offered."""
        return _NBDMAGIC + struct.pack(">QH", _IHAVEOPT, 3)

    @property
    def rest(self) -> bytes:
        return bytes(self._data)

    def receive(self, data: Buffer) -> bytes:
        """Take what arrived; give what to answer.

        Raises:
            CorruptionError: this is no NBD client.
        """
        self._data += data
        if self._no_zeroes is None:
            if len(self._data) < 4:
                return b""
            flags = int.from_bytes(self._data[:4], "big")
            if flags & ~3 or not flags & 1:
                raise CorruptionError(f"an NBD client with flags {flags:#x}; only fixed newstyle is spoken here")
            self._no_zeroes = bool(flags & 2)
            del self._data[:4]
        answer = b""
        while self.chosen is None and not self.finished and (option := self._next_option()) is not None:
            answer += self._answer(*option)
            if self.starts_tls:
                if self._data:
                    raise CorruptionError("an NBD client that goes on in the clear after it asked for TLS")
                break
        return answer

    def secured(self) -> None:
        """TLS stands: the handshake goes on within it, and begins anew with what it negotiated."""
        self.starts_tls, self._secure = False, True
        self._structured, self._allocation = False, None

    def _next_option(self) -> tuple[int, bytes] | None:
        if len(self._data) < 16:
            return None
        magic, option, length = struct.unpack_from(">QII", self._data)
        if magic != _IHAVEOPT or length > _MAX_OPTION_BYTES:
            raise CorruptionError("an NBD client that sends no option where one belongs")
        if len(self._data) < 16 + length:
            return None
        body = bytes(self._data[16 : 16 + length])
        del self._data[: 16 + length]
        return option, body

    def _answer(self, option: int, body: bytes) -> bytes:
        if self._tls is Tls.REQUIRED and not self._secure and option not in (Option.STARTTLS, Option.ABORT):
            self.finished = option == Option.EXPORT_NAME  # the protocol has no way to refuse it but to hang up
            return b"" if self.finished else _reply(option, _Reply.ERR_TLS_REQD, b"this disk is served over TLS only")
        match option:
            case Option.STARTTLS if self._tls is not Tls.NONE and not self._secure:
                if body:
                    return _reply(option, _Reply.ERR_INVALID)
                self.starts_tls = True
                return _reply(option, _Reply.ACK)
            case Option.STRUCTURED_REPLY:
                self._structured = self._structured or not body
                return _reply(option, _Reply.ERR_INVALID if body else _Reply.ACK)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                return self._contexts(option, body)
            case Option.EXPORT_NAME:
                export = self._resolve(body)
                if export is None:  # the protocol has no way to say it here but to hang up
                    self.finished = True
                    return b""
                self._choose(export)
                head = struct.pack(">QH", self._exports[export], self._flags)
                return head if self._no_zeroes else head + bytes(124)
            case Option.ABORT:
                self.finished = True
                return _reply(option, _Reply.ACK)
            case Option.LIST if body:
                return _reply(option, _Reply.ERR_INVALID)
            case Option.LIST:
                names = (struct.pack(">I", len(name.encode())) + name.encode() for name in self._exports)
                return b"".join(_reply(option, _Reply.SERVER, name) for name in names) + _reply(option, _Reply.ACK)
            case Option.INFO | Option.GO:
                return self._describe(option, body)
            case _:
                return _reply(option, _Reply.ERR_UNSUP)

    def _describe(self, option: int, body: bytes) -> bytes:
        if len(body) < 6:
            return _reply(option, _Reply.ERR_INVALID)
        (length,) = struct.unpack_from(">I", body)
        if len(body) < 4 + length + 2:
            return _reply(option, _Reply.ERR_INVALID)
        (count,) = struct.unpack_from(">H", body, 4 + length)
        if len(body) != 6 + length + 2 * count:
            return _reply(option, _Reply.ERR_INVALID)
        export = self._resolve(body[4 : 4 + length])
        if export is None:
            return _reply(option, _Reply.ERR_UNKNOWN, b"no disk of that name is served here")
        size = self._exports[export]
        name = export.encode()
        blocks = struct.pack(">HIII", _Info.BLOCK_SIZE, SECTOR_BYTES, _PREFERRED_BLOCK, PREFERRED_MAX_BYTES)
        answer = _reply(option, _Reply.INFO, struct.pack(">HQH", _Info.EXPORT, size, self._flags))
        answer += _reply(option, _Reply.INFO, struct.pack(">H", _Info.NAME) + name)
        answer += _reply(option, _Reply.INFO, blocks) + _reply(option, _Reply.ACK)
        if option == Option.GO:
            self._choose(export)
        return answer

    def _contexts(self, option: int, body: bytes) -> bytes:
        """What may be asked of an export: base:allocation, by name, or all there is of base."""
        queries = _queries(body)
        if queries is None or not self._structured:
            return _reply(option, _Reply.ERR_INVALID)
        name, wanted = queries
        export = self._resolve(name)
        if export is None:
            return _reply(option, _Reply.ERR_UNKNOWN, b"no disk of that name is served here")
        listing = option == Option.LIST_META_CONTEXT
        found = _ALLOCATION in wanted or (listing and (not wanted or b"base:" in wanted))
        if not listing:
            self._allocation = export if found else None
        answer = _reply(option, _Reply.ACK)
        if found:
            number = struct.pack(">I", 0 if listing else 1)
            answer = _reply(option, _Reply.META_CONTEXT, number + _ALLOCATION) + answer
        return answer

    @property
    def _flags(self) -> int:
        return self._allowed | (_SEND_DF if self._structured else 0)

    def _choose(self, export: str) -> None:
        self.chosen = Chosen(export, self._structured, self._allocation == export)

    def _resolve(self, name: bytes) -> str | None:
        if not name and len(self._exports) == 1:
            return next(iter(self._exports))
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None
        return text if text in self._exports else None


def _queries(body: bytes) -> tuple[bytes, list[bytes]] | None:
    """An export's name and the queries about it; None if they are not well formed."""
    words, at = [], 0
    try:
        (length,) = struct.unpack_from(">I", body)
        name, at = body[4 : 4 + length], 8 + length
        (count,) = struct.unpack_from(">I", body, 4 + length)
        for _ in range(min(count, _MAX_OPTION_BYTES)):
            (length,) = struct.unpack_from(">I", body, at)
            words.append(body[at + 4 : at + 4 + length])
            at += 4 + length
    except struct.error:
        return None
    return (name, words) if at == len(body) and len(words) == count else None


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY_MAGIC, option, kind, len(data)) + data
