"""What a process server reports, which machines it is to serve, and the keys it needs for that."""

from __future__ import annotations

import base64
import binascii
import uuid
from typing import Annotated

from pydantic import Field, StringConstraints

from replicar.control.message import Count, Digest, ErrorReport, Message, Seconds, Secret, Text
from replicar.control.messages.limits import (
    DATA_KEY_BYTES,
    MAX_ERRORS,
    MAX_SIGNALS,
    MAX_TROUBLED_MACHINES,
    MAX_WAIT_SECONDS,
)
from replicar.errors import CorruptionError
from replicar.signals import Level


class MachineProgress(Message):
    """How far a process server is with one machine; segment and digest are those of the last stored segment.

    The bytes are counted from zero since whatever `counted_since` names (any text, another one for every beginning), so
    that a restart is told from a repetition; without it, only a number lower than before is known for a restart.
    `pending_bytes` are received and not stored yet; `rpo_seconds` is the age of the oldest change among them by its
    capture, 0 when all are stored, None where that is not known.
    """

    machine_id: uuid.UUID
    received_sequence: Count = 0
    stored_sequence: Count = 0
    stored_segment: Count | None = None
    stored_digest: Digest = ""
    counted_since: Annotated[str, StringConstraints(max_length=64)] = ""
    pending_bytes: Count = 0
    rpo_seconds: Seconds | None = None
    bytes_received: Count = 0
    bytes_stored: Count = 0


class MachineTrouble(Message):
    """What keeps a process server from storing what a machine sends, and the state that the machine is in there."""

    machine_id: uuid.UUID
    state: Text = ""
    error: ErrorReport


class HealthSignal(Message):
    """One thing measured (see `replicar.signals`): level, value and unit, and, if it is not well, why and what next."""

    name: Text
    level: Level
    value: float | None = None
    unit: Text = ""
    cause: Text = ""
    hint: Text = ""
    code: Text = ""


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
    signals: Annotated[tuple[HealthSignal, ...], Field(max_length=MAX_SIGNALS)] = ()
    troubles: Annotated[tuple[MachineTrouble, ...], Field(max_length=MAX_TROUBLED_MACHINES)] = ()
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0
    known_version: Text = ""


class WithDataKey(Message):
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


class FormerKey(WithDataKey):
    """A data key that a machine sealed with before its present one; both forms are base64."""

    key_id: Text
    wrapped_key: Text


class ProcessServerAssignment(WithDataKey):
    """A machine to accept, with the key to seal its segments by, and those that older ones were sealed by, in base64.

    `stored_*`: a segment of this incarnation that is known to be in storage, its last sequence and its digest. Whoever
    takes the log over must find it there; None and 0 while nothing is known.
    """

    machine_id: uuid.UUID
    name: Text
    epoch: Count
    incarnation: Count
    wrapped_key: Text
    key_id: Text
    former_keys: tuple[FormerKey, ...] = ()
    stored_segment: Count | None = None
    stored_sequence: Count = 0
    stored_digest: Digest = ""


class ProcessServerInstructions(Message):
    """The reply: every machine that this server serves; a machine that is not listed is not its own any more."""

    assignments: tuple[ProcessServerAssignment, ...]
    heartbeat_seconds: Seconds
    version: Text = ""
