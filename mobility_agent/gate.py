"""The gate that every write of a served disk goes through: while it is closed, writers wait, and none is refused.

It closes for a moment, so that several machines can be held still at one instant (`groups`). Requests that were carried
out before are answered; those that came since are carried out, in their order, once it opens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Held(Protocol):
    """Whoever carries out requests, and can let them wait."""

    def hold(self) -> None: ...
    def resume(self) -> None: ...


class Gate:
    """One machine's gate. `holders` says who is behind it now."""

    def __init__(self) -> None:
        self.is_closed = False
        self.holders: Callable[[], list[Held]] = list

    def close(self) -> None:
        """From the return of this on, no write changes a disk."""
        self.is_closed = True
        for held in self.holders():
            held.hold()

    def open(self) -> None:
        self.is_closed = False
        for held in self.holders():
            held.resume()
