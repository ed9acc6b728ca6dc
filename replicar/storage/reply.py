"""An HTTP answer as an uploader has to understand it: status, headers, and where it ends. Pure: bytes in, a reply out.

Strict: what is not plainly an answer of HTTP/1.1 is none, and the connection it came over is not used again. A body is
passed over; what the service has to say to a program stands in its headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: Head and body together; a longer answer is not worth its connection.
MAX_REPLY_BYTES: Final = 64 << 10
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


class NoReplyError(OSError):
    """What came is no answer, or less than one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was answered; header names in lower case. `keeps` says whether the connection may be used again."""

    status: int
    headers: Mapping[str, str]
    keeps: bool


def read_reply(data: bytes) -> Reply | None:
    """The answer that `data` begins with, interim ones passed over; None while it is not all there.

    Raises:
        NoReplyError: it is none, or longer than it may be.
    """
    start = 0
    while True:
        end = data.find(b"\r\n\r\n", start)
        if end < 0:
            _allow_more(data)
            return None
        status, headers = _head(data[start:end])
        if status >= 200:
            break
        start = end + 4
    if status in (204, 304):
        over: int | None = end + 4
    elif "chunked" in headers.get("transfer-encoding", "").lower():
        over = _chunks_end(data, end + 4)
    elif (length := headers.get("content-length")) is not None:
        if not length.isascii() or not length.isdigit() or len(length) > 9:
            raise NoReplyError("a content length that is no number")
        over = end + 4 + int(length)
    else:  # it ends with the connection
        return Reply(status, headers, keeps=False)
    if over is None or over > len(data):
        if over is not None and over > MAX_REPLY_BYTES:
            return Reply(status, headers, keeps=False)
        _allow_more(data)
        return None
    keeps = over == len(data) and headers.get("connection", "").lower() != "close"
    return Reply(status, headers, keeps)


def _allow_more(data: bytes) -> None:
    if len(data) >= MAX_REPLY_BYTES:
        raise NoReplyError("an answer that does not end")


def _head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.split(b"\r\n")
    found = _STATUS.fullmatch(first)
    if found is None:
        raise NoReplyError("no answer of HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not name or name != name.strip():
            raise NoReplyError("a header that is none")
        headers[name.lower()] = value.strip()
    return int(found[1]), headers


def _chunks_end(data: bytes, start: int) -> int | None:
    """Where a chunked body is over, trailers (which nobody sends here) refused; None while it is not all there."""
    while True:
        found = _CHUNK.match(data, start)
        if found is None:
            if len(data) - start > 256:
                raise NoReplyError("a chunk without a size")
            return None
        size = int(found[1], 16)
        start = found.end() + size + 2
        if start > len(data):
            return None
        if data[start - 2 : start] != b"\r\n":
            raise NoReplyError("a chunk that is longer than it says")
        if not size:
            return start
