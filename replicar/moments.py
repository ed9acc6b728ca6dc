"""Moments as people write them: ISO 8601 with a zone, to the nanosecond, or plain nanoseconds since 1970.

`datetime` knows microseconds only, and a recovery point lies between two writes that may be less than that apart; so
the fraction is kept aside. A moment without a zone is refused: it would be another one on another machine.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from replicar.errors import PermanentError

_NS: Final = 1_000_000_000
_ISO: Final = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)[T ](?P<time>\d\d:\d\d(:\d\d)?)(\.(?P<fraction>\d{1,9}))?(?P<zone>Z|z|[+-]\d\d:?\d\d)?"
)
_HINT: Final = "write it like 2026-11-22T10:00:00.123456Z, with a zone, or as nanoseconds since 1970"


def parse_moment(text: str) -> int:
    """Nanoseconds since 1970-01-01T00:00:00Z.

    Raises:
        PermanentError: when it is no moment, or has no zone.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return _within(int(text), text)
    match = _ISO.fullmatch(text)
    if match is None:
        raise PermanentError(f"{text!r} is no moment", hint=_HINT)
    if match["zone"] is None:
        raise PermanentError(f"{text!r} has no zone", hint=f"add Z for UTC; {_HINT}")
    try:
        whole = datetime.fromisoformat(f"{match['date']}T{match['time']}{match['zone'].upper()}")
    except ValueError as error:
        raise PermanentError(f"{text!r} is no moment: {error}", hint=_HINT) from None
    seconds = int((whole - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    return _within(seconds * _NS + int((match["fraction"] or "").ljust(9, "0")), text)


def _within(time_ns: int, text: str) -> int:
    if not 0 <= time_ns < 1 << 63:
        raise PermanentError(f"{text!r} lies before 1970 or after 2262", hint=_HINT)
    return time_ns


def format_moment(time_ns: int) -> str:
    """The moment in UTC with all nine digits, so that pasting it back means the same."""
    seconds, fraction = divmod(time_ns, _NS)
    try:
        whole = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"  # a clock that was centuries off; still a number that can be pasted back
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"
