"""What the process server counts and reports, as data: for heartbeats, for `process-server status`, for tests.

Counters are plain attributes, raised where things happen; nobody logs on the hot path.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from replicar.control.files import PUBLIC_MODE, read_file, write_file
from replicar.errors import PermanentError, ReplicarError
from replicar.log.tail import Stored
from replicar.observe.histogram import Histogram
from replicar.signals import Level, Signal, worst

STATUS_FILE: Final = "status.json"


@dataclass(slots=True)
class Counters:
    """Of one machine since this process began to serve it, which `since` names: other counters began at zero."""

    since: str = field(default_factory=lambda: uuid.uuid4().hex)
    bytes_received: int = 0  # whole, verified frames
    bytes_stored: int = 0  # of those, in storage; uncompressed
    bytes_uploaded: int = 0  # what that came to, compressed and sealed
    frames: int = 0
    segments: int = 0
    connections: int = 0
    resends: int = 0
    bytes_dropped: int = 0
    waits: int = 0  # for a slot of the cache, or for storing to catch up: nothing was read from the agent
    waited_seconds: float = 0.0
    upload_failures: int = 0  # tries of a segment that storage did not take, after the store's own retries
    leases_lost: int = 0


@dataclass(slots=True)
class Tallies:
    """Of all machines: how long segments took to be uploaded, and changes from their capture until stored.

    The second is a difference of two machines' clocks, so it is as right as they are.
    """

    upload_seconds: Histogram = field(default_factory=Histogram)
    stored_seconds: Histogram = field(default_factory=Histogram)

    def stored(self, age_ns: int) -> None:
        """The oldest change of a segment is stored, with all before it, so long after its capture."""
        self.stored_seconds.observe(max(age_ns, 0) / 1e9)


@dataclass(frozen=True, slots=True)
class MachineHealth:
    """One machine now. `error` is what stands in the way, as `ReplicarError.as_dict` gives it.

    `rpo_seconds` is the age of the oldest change that was received and is not stored, 0 when all is; None where it is
    not known. What the agent has not sent yet is not in it.
    """

    machine_id: uuid.UUID
    name: str
    state: str
    epoch: int
    incarnation: int
    connected: bool
    received_sequence: int = 0
    stored_sequence: int = 0
    stored_segment: int = 0
    stored_digest: str = ""
    pending_bytes: int = 0
    sealing_bytes: int = 0  # of those pending
    uploading_bytes: int = 0  # of those pending; in storage already, where an earlier segment is not
    rpo_seconds: float | None = None
    counters: Counters = field(default_factory=Counters)
    error: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable. By hand: `asdict` copies all it finds, and of a thousand machines every second that is
        a tenth of a core."""
        data = {name: getattr(self, name) for name in _MACHINE_FIELDS}
        counters = {name: getattr(self.counters, name) for name in _COUNTERS}
        return data | {"machine_id": str(self.machine_id), "counters": counters}


_MACHINE_FIELDS: Final = tuple(each.name for each in fields(MachineHealth))
_COUNTERS: Final = tuple(each.name for each in fields(Counters))


@dataclass(frozen=True, slots=True)
class ServerHealth:
    """The whole server now. `errors` says what stands in its way besides what machines say: an error for each part.

    `upload_limit`: bytes a second that may be uploaded at this hour, None for no limit. `compression_level`: zstd's, as
    it is used just now.
    """

    time_ns: int
    host: str
    port: int
    cache_bytes: int
    cache_bytes_free: int
    machines: tuple[MachineHealth, ...]
    cache_level: str = "well"
    upload_limit: int | None = None
    compression_level: int | None = None
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    signals: tuple[Signal, ...] = ()

    @property
    def level(self) -> Level:
        """The worst of the signals."""
        return worst(signal.level for signal in self.signals)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        machines = [machine.as_dict() for machine in self.machines]
        return {**asdict(replace(self, machines=())), "machines": machines, "level": str(self.level)}

    def save(self, directory: Path) -> None:
        """Write it where `process-server status` looks; readers see the old or the new one."""
        write_file(directory / STATUS_FILE, (json.dumps(self.as_dict()) + "\n").encode(), mode=PUBLIC_MODE)


def load_status(directory: Path) -> dict[str, Any]:
    """The status that a server wrote last, as `ServerHealth.as_dict` gave it.

    Raises:
        PermanentError: no server has run in `directory`.
    """
    path = directory / STATUS_FILE
    hint = "is this the process server's `directory`, and has `process-server run` been started?"
    try:
        status = json.loads(read_file(path, what="the status", hint=hint))
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise PermanentError(f"{path} holds no status", hint=hint, path=str(path))
    return status


def stored_before(directory: Path) -> dict[tuple[uuid.UUID, int], Stored]:
    """Machine and incarnation to what was in storage when this server last wrote its status.

    A lower bound is all that is asked of it, so an older status, or none, does no harm.
    """
    try:
        machines = load_status(directory)["machines"]
        return {
            (uuid.UUID(each["machine_id"]), int(each["incarnation"])): Stored(
                int(each["stored_segment"]), int(each["stored_sequence"]), bytes.fromhex(each["stored_digest"])
            )
            for each in machines
        }
    except (PermanentError, KeyError, ValueError, TypeError):
        return {}


def rpo_seconds(oldest_ns: int | None, now_ns: int) -> float | None:
    """The age of the oldest change that is pending: 0 for none (None), None where its capture is not known (0)."""
    if oldest_ns is None:
        return 0.0
    return max(now_ns - oldest_ns, 0) / 1e9 if oldest_ns else None


def error_data(error: ReplicarError | None) -> dict[str, Any] | None:
    """An error as data; None for none."""
    return None if error is None else json.loads(json.dumps(error.as_dict(), default=str))
