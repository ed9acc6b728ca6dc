"""The config server's API as models: what each request and reply holds, with its units and bounds.

Both ends use these classes, so they *are* the contract. Three rules make it last:

- Unknown fields are ignored, so that a newer part can talk to an older one; a field is never given another meaning.
- Known fields are strict: the number 5 is no "5", and every number and list has a bound.
- Times are integer nanoseconds since 1970 (`_ns`), sizes bytes, intervals seconds, keys and digests text.

Heartbeats are long polls. A reply carries a `version`; the next heartbeat says it back as `known_version`, and the
server holds its reply until something differs from that or `wait_seconds` have passed. (`ControlClient` fills it in
when it is left empty.) Replies are complete, not differences, so losing one loses nothing.

Keys are `SecretStr`, so a printed or logged message shows none; they show in `to_json`, whose only reader is the wire.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from replicar.control.message import Count, Digest, ErrorReport, Message, Name, Seconds, Secret, Text
from replicar.errors import CorruptionError
from replicar.formats.record import Consistency

API_PREFIX: Final = "/v1"
DEFAULT_PORT: Final = 443
#: What a request may hold at most; the longest is a process server's heartbeat for 4,096 machines.
MAX_REQUEST_BYTES: Final = 2 << 20
#: What a client accepts; the longest is a machine's points.
MAX_REPLY_BYTES: Final = 32 << 20
#: The longest a long poll is held, and an operator's wait; proxies and NAT forget silent connections after a minute.
MAX_WAIT_SECONDS: Final = 30.0
MAX_OPERATOR_WAIT_SECONDS: Final = 60.0
#: A part whose clock is further off than this, either way, is refused: its recovery points would carry wrong times.
MAX_CLOCK_SKEW_SECONDS: Final = 300
DATA_KEY_BYTES: Final = 32
#: Errors that one heartbeat carries of its sender, and machines whose errors a process server's carries.
MAX_ERRORS: Final = 16
MAX_TROUBLED_MACHINES: Final = 128
#: The part of a process server whose error stands in the way of all its machines.
STORAGE: Final = "storage"


class MachineState(StrEnum):
    """What an agent says it is doing; an agent may say something newer, so the field is text."""

    STARTING = "starting"
    INITIAL_REPLICATION = "initial-replication"
    PROTECTED = "protected"
    RESYNCHRONISING = "resynchronising"
    DISCONNECTED = "disconnected"
    STOPPED = "stopped"


# --- agent ------------------------------------------------------------------------------------------------------------


class DiskReport(Message):
    """One disk and how far its initial replication is."""

    index: Annotated[int, Field(ge=0, lt=1 << 16)]
    name: Text
    size_bytes: Count
    seed_total_bytes: Count = 0
    seed_done_bytes: Count = 0


class MarkReport(Message):
    """A mark in the stream. `command_id` is the command that asked for it, if one did.

    `in_gap`: it lies where order was not captured, so it is recorded but no point to recover.
    """

    name: Text
    kind: Consistency = Consistency.CRASH
    sequence: Count
    time_ns: Count
    command_id: Text | None = None
    in_gap: bool = False


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


class AgentHeartbeat(Message):
    """POST /v1/heartbeats/machine.

    Marks, gaps and refusals are sent until a heartbeat with them was answered; sending one twice is harmless.
    `ordered_from` is the (sequence, time_ns) from which on every sequence is a recovery point, None while there is
    no such. `capture` says in words how the machine is captured, where that is not inline. `stored_until_ns` is an
    instant up to which (inclusive) every change is among those up to `stored_sequence`; None while order is not
    captured. `errors`: why nothing is sent, empty while all is well.
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
    disks: Annotated[tuple[DiskReport, ...], Field(max_length=256)] = ()
    marks: Annotated[tuple[MarkReport, ...], Field(max_length=1024)] = ()
    gaps: Annotated[tuple[GapReport, ...], Field(max_length=1024)] = ()
    refusals: Annotated[tuple[CommandRefusal, ...], Field(max_length=64)] = ()
    ordered_from: tuple[Count, Count] | None = None
    stored_until_ns: Count | None = None
    errors: Annotated[tuple[ErrorReport, ...], Field(max_length=MAX_ERRORS)] = ()
    audit: AuditReport | None = None
    capture: Text = ""
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0
    known_version: Text = ""


class AgentAssignment(Message):
    """Where an agent sends its stream; the server is verified as `<process_server_id>.process-server.replicar`."""

    epoch: Count
    process_server_id: uuid.UUID
    host: Text
    port: Annotated[int, Field(ge=1, le=65535)]


class Command(Message):
    """Something to do once, recognised by `id`; repeated until a mark or a refusal with that id is reported."""

    id: Text
    kind: Text
    name: Text
    consistency: Consistency = Consistency.CRASH


class AgentInstructions(Message):
    """The reply: the whole of what an agent should be doing. An agent skips a command of a kind it does not know."""

    assignment: AgentAssignment | None
    commands: tuple[Command, ...] = ()
    heartbeat_seconds: Seconds
    version: Text = ""


