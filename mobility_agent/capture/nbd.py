"""NBD, the network block device protocol: its words, and the handshake as a state machine without a socket.

Fixed newstyle handshake (NBD_OPT_EXPORT_NAME, ABORT, LIST, INFO, GO), then simple replies. The specification is
https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; names here are its names without the prefix.

The transmission phase is not here: it is the hot path, and lives in `inline` where bytes move. TLS and structured
replies are answered as unsupported, which clients take well.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
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


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2


class Errno(IntEnum):
    """The protocol's own error numbers (those of Linux)."""

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


class _Reply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 0x80000001
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006


class _Info(IntEnum):
    EXPORT = 0
    NAME = 1
    BLOCK_SIZE = 3


#: HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN: a flush on one connection covers
#: what any connection was told is done, because all of them write through one log to one disk.
TRANSMISSION_FLAGS: Final = 1 | 4 | 8 | 0x20 | 0x40 | 0x100


@dataclass(frozen=True, slots=True)
class Chosen:
    """The handshake's result: the client goes on with this export."""

    export: str


class Handshake:
    """The server's end of the handshake, from greeting to a chosen export.

    `receive(bytes)` returns what to send; then `chosen` is set when transmission begins, `finished` when the client
    gave up. `rest` is what came behind the handshake (requests that were sent ahead).

    Args:
        exports: sizes in bytes by export name. The empty name means the only export, where there is one.
    """

    def __init__(self, exports: Mapping[str, int]) -> None:
        self._exports = exports
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
        return answer

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
        match option:
            case Option.EXPORT_NAME:
                export = self._resolve(body)
                if export is None:  # the protocol has no way to say it here but to hang up
                    self.finished = True
                    return b""
                self.chosen = Chosen(export)
                head = struct.pack(">QH", self._exports[export], TRANSMISSION_FLAGS)
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
        answer = _reply(option, _Reply.INFO, struct.pack(">HQH", _Info.EXPORT, size, TRANSMISSION_FLAGS))
        answer += _reply(option, _Reply.INFO, struct.pack(">H", _Info.NAME) + name)
        answer += _reply(option, _Reply.INFO, blocks) + _reply(option, _Reply.ACK)
        if option == Option.GO:
            self.chosen = Chosen(export)
        return answer

    def _resolve(self, name: bytes) -> str | None:
        if not name and len(self._exports) == 1:
            return next(iter(self._exports))
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None
        return text if text in self._exports else None


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY_MAGIC, option, kind, len(data)) + data
