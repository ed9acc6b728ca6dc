"""Whoever fills the change log's open frame: an NBD connection, as the log sees it."""

from __future__ import annotations

from typing import Protocol


class Owner(Protocol):
    """Whoever fills the open frame. `parsed` is where in `ChangeLog.data` its first unparsed byte lies."""

    parsed: int

    def release(self, unparsed: bytes) -> None:
        """The frame is taken away; `unparsed` is what was received of requests that are not whole yet."""
        ...