# --- process server ---------------------------------------------------------------------------------------------------


class MachineProgress(Message):
    """How far a process server is with one machine; segment and digest are those of the last stored segment.

    The bytes are counted from zero since whatever `counted_since` names (any text, another one for every beginning), so
    that a restart is told from a repetition; without it, only a number lower than before is known for a restart.
    """

    machine_id: uuid.UUID
    received_sequence: Count = 0
    stored_sequence: Count = 0
    stored_segment: Count | None = None
    stored_digest: Digest = ""
    counted_since: Annotated[str, StringConstraints(max_length=64)] = ""
    bytes_received: Count = 0
    bytes_stored: Count = 0


class MachineTrouble(Message):
    """What keeps a process server from storing what a machine sends, and the state that the machine is in there."""

    machine_id: uuid.UUID
    state: Text = ""
    error: ErrorReport


class ProcessServerHeartbeat(Message):
    """POST /v1/heartbeats/process-server. `host` and `port` are where agents reach it.

    `errors` are the server's own, each of one of its parts; an error of `STORAGE` is in the way of all its machines.
    `troubles` are those of single machines, which are left out of `machines` while it does not know how far they are.
    """

    time_ns: Count
    host: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)]
    cache_bytes: Count = 0
    cache_bytes_free: Count = 0
    machines: Annotated[tuple[MachineProgress, ...], Field(max_length=4096)] = ()
    errors: Annotated[tuple[ErrorReport, ...], Field(max_length=MAX_ERRORS)] = ()
    troubles: Annotated[tuple[MachineTrouble, ...], Field(max_length=MAX_TROUBLED_MACHINES)] = ()
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0
    known_version: Text = ""


class _WithDataKey(Message):
    data_key: Secret

    def data_key_bytes(self) -> bytes:
        """The machine's data key, 32 bytes.

        Raises:
            CorruptionError: it is not base64 of 32 bytes.
        """
        try:
            key = base64.b64decode(self.data_key.get_secret_value(), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != DATA_KEY_BYTES:
            raise CorruptionError("a data key that is not base64 of 32 bytes", hint="look at the config server's vault")
        return key


class ProcessServerAssignment(_WithDataKey):
    """A machine to accept, with the key to seal its segments by. Both keys are base64.

    `stored_*`: a segment of this incarnation that is known to be in storage, its last sequence and its digest. Whoever
    takes the log over must find it there; None and 0 while nothing is known.
    """

    machine_id: uuid.UUID
    name: Text
    epoch: Count
    incarnation: Count
    wrapped_key: Text
    key_id: Text
    stored_segment: Count | None = None
    stored_sequence: Count = 0
    stored_digest: Digest = ""


class ProcessServerInstructions(Message):
    """The reply: every machine that this server serves; a machine that is not listed is not its own any more."""

    assignments: tuple[ProcessServerAssignment, ...]
    heartbeat_seconds: Seconds
    version: Text = ""


# --- operator ---------------------------------------------------------------------------------------------------------


class MachineSummary(Message):
    """A machine as the registry knows it. `last_heartbeat_ns` is None before the first one.

    `errors`: what is in the way of storing what changes on it, by whom it was reported; `storing` is False while a
    machine that is protected has any.
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
    capture: Text = ""

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


class VaultStatus(Message):
    """GET /v1/status: the vault at a glance."""

    vault: Name
    vault_id: uuid.UUID
    software: Text
    time_ns: Count
    authority_expires_ns: Count
    machines: tuple[MachineSummary, ...]
    process_servers: tuple[ProcessServerSummary, ...]


class Point(Message):
    """A named recovery point. `stored`: everything up to it is in storage, so it can be recovered now.

    `earlier`: it was made before the machine was enrolled again. Then `stored` only says that it was stored: whether
    that log is still in the container, the log alone knows.
    """

    name: Text
    kind: Consistency
    sequence: Count
    time_ns: Count
    stored: bool
    earlier: bool = False
    command_id: Text | None = None


class PointList(Message):
    """What can be recovered: named points, newest first, and the ordered window in which any sequence can.

    The window goes from `ordered_from` to `stored_sequence`, and in time at least to `ordered_until_ns` (inclusive).
    Both are None while storage does not hold a window of the present incarnation. `errors` as in `MachineSummary`.
    `truncated` says that older named points were left out of this reply (they are still there).
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


class MarkRequest(Message):
    """POST /v1/machines/{name}/marks. The caller chooses `command_id`, so that asking again makes no second mark."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    consistency: Consistency = Consistency.CRASH
    command_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{36}$")]
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_OPERATOR_WAIT_SECONDS)] = MAX_WAIT_SECONDS


class MachineKey(_WithDataKey):
    """GET /v1/machines/{name}/key: what recovery needs, and up to where the log must be whole.

    `quiet`: a sequence, and an instant up to which (inclusive) the machine captured nothing behind that sequence.
    """

    machine_id: uuid.UUID
    key_id: Text
    stored_sequence: Count
    stored_segment: Count | None
    stored_digest: Digest
    quiet: tuple[Count, Count] | None = None
