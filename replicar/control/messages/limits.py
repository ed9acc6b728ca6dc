"""What the messages are bounded by, and the words that several of them share."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

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
#: Health signals that a process server reports.
MAX_SIGNALS: Final = 16
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
