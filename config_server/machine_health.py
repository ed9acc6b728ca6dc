"""Machines' health: what the registry knows of each, as `replicar.machine_signals` takes it; on a transaction."""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import asdict

from config_server import alerts, lives, policies
from config_server.machines import LIVE_SECONDS
from replicar.control.messages import AgentHeartbeat, HealthSignal, MachineState
from replicar.formats.record import Consistency
from replicar.machine_signals import MachineFacts, of_machine

_NS = 10**9


def signals(
    connection: sqlite3.Connection, row: sqlite3.Row, report: AgentHeartbeat, now_ns: int
) -> tuple[HealthSignal, ...]:
    """A machine's signals; none while nothing is to be replicated, or its agent was never heard of.

    Args:
        row: as `machines.machine_row` gives it.
    """
    if row["process_server_id"] is None or row["removed_ns"] is not None or row["heartbeat_ns"] is None:
        return ()
    machine_id = uuid.UUID(row["id"])
    policy = policies.of_machine(connection, machine_id)
    silent_ns = now_ns - row["heartbeat_ns"]
    is_silent = silent_ns > LIVE_SECONDS * _NS and report.state != MachineState.STOPPED
    facts = MachineFacts(
        name=row["name"],
        silent_seconds=silent_ns / _NS if is_silent else 0.0,
        unsent=report.errors[0].message if report.errors else "",
        rpo_seconds=alerts.rpo_seconds(row, now_ns),
        rpo_threshold_seconds=policy.rpo_threshold_seconds,
        application_every_seconds=policy.application_point_seconds or 0,
        application_age_seconds=_application_age(connection, machine_id, now_ns),
        log_full_seconds=report.journal_full_seconds,
    )
    return tuple(HealthSignal.model_validate(asdict(signal)) for signal in of_machine(facts))


def _application_age(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int) -> float:
    newest_ns = connection.execute(
        "SELECT max(time_ns) FROM marks WHERE machine_id = ? AND kind = ? AND stored = 1 AND in_gap = 0",
        (str(machine_id), Consistency.APPLICATION),
    ).fetchone()[0]
    since_ns = newest_ns if newest_ns is not None else lives.stored(connection, machine_id).since_ns
    return max(now_ns - since_ns, 0) / _NS
