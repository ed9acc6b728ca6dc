"""How a request is answered on the wire: simple replies, or structured ones where the client asked for them.

A structured reply to a read is made of chunks, so that holes cost nothing and an error says in words what it is; the
specification wants it for reads and for what lies where (BLOCK_STATUS), and lets everything else be answered simply.
So writes, the hot path, are answered alike in both.

Functions here give the parts of an answer, in order; content is passed on, not copied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from replicar.nbd.protocol import REPLY, REPLY_MAGIC

_CHUNK_MAGIC: Final = 0x668E33EF
#: magic, flags, type, handle, length
_CHUNK: Final = struct.Struct(">IHHQI")
_DONE: Final = 1
_OFFSET_DATA: Final = 1
_OFFSET_HOLE: Final = 2
_BLOCK_STATUS: Final = 5
_ERROR: Final = 0x8001
#: The one meta context there is, base:allocation, and what it says of a range.
ALLOCATION_CONTEXT: Final = 1
ALLOCATED: Final = 0
HOLE_AND_ZERO: Final = 3

#: Of a range that was read: its offset, its length, and its content, or None for a hole.
Part = tuple[int, int, bytes | None]


def simple(handle: int, error: int, content: bytes | None = None) -> list[bytes]:
    """A reply of the old kind; content only where there is no error."""
    head = REPLY.pack(REPLY_MAGIC, error, handle)
    return [head, content] if content else [head]


def chunks(handle: int, parts: Iterable[Part]) -> list[bytes]:
    """The answer to a read that went well; at least one part."""
    answer: list[bytes] = []
    found = list(parts)
    for number, (offset, length, content) in enumerate(found):
        flags = _DONE if number == len(found) - 1 else 0
        if content is None:
            head = _CHUNK.pack(_CHUNK_MAGIC, flags, _OFFSET_HOLE, handle, 12)
            answer.append(head + struct.pack(">QI", offset, length))
        else:
            head = _CHUNK.pack(_CHUNK_MAGIC, flags, _OFFSET_DATA, handle, 8 + length)
            answer += [head + struct.pack(">Q", offset), content]
    return answer


def failure(handle: int, error: int, words: str) -> list[bytes]:
    """The answer to a read, or a question what lies where, that failed."""
    text = words.encode()[:4096]
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE, _ERROR, handle, 6 + len(text))
    return [head + struct.pack(">IH", error, len(text)) + text]


def block_status(handle: int, extents: Iterable[tuple[int, int]]) -> list[bytes]:
    """What lies where: (length, ALLOCATED or HOLE_AND_ZERO) of consecutive extents."""
    body = struct.pack(">I", ALLOCATION_CONTEXT) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return [_CHUNK.pack(_CHUNK_MAGIC, _DONE, _BLOCK_STATUS, handle, len(body)) + body]
