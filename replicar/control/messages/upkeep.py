"""Upkeep: what recovery workers do by the clock for machines that are protected, and what retention has left of each.

A worker asks for a machine that is due, has it for as long as it renews, and says how it went. That spares double work
and no more: what is done is safe with any number of workers at it (recovery/folding.py, recovery/replica/warm.py).
"""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from replicar.control.message import Count, ErrorReport, Message, Seconds, Text
from replicar.control.messages.jobs import ClaimedMachine
from replicar.control.messages.policy import Policy
from replicar.moments import format_moment

#: How long a worker may be silent before another may have its machine; a renewal is due at a third of it.
UPKEEP_LEASE_SECONDS: Final = 180.0
#: Of the states that are kept in front of a window, those that are told: hourly ones of 170 days.
MAX_KEPT: Final = 4096


class UpkeepKind(StrEnum):
    """What is done: `fold` brings the index up to date and gives up what the policy does not keep; `replica` brings a
    warm replica on; `replica-removal` removes one that the policy does not want any more."""

    FOLD = "fold"
    REPLICA = "replica"
    REPLICA_REMOVAL = "replica-removal"


class KeptState(Message):
    """A state in front of the window that retention keeps; `reason` is the point's name, or why it is kept."""

    sequence: Count
    time_ns: Count
    reason: Text = ""


class Retention(Message):
    """What a machine's newest fold says: from `floor` on every state is there, before it the `kept` ones alone.

    `kept` is ascending, and complete from the sequence `kept_from` on: of very many the oldest are left out.
    """

    generation: Count
    floor_sequence: Count
    floor_time_ns: Count
    kept: Annotated[tuple[KeptState, ...], Field(max_length=MAX_KEPT)] = ()
    kept_from: Count = 0

    def gave_up(self, sequence: int) -> bool:
        """Whether the state after that sequence is known to be given up."""
        if not self.kept_from <= sequence < self.floor_sequence:
            return False
        return all(item.sequence != sequence for item in self.kept)

    def nearest(self, *, sequence: int | None = None, time_ns: int | None = None) -> str:
        """What is there next to a state that is not, by its sequence or its time, in words."""
        at, by_time = (time_ns, True) if time_ns is not None else (sequence or 0, False)
        floor = KeptState(
            sequence=self.floor_sequence, time_ns=self.floor_time_ns, reason="and every instant from it on"
        )
        places = [(item.time_ns if by_time else item.sequence, item) for item in (*self.kept, floor)]
        near = [item for place, item in places if place <= at][-1:] + [item for place, item in places if place > at][:1]
        said = [f"--sequence {item.sequence} ({format_moment(item.time_ns)}, {item.reason})" for item in near]
        return f"nearest to it {'are' if len(said) > 1 else 'is'} {' and '.join(said)}"


class UpkeepClaim(Message):
    """POST /v1/worker/upkeep: a worker asks for a machine that is due for this. `instance` as in `ClaimRequest`."""

    kind: UpkeepKind
    instance: Annotated[str, StringConstraints(min_length=1, max_length=64)]


class UpkeepTask(Message):
    """The reply: a machine, which is the worker's for `lease_seconds`, and its policy; or None, and nothing is due."""

    machine: ClaimedMachine | None = None
    policy: Policy | None = None
    lease_seconds: Seconds = UPKEEP_LEASE_SECONDS


class UpkeepRenewal(Message):
    """POST /v1/worker/upkeep/renew: the machine is still being seen to."""

    kind: UpkeepKind
    instance: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    machine_id: uuid.UUID


class UpkeepReport(Message):
    """POST /v1/worker/upkeep/report: how it went, and in how many seconds it is due again.

    `error`: why it failed. `elsewhere`: somebody else is at it, which is no failure. `retention`: what is left now.
    """

    kind: UpkeepKind
    instance: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    machine_id: uuid.UUID
    again_seconds: Annotated[float, Field(ge=1, le=86_400)]
    error: ErrorReport | None = None
    elsewhere: bool = False
    retention: Retention | None = None


class UpkeepReceipt(Message):
    """The reply to a renewal or a report: how long the machine is the worker's; 0 after a report."""

    lease_seconds: Seconds
