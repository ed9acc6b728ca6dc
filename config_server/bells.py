"""Bells: how one request wakes another that is being held, within this process and without losing a ring.

A listener takes its bell *before* it looks at the registry and waits only after: a change between the two has rung
already. Rings are not counted, since a listener looks again at everything. `hurry` makes the long polls of a machine
short for as long as somebody waits for its progress.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final, TypeAlias
from uuid import UUID

from replicar.errors import LimitError

#: Requests held at once: a long poll for every party of a large vault, and some operators.
MAX_LISTENERS: Final = 16_384
#: How long a poll is held while somebody waits for its party's progress.
HURRY_SECONDS: Final = 0.25


class Topic(Enum):
    INSTRUCTIONS = auto()  # what a machine or process server should do has changed
    PROGRESS = auto()  # a machine reported
    JOBS = auto()  # a job was made, or has changed
    EVENTS = auto()  # something is told to whoever listens


#: Whom a bell rings for that is about no party.
EVERYBODY: Final = UUID(int=0)

Key: TypeAlias = tuple[Topic, UUID]


class Bells:
    """All bells of a config server; for use on one event loop."""

    def __init__(self) -> None:
        # By key, in the order in which they came: a set of them would be walked in another order in every process.
        self._listeners: dict[Key, dict[asyncio.Event, None]] = {}
        self._count = 0
        self._hurried: Counter[UUID] = Counter()
        self.closed = False

    @contextmanager
    def listen(self, topic: Topic, party_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set at each ring; clear it before looking again.

        Raises:
            LimitError: too many requests are held.
        """
        if self._count >= MAX_LISTENERS:
            raise LimitError(f"{MAX_LISTENERS} requests are held already", hint="try again in a minute", status=503)
        key, bell = (topic, party_id), asyncio.Event()
        if self.closed:
            bell.set()
        self._listeners.setdefault(key, {})[bell] = None
        self._count += 1
        try:
            yield bell
        finally:
            self._count -= 1
            self._listeners[key].pop(bell, None)
            if not self._listeners[key]:
                del self._listeners[key]

    @property
    def listening(self) -> int:
        """How many requests are held now."""
        return self._count

    def ring(self, topic: Topic, party_id: UUID) -> None:
        for bell in self._listeners.get((topic, party_id), ()):
            bell.set()

    @contextmanager
    def hurry(self, *party_ids: UUID) -> Iterator[None]:
        """Keep the polls of these parties short meanwhile."""
        self._hurried.update(party_ids)
        for party_id in party_ids:
            self.ring(Topic.INSTRUCTIONS, party_id)
        try:
            yield
        finally:
            self._hurried.subtract(party_ids)
            self._hurried += Counter()  # drops those at zero

    def hold_seconds(self, party_id: UUID, wait_seconds: float) -> float:
        """How long a poll may be held now."""
        return min(wait_seconds, HURRY_SECONDS) if self._hurried[party_id] > 0 else wait_seconds

    def close(self) -> None:
        """Wake everybody for good, so that the server can end."""
        self.closed = True
        for bells in self._listeners.values():
            for bell in bells:
                bell.set()
