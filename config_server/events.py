"""Events: what is told to whoever listens, in one order, with the newest of it kept for those who come back.

Jobs and alerts are told when the transaction that changed them is done (`changes`). What only follows from reports,
how a machine lives and how it and its process server fare, is looked at while somebody listens, and what differs from
the last look is told: a state that came and went in between is not. Every listener reads the one ring by a place of
its own, so a slow one costs nothing, and one that falls behind by more than the ring is told `missed`.

An id is the run of the server and a number. After a restart ids of the former run mean `missed`.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from config_server import overview
from config_server.bells import EVERYBODY, Bells, Topic
from config_server.changes import Change, LifeChanged
from config_server.registry import RegistryThread
from config_server.troubles import Troubles
from replicar.clock import Clock
from replicar.control.messages import (
    Alert,
    Event,
    EventKind,
    Health,
    LifeState,
    MachineSummary,
    ProcessServerSummary,
)

#: Events that are kept. At ten or so for a job that is the work of hours.
MAX_EVENTS: Final = 1024
#: How often it is looked how machines live and fare; a look is one transaction, however many listen.
LOOK_SECONDS: Final = 5.0
#: How often a listener who is told nothing hears that the line is alive.
ALIVE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Fares:
    """What of somebody's state is worth an event when it changes: words change all the time, kinds of error do not."""

    online: bool
    storing: bool
    level: str
    errors: frozenset[tuple[str, str]]
    life: LifeState | None


class Events:
    """All events of a config server; for use on one event loop."""

    def __init__(self, bells: Bells, clock: Clock) -> None:
        self._bells, self._clock = bells, clock
        self.look_seconds, self.alive_seconds = LOOK_SECONDS, ALIVE_SECONDS
        self.run = uuid.uuid4().hex[:8]
        self._ring: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._told = 0
        self._looked: float | None = None
        self._fares: dict[uuid.UUID, _Fares] = {}
        self.listeners = 0

    def begin(self, after: str) -> int:
        """The place of a new listener: behind the event `after`, or at the end if none is said; -1: what came after
        that one is not known any more."""
        if not after:
            return self._told
        run, _, number = after.partition("-")
        if run != self.run or not (number.isascii() and number.isdecimal()) or int(number) > self._told:
            return -1
        return int(number)

    def since(self, place: int) -> tuple[list[Event], int]:
        """What was told behind a place, beginning with `missed` where the ring does not reach; and the next place."""
        oldest = self._told - len(self._ring)
        if oldest <= place:
            return list(islice(self._ring, place - oldest, None)), self._told
        missed = Event(id=f"{self.run}-{self._told}", kind=EventKind.MISSED, time_ns=self._clock.now_ns())
        return [missed], self._told

    def take(self, changes: Iterable[Change]) -> None:
        """Tell of what a transaction has changed."""
        for change in changes:
            if isinstance(change, LifeChanged):
                self._looked = None
                self._bells.ring(Topic.EVENTS, EVERYBODY)
            elif isinstance(change, Alert):
                self._tell(EventKind.ALERT, machine=change.machine, alert=change)
            else:
                self._tell(EventKind.JOB, machine=change.machine, job=change)

    async def look(self, registry: RegistryThread, troubles: Troubles) -> None:
        """Look how all fare, if that is due; the first look tells nothing."""
        now = self._clock.monotonic()
        if self._looked is not None and now - self._looked < self.look_seconds:
            return
        self._looked, now_ns = now, self._clock.now_ns()
        found = await registry.run(
            lambda c: (overview.summaries(c, now_ns, troubles), overview.process_servers(c, now_ns, troubles))
        )
        self._compare(*found)

    def _compare(self, machines: tuple[MachineSummary, ...], servers: tuple[ProcessServerSummary, ...]) -> None:
        all_of_them: list[MachineSummary | ProcessServerSummary] = [*machines, *servers]
        before, self._fares = self._fares, {each.id: _fares(each) for each in all_of_them}
        for each in all_of_them:
            was, now = before.get(each.id), self._fares[each.id]
            if was is None or was == now:
                continue
            who = {"machine" if isinstance(each, MachineSummary) else "process_server": each.name}
            if was.life is not now.life:
                self._tell(EventKind.LIFE, **who, life=now.life, life_before=was.life)
            if (was.online, was.storing, was.level, was.errors) != (now.online, now.storing, now.level, now.errors):
                self._tell(EventKind.HEALTH, **who, health=_health(each))

    def _tell(self, kind: EventKind, **fields: object) -> None:
        self._told += 1
        said = {"id": f"{self.run}-{self._told}", "kind": kind, "time_ns": self._clock.now_ns(), **fields}
        self._ring.append(Event.model_validate(said))
        self._bells.ring(Topic.EVENTS, EVERYBODY)


def _fares(summary: MachineSummary | ProcessServerSummary) -> _Fares:
    said = _health(summary)
    errors = frozenset((error.part, error.error) for error in said.errors)
    life = summary.life if isinstance(summary, MachineSummary) else None
    return _Fares(said.online, said.storing, said.level, errors, life)


def _health(summary: MachineSummary | ProcessServerSummary) -> Health:
    if isinstance(summary, MachineSummary):
        return Health(online=summary.online, storing=summary.storing, errors=summary.errors)
    return Health(online=summary.online, level=summary.health, errors=summary.errors)
