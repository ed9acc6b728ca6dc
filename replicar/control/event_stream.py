"""Server-sent events as bytes, both ways: no socket here, bytes in and events out.

The format is that of the HTML standard: lines `id:`, `event:` and `data:`, an empty line behind each event, and lines
that begin with a colon for nothing at all, which say that the line is alive. Ours have one `data:` line each, the JSON
of an `Event`, which says its id and kind again; so a reader needs the data alone, and passes over everything else.
"""

from __future__ import annotations

from typing import Final

from replicar.control.messages import Event
from replicar.errors import LimitError

MEDIA_TYPE: Final = "text/event-stream"
#: What is sent when nothing has happened.
NOTHING: Final = b": nothing new\n\n"
#: One line, at most; a job with all that it may hold is a tenth of that.
MAX_LINE_BYTES: Final = 1 << 20


def encode(event: Event) -> bytes:
    """An event as it goes over the wire."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event.id.encode(), event.kind.encode(), event.to_json())


class EventReader:
    """Takes bytes as they come, and gives what is complete: events, and None for every sign of life."""

    def __init__(self) -> None:
        self._rest = b""
        self._data = b""

    def take(self, piece: bytes) -> list[Event | None]:
        """Raises:
        LimitError: a line without an end.
        PermanentError: something that is no event.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise LimitError(
                f"a line of more than {MAX_LINE_BYTES} bytes where events are told",
                hint="see whether what answers there really is a config server",
            )
        found: list[Event | None] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b":"):
                found.append(None)
            elif line.startswith(b"data:"):
                self._data = line[5:].removeprefix(b" ")
            elif not line and self._data:
                found.append(Event.from_json(self._data))
                self._data = b""
        return found
