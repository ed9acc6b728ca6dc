"""What stands in the way of process servers and their machines now, as they last said it.

Kept in memory only: it is about this moment, every heartbeat says all of it again, and a config server that starts
anew should not tell of faults that may be over. It takes one heartbeat until it knows them again.

The event loop writes and the registry's thread reads; entries are immutable and replaced whole.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from replicar.control.message import ErrorReport
from replicar.control.messages import STORAGE, HealthSignal, ProcessServerHeartbeat
from replicar.errors import ReplicarError


@dataclass(frozen=True, slots=True)
class _Reported:
    server: tuple[ErrorReport, ...] = ()
    machines: dict[uuid.UUID, ErrorReport] = field(default_factory=dict)
    signals: tuple[HealthSignal, ...] = ()
    pending: dict[uuid.UUID, int] = field(default_factory=dict)
    rpo: dict[uuid.UUID, float | None] = field(default_factory=dict)


class Troubles:
    """The latest errors of every process server that reported since this config server started, and its own."""

    def __init__(self) -> None:
        self._reported: dict[uuid.UUID, _Reported] = {}
        self._own: dict[str, ErrorReport] = {}

    @property
    def own(self) -> tuple[ErrorReport, ...]:
        """What the config server itself fails at."""
        return tuple(self._own.values())

    def note_own(self, part: str, error: ReplicarError) -> bool:
        """Something of the config server's own failed; whether that is news."""
        report, before = ErrorReport.of(part, error.as_dict()), self._own.get(part)
        self._own = {**self._own, part: report}
        return report != before

    def clear_own(self, part: str) -> bool:
        """It went well; whether that is news."""
        before = part in self._own
        self._own = {name: report for name, report in self._own.items() if name != part}
        return before

    def record(self, server_id: uuid.UUID, heartbeat: ProcessServerHeartbeat) -> None:
        """Take what a process server says in place of what it said before."""
        machines = {trouble.machine_id: trouble.error for trouble in heartbeat.troubles}
        pending = {machine.machine_id: machine.pending_bytes for machine in heartbeat.machines}
        rpo = {machine.machine_id: machine.rpo_seconds for machine in heartbeat.machines}
        self._reported[server_id] = _Reported(heartbeat.errors, machines, heartbeat.signals, pending, rpo)

    def of_server(self, server_id: uuid.UUID) -> tuple[ErrorReport, ...]:
        """The process server's own errors."""
        return self._reported.get(server_id, _Reported()).server

    def signals_of(self, server_id: uuid.UUID) -> tuple[HealthSignal, ...]:
        """The process server's health, as it measures it."""
        return self._reported.get(server_id, _Reported()).signals

    def pending_of(self, server_id: uuid.UUID, machine_id: uuid.UUID) -> int:
        """Bytes that the process server has of that machine and that are not stored yet."""
        return self._reported.get(server_id, _Reported()).pending.get(machine_id, 0)

    def rpo_of(self, server_id: uuid.UUID, machine_id: uuid.UUID) -> float | None:
        """Age of the oldest change that the process server has of that machine and storage has not."""
        return self._reported.get(server_id, _Reported()).rpo.get(machine_id)

    def of_machine(self, server_id: uuid.UUID, machine_id: uuid.UUID) -> tuple[ErrorReport, ...]:
        """What keeps this process server from storing what that machine sends."""
        reported = self._reported.get(server_id, _Reported())
        own = reported.machines.get(machine_id)
        shared = tuple(error for error in reported.server if error.part == STORAGE)
        return (*shared, own) if own is not None else shared
