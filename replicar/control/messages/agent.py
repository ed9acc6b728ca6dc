"""What an agent reports, and what it is told to do."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from replicar.control.message import Count, ErrorReport, Message, Seconds, Text
from replicar.control.messages.limits import MAX_ERRORS, MAX_WAIT_SECONDS
from replicar.control.messages.policy import PointSchedule
from replicar.formats.record import Consistency


class DiskReport(Message):
    """One disk and how far its initial replication is."""

    index: Annotated[int, Field(ge=0, lt=1 << 16)]
    name: Text
    size_bytes: Count
    seed_total_bytes: Count = 0
    seed_done_bytes: Count = 0


class MarkReport(Message):
    """A mark in the stream. `command_id` is the command that asked for it, if one did.

    `in_gap`: it lies where order was not captured, so it is recorded but no point to recover. `pause_seconds`: how long
    applications were held for it, None where none were.
    """

    name: Text
    kind: Consistency = Consistency.CRASH
    sequence: Count
    time_ns: Count
    command_id: Text | None = None
    in_gap: bool = False
    pause_seconds: Seconds | None = None


class CommandRefusal(Message):
    """A command that the agent will never carry out, and why: an error of the common tree, by class name."""

    command_id: Text
    error: Text
    message: Text
    hint: Text = ""


class GapReport(Message):
    """Sequences between which order was not captured; `last_sequence` is None while it lasts."""

    first_sequence: Count
    last_sequence: Count | None = None
    reason: Text = ""


class AuditReport(Message):
    """How far the round of audits over all disks is, and when the last whole one began and ended (None: never yet).

    `skipped_bytes` were left out because they were written all the time, or could not be read.
    """

    bytes_per_second: Count
    done_bytes: Count = 0
    total_bytes: Count = 0
    skipped_bytes: Count = 0
    last_began_ns: Count | None = None
    last_ended_ns: Count | None = None
    last_skipped_bytes: Count = 0


class HoldReport(Message):
    """How a machine stands to a group point: its writers are `held`; it `kept` them held until the verdict and made the
    mark, at `sequence`; or the group is `lost` to it, for `reason`."""

    group: Text
    state: Literal["held", "kept", "lost"]
    sequence: Count | None = None
    held_seconds: Seconds | None = None
    reason: Text = ""
    hint: Text = ""


class AgentHeartbeat(Message):
    """POST /v1/heartbeats/machine.

    Marks, gaps and refusals are sent until a heartbeat with them was answered; sending one twice is harmless.
    `ordered_from` is the (sequence, time_ns) from which on every sequence is a recovery point, None while there is
    no such. `capture` says in words how the machine is captured, where that is not inline. `stored_until_ns` is an
    instant up to which (inclusive) every change is among those up to `stored_sequence`; None while order is not
    captured. `unstored_bytes`: what the change log keeps until it is stored. `errors`: why nothing is sent, empty
    while all is well. `journal_full_seconds`: until the change log is full, and `copy_remaining_seconds`: until all
    that is dirty is copied, if it goes on as lately; None where it does not go there.
    """

    time_ns: Count
    state: Annotated[str, StringConstraints(max_length=64)]
    captured_sequence: Count = 0
    received_sequence: Count = 0
    stored_sequence: Count = 0
    rpo_seconds: Seconds = 0.0
    rpo_p50_seconds: Seconds = 0.0
    rpo_p99_seconds: Seconds = 0.0
    bytes_captured: Count = 0
    bytes_sent: Count = 0
    unstored_bytes: Count = 0
    disks: Annotated[tuple[DiskReport, ...], Field(max_length=256)] = ()
    marks: Annotated[tuple[MarkReport, ...], Field(max_length=1024)] = ()
    gaps: Annotated[tuple[GapReport, ...], Field(max_length=1024)] = ()
    refusals: Annotated[tuple[CommandRefusal, ...], Field(max_length=64)] = ()
    ordered_from: tuple[Count, Count] | None = None
    stored_until_ns: Count | None = None
    errors: Annotated[tuple[ErrorReport, ...], Field(max_length=MAX_ERRORS)] = ()
    audit: AuditReport | None = None
    journal_full_seconds: Seconds | None = None
    copy_remaining_seconds: Seconds | None = None
    capture: Text = ""
    hold: HoldReport | None = None
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0
    known_version: Text = ""


class AgentAssignment(Message):
    """Where an agent sends its stream; the server is verified as `<process_server_id>.process-server.replicar`."""

    epoch: Count
    process_server_id: uuid.UUID
    host: Text
    port: Annotated[int, Field(ge=1, le=65535)]


class Command(Message):
    """Something to do once, recognised by `id`; repeated until a mark or a refusal with that id is reported.

    `hold_seconds`: for how long a machine's writers may be held for a group, at most.
    """

    id: Text
    kind: Text
    name: Text
    consistency: Consistency = Consistency.CRASH
    hold_seconds: Seconds = 0.0


class GroupVerdict(Message):
    """Whether all machines of a group were held at one instant. Machines that hold for it let go."""

    group: Text
    complete: bool


class AgentInstructions(Message):
    """The reply: the whole of what an agent should be doing. An agent skips a command of a kind it does not know.

    `schedule`: how often it makes points by the clock, by the machine's policy.
    """

    assignment: AgentAssignment | None
    commands: tuple[Command, ...] = ()
    verdicts: tuple[GroupVerdict, ...] = ()
    schedule: PointSchedule = PointSchedule()
    heartbeat_seconds: Seconds
    version: Text = ""
