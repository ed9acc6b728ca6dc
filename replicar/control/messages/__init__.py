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

from replicar.control.messages.agent import (
    AgentAssignment,
    AgentHeartbeat,
    AgentInstructions,
    AuditReport,
    Command,
    CommandRefusal,
    DiskReport,
    GapReport,
    GroupVerdict,
    HoldReport,
    MarkReport,
)
from replicar.control.messages.limits import (
    API_PREFIX,
    DATA_KEY_BYTES,
    DEFAULT_PORT,
    MAX_CLOCK_SKEW_SECONDS,
    MAX_ERRORS,
    MAX_OPERATOR_WAIT_SECONDS,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_TROUBLED_MACHINES,
    MAX_WAIT_SECONDS,
    STORAGE,
    MachineState,
)
from replicar.control.messages.operator import (
    GroupMember,
    GroupPoint,
    GroupRequest,
    MachineKey,
    MachineList,
    MachineSummary,
    MarkRequest,
    MoveRequest,
    Point,
    PointList,
    ProcessServerSummary,
    VaultStatus,
)
from replicar.control.messages.server import (
    MachineProgress,
    MachineTrouble,
    ProcessServerAssignment,
    ProcessServerHeartbeat,
    ProcessServerInstructions,
)

__all__ = [
    "API_PREFIX",
    "DATA_KEY_BYTES",
    "DEFAULT_PORT",
    "MAX_CLOCK_SKEW_SECONDS",
    "MAX_ERRORS",
    "MAX_OPERATOR_WAIT_SECONDS",
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "MAX_TROUBLED_MACHINES",
    "MAX_WAIT_SECONDS",
    "STORAGE",
    "AgentAssignment",
    "AgentHeartbeat",
    "AgentInstructions",
    "AuditReport",
    "Command",
    "CommandRefusal",
    "DiskReport",
    "GapReport",
    "GroupMember",
    "GroupPoint",
    "GroupRequest",
    "GroupVerdict",
    "HoldReport",
    "MachineKey",
    "MachineList",
    "MachineProgress",
    "MachineState",
    "MachineSummary",
    "MachineTrouble",
    "MarkReport",
    "MarkRequest",
    "MoveRequest",
    "Point",
    "PointList",
    "ProcessServerAssignment",
    "ProcessServerHeartbeat",
    "ProcessServerInstructions",
    "ProcessServerSummary",
    "VaultStatus",
]
