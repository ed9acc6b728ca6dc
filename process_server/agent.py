"""A machine's agent, seen from the machine: what it may be told, whatever connection it is at."""

from __future__ import annotations

from typing import Protocol

from replicar.errors import ReplicarError
from replicar.formats.wire import Welcome


class Agent(Protocol):
    """A machine's connection, as far as the machine knows it."""

    def welcome(self, welcome: Welcome) -> None:
        """Frames may come."""

    def progress(self) -> None:
        """Received or stored moved."""

    def refuse(self, error: ReplicarError) -> None:
        """Say why, and hang up."""
