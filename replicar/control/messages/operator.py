"""What the operator's commands ask, and what they are shown."""

from __future__ import annotations

import uuid
from typing import Annotated

from pydantic import Field, StringConstraints

from replicar.control.message import Count, Digest, ErrorReport, Message, Name, Seconds, Text
from replicar.control.messages.agent import AuditReport, DiskReport, GapReport
from replicar.control.messages.jobs import LifeState
from replicar.control.messages.limits import MAX_OPERATOR_WAIT_SECONDS, MAX_WAIT_SECONDS
from replicar.control.messages.server import FormerKey, HealthSignal, WithDataKey
from replicar.control.messages.upkeep import Retention
from replicar.formats.record import Consistency
from replicar.signals import Level


class MachineSummary(Message):
    """A machine as the registry knows it. `last_heartbeat_ns` is None before the first one.

    `state` is what its agent says; `life` is where it is in the operator's circle, since `life_since_ns` where a job
    decided that. `errors`: what is in the way of storing what changes on it, by whom it was reported; `storing` is
    False while a machine that is protected has any. In transit: `source_bytes` are in its change log and not stored,
    `pending_bytes` of those are in its process server. Nothing is in transit behind that: recovery reads the log.
    `rpo_seconds` is the agent's measurement; `server_rpo_seconds` its process server's, of what that has received.
    `signals`: its health, worst of which is `health`; empty while nothing of it is replicated.
    """

    id: uuid.UUID
    name: Text
    incarnation: Count
    state: Text
    online: bool
    last_heartbeat_ns: Count | None
    epoch: Count
    process_server: Text | None
    captured_sequence: Count
    received_sequence: Count
    stored_sequence: Count
    stored_segment: Count | None
    stored_digest: Digest
    rpo_seconds: Seconds
    rpo_p50_seconds: Seconds
    rpo_p99_seconds: Seconds
    bytes_captured: Count
    bytes_sent: Count
    bytes_received: Count
    bytes_stored: Count
    disks: tuple[DiskReport, ...]
    storing: bool = True
    errors: tuple[ErrorReport, ...] = ()
    audit: AuditReport | None = None
    journal_full_seconds: Seconds | None = None
    copy_remaining_seconds: Seconds | None = None
    capture: Text = ""
    life: LifeState = LifeState.UNPROTECTED
    life_since_ns: Count = 0
    source_bytes: Count = 0
    pending_bytes: Count = 0
    server_rpo_seconds: Seconds | None = None
    health: Level = Level.HEALTHY
    signals: tuple[HealthSignal, ...] = ()

    @property
    def seed_done_bytes(self) -> int:
        return sum(disk.seed_done_bytes for disk in self.disks)

    @property
    def seed_total_bytes(self) -> int:
        return sum(disk.seed_total_bytes for disk in self.disks)


class MachineList(Message):
    machines: tuple[MachineSummary, ...]


class ProcessServerSummary(Message):
    id: uuid.UUID
    name: Text
    online: bool
    last_heartbeat_ns: Count | None
    host: Text
    port: Count
    cache_bytes: Count
    cache_bytes_free: Count
    machines: Count
    errors: tuple[ErrorReport, ...] = ()
    health: Level = Level.HEALTHY
    signals: tuple[HealthSignal, ...] = ()


class VaultStatus(Message):
    """GET /v1/status: the vault at a glance. `errors`: what the config server itself fails at, by part."""

    vault: Name
    vault_id: uuid.UUID
    software: Text
    time_ns: Count
    authority_expires_ns: Count
    machines: tuple[MachineSummary, ...]
    process_servers: tuple[ProcessServerSummary, ...]
    errors: tuple[ErrorReport, ...] = ()


class Point(Message):
    """A named recovery point. `stored`: everything up to it is in storage, so it can be recovered now.

    `earlier`: it was made before the machine was enrolled again. Then `stored` only says that it was stored: whether
    that log is still in the container, the log alone knows. `pause_seconds`: how long applications were held for it.
    """

    name: Text
    kind: Consistency
    sequence: Count
    time_ns: Count
    stored: bool
    earlier: bool = False
    command_id: Text | None = None
    pause_seconds: Seconds | None = None


class PointList(Message):
    """What can be recovered: named points, newest first, and the ordered window in which any sequence can.

    The window goes from `ordered_from` to `stored_sequence`, and in time at least to `ordered_until_ns` (inclusive).
    Both are None while storage does not hold a window of the present incarnation. `errors` as in `MachineSummary`.
    `truncated` says that older named points were left out of this reply (they are still there).

    `retention`: what is left in front of the window, named or not; None while nothing was given up. `thinned`: named
    points that it gave up, newest first; they are offered no more.
    """

    machine_id: uuid.UUID
    name: Text
    points: tuple[Point, ...]
    ordered_from: tuple[Count, Count] | None
    stored_sequence: Count
    gaps: tuple[GapReport, ...]
    truncated: bool = False
    ordered_until_ns: Count | None = None
    errors: tuple[ErrorReport, ...] = ()
    retention: Retention | None = None
    thinned: tuple[Point, ...] = ()


class MarkRequest(Message):
    """POST /v1/machines/{name}/marks. The caller chooses `command_id`, so that asking again makes no second mark."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    consistency: Consistency = Consistency.CRASH
    command_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{36}$")]
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_OPERATOR_WAIT_SECONDS)] = MAX_WAIT_SECONDS


class MoveRequest(Message):
    """POST /v1/machines/{name}/move: to the process server of that name; None leaves it to the config server."""

    process_server: Name | None = None


class DestroyRequest(Message):
    """POST /v1/machines/{name}/destroy-keys. `confirm` is the machine's name once more."""

    confirm: Text


class GroupRequest(Message):
    """POST /v1/groups: one point over several machines. The caller chooses `group`, so that asking again makes no
    second one. `hold_seconds`: how long each machine's writers may be held for it, at most."""

    group: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{36}$")]
    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    machines: Annotated[tuple[Text, ...], Field(min_length=2, max_length=64)]
    hold_seconds: Annotated[float, Field(ge=0.1, le=10.0)] = 2.0


class GroupMember(Message):
    """One machine's point of a group."""

    machine: Text
    sequence: Count
    held_seconds: Seconds


class GroupPoint(Message):
    """A group point that every machine kept."""

    group: Text
    name: Text
    members: tuple[GroupMember, ...]


class MachineKey(WithDataKey):
    """GET /v1/machines/{name}/key: what recovery needs, and up to where the log must be whole.

    `quiet`: a sequence, and an instant up to which (inclusive) the machine captured nothing behind that sequence.
    """

    machine_id: uuid.UUID
    key_id: Text
    wrapped_key: Text = ""
    former_keys: tuple[FormerKey, ...] = ()
    stored_sequence: Count
    stored_segment: Count | None
    stored_digest: Digest
    quiet: tuple[Count, Count] | None = None
