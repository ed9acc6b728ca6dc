"""Events: what happens in a vault, told as it happens (GET /v1/events); one message for all kinds.

An event is news, not the state: whoever has missed some, which `missed` says, looks again at what concerns him.
"""

from __future__ import annotations

from enum import StrEnum

from replicar.control.message import Count, ErrorReport, Message, Text
from replicar.control.messages.jobs import Job, LifeState
from replicar.control.messages.policy import Alert
from replicar.signals import Level


class EventKind(StrEnum):
    """What an event tells of, and which field of it holds that."""

    JOB = "job"  # a job was made, or something of it has changed: `job`
    LIFE = "life"  # a machine is in another state of its life: `life`, and `life_before`
    HEALTH = "health"  # how a machine or process server fares has changed: `health`
    ALERT = "alert"  # an alert was raised or cleared: `alert`
    MISSED = "missed"  # what came before this is not known any more


class Health(Message):
    """How a machine or a process server fares.

    `storing` is about machines: whether what they capture gets to storage. `level` is about process servers.
    """

    online: bool
    storing: bool = True
    level: Level = Level.HEALTHY
    errors: tuple[ErrorReport, ...] = ()


class Event(Message):
    """One thing that happened. `id` is what `Last-Event-ID` takes; who is asked about is `machine` or
    `process_server`. A job is told as it stands, but for whether a recovery worker is online for it."""

    id: Text
    kind: EventKind
    time_ns: Count
    machine: Text = ""
    process_server: Text = ""
    job: Job | None = None
    life: LifeState | None = None
    life_before: LifeState | None = None
    health: Health | None = None
    alert: Alert | None = None
