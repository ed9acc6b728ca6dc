"""The overview: machines, process servers and points as operators see them, read in one transaction each."""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import asdict
from typing import Final

from config_server import lives, machine_health, points, upkeep
from config_server.machines import LIVE_SECONDS, MACHINES, machine_row
from config_server.parties import Party
from config_server.troubles import Troubles
from replicar.control.identity import INCARNATION_SHIFT
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    AgentHeartbeat,
    HealthSignal,
    MachineState,
    MachineSummary,
    Point,
    PointList,
    ProcessServerSummary,
)
from replicar.signals import of_silence, worst

#: The state of a machine whose agent has not reported yet, and of one that was removed.
ENROLLED: Final = "enrolled"
REMOVED: Final = "removed"
#: Points that retention gave up and that are told, newest first.
MAX_THINNED: Final = 1000


def machine_points(connection: sqlite3.Connection, machine: Party, now_ns: int, troubles: Troubles) -> PointList:
    """The machine's named points, its ordered window as far as storage has it, and its gaps; what retention gave up is
    not offered."""
    row = machine_row(connection, machine.id)
    found, truncated = points.list_points(connection, machine.id, row["incarnation"])
    ordered_from, ordered_until_ns = points.stored_window(_report(row), row["incarnation"], _stored(row))
    retention = upkeep.retention_of(connection, machine.id)
    thinned: tuple[Point, ...] = ()
    if retention is not None:
        thinned = tuple(point for point in found if retention.gave_up(point.sequence))
        found = tuple(point for point in found if not retention.gave_up(point.sequence))
        if ordered_from is not None and ordered_from[0] < retention.floor_sequence:
            ordered_from = (retention.floor_sequence, retention.floor_time_ns)
    return PointList(
        machine_id=machine.id,
        name=machine.name,
        points=found,
        ordered_from=ordered_from,
        ordered_until_ns=ordered_until_ns,
        stored_sequence=_stored(row),
        gaps=points.list_gaps(connection, machine.id),
        truncated=truncated,
        errors=_errors(row, now_ns, troubles),
        retention=retention,
        thinned=thinned[:MAX_THINNED],
    )


def quiet(connection: sqlite3.Connection, machine: Party) -> tuple[int, int] | None:
    """A sequence, and an instant up to which the machine captured nothing behind it; None while that is not known."""
    row = machine_row(connection, machine.id)
    report = _report(row)
    if report.stored_until_ns is None or report.stored_sequence >> INCARNATION_SHIFT != row["incarnation"]:
        return None
    return report.stored_sequence, report.stored_until_ns


def summary(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int, troubles: Troubles) -> MachineSummary:
    return _summary(connection, machine_row(connection, machine_id), now_ns, troubles)


def summaries(connection: sqlite3.Connection, now_ns: int, troubles: Troubles) -> tuple[MachineSummary, ...]:
    """All machines that were not removed, by name."""
    rows = connection.execute(f"{MACHINES} WHERE parties.removed_ns IS NULL ORDER BY parties.name").fetchall()
    return tuple(_summary(connection, row, now_ns, troubles) for row in rows)


def process_servers(
    connection: sqlite3.Connection, now_ns: int, troubles: Troubles
) -> tuple[ProcessServerSummary, ...]:
    """All process servers that were not removed, by name; those that never reported have no address yet."""
    rows = connection.execute(
        "SELECT parties.id, parties.name, host, port, cache_bytes, cache_bytes_free, heartbeat_ns,"
        " (SELECT count(*) FROM machines WHERE machines.process_server_id = parties.id) AS machines"
        " FROM parties LEFT JOIN process_servers ON process_servers.id = parties.id"
        " WHERE parties.role = 'process-server' AND parties.removed_ns IS NULL ORDER BY parties.name"
    ).fetchall()
    return tuple(_server(row, now_ns, troubles) for row in rows)


def _server(row: sqlite3.Row, now_ns: int, troubles: Troubles) -> ProcessServerSummary:
    server_id, online = uuid.UUID(row["id"]), _is_live(row["heartbeat_ns"], now_ns)
    signals = troubles.signals_of(server_id) if online else ()
    if not online and row["heartbeat_ns"] is not None:
        silent_seconds = (now_ns - row["heartbeat_ns"]) / 1e9
        silent = of_silence(f"process server {row['name']}", silent_seconds, "`process-server run`", "806")
        signals = (HealthSignal.model_validate(asdict(silent)),)
    return ProcessServerSummary(
        id=server_id,
        name=row["name"],
        online=online,
        last_heartbeat_ns=row["heartbeat_ns"],
        host=row["host"] or "",
        port=row["port"] or 0,
        cache_bytes=row["cache_bytes"] or 0,
        cache_bytes_free=row["cache_bytes_free"] or 0,
        machines=row["machines"],
        errors=troubles.of_server(server_id) if online else (),
        health=worst(signal.level for signal in signals),
        signals=signals,
    )


def _summary(connection: sqlite3.Connection, row: sqlite3.Row, now_ns: int, troubles: Troubles) -> MachineSummary:
    report, errors = _report(row), _errors(row, now_ns, troubles)
    machine_id = uuid.UUID(row["id"])
    signals = machine_health.signals(connection, row, report, now_ns)
    return MachineSummary(
        id=machine_id,
        name=row["name"],
        incarnation=row["incarnation"],
        state=report.state if row["removed_ns"] is None else REMOVED,
        online=_is_live(row["heartbeat_ns"], now_ns) and row["removed_ns"] is None,
        last_heartbeat_ns=row["heartbeat_ns"],
        epoch=row["epoch"],
        process_server=row["server_name"],
        captured_sequence=report.captured_sequence,
        received_sequence=max(row["received_sequence"], report.received_sequence),
        stored_sequence=_stored(row),
        stored_segment=row["stored_segment"],
        stored_digest=row["stored_digest"],
        rpo_seconds=report.rpo_seconds,
        rpo_p50_seconds=report.rpo_p50_seconds,
        rpo_p99_seconds=report.rpo_p99_seconds,
        bytes_captured=report.bytes_captured,
        bytes_sent=report.bytes_sent,
        bytes_received=row["bytes_received"],
        bytes_stored=row["bytes_stored"],
        disks=report.disks,
        audit=report.audit,
        journal_full_seconds=report.journal_full_seconds,
        copy_remaining_seconds=report.copy_remaining_seconds,
        capture=report.capture,
        source_bytes=report.unstored_bytes,
        pending_bytes=_pending(row, troubles),
        life=lives.state_of(connection, machine_id),
        life_since_ns=lives.stored(connection, machine_id).since_ns,
        storing=not errors,
        errors=errors,
        server_rpo_seconds=_server_rpo(row, troubles),
        health=worst(signal.level for signal in signals),
        signals=signals,
    )


def _server_rpo(row: sqlite3.Row, troubles: Troubles) -> float | None:
    if row["process_server_id"] is None:
        return None
    return troubles.rpo_of(uuid.UUID(row["process_server_id"]), uuid.UUID(row["id"]))


def _pending(row: sqlite3.Row, troubles: Troubles) -> int:
    if row["process_server_id"] is None:
        return 0
    return troubles.pending_of(uuid.UUID(row["process_server_id"]), uuid.UUID(row["id"]))


def _errors(row: sqlite3.Row, now_ns: int, troubles: Troubles) -> tuple[ErrorReport, ...]:
    """What is in the way of storing what a protected machine captures, as far as anybody says it.

    Who is away is an error itself, and what it said before does not count any more.
    """
    if row["process_server_id"] is None or row["removed_ns"] is not None:
        return ()
    found: list[ErrorReport] = []
    report, server = _report(row), f"process server {row['server_name']}"
    if not _is_live(row["server_heartbeat_ns"], now_ns):
        found.append(_silent(server, row["server_heartbeat_ns"], now_ns, "`process-server run`"))
    else:
        said = troubles.of_machine(uuid.UUID(row["process_server_id"]), uuid.UUID(row["id"]))
        found += [error.model_copy(update={"part": server}) for error in said]
    if _is_live(row["heartbeat_ns"], now_ns):
        found += [error.model_copy(update={"part": "agent"}) for error in report.errors]
    elif row["heartbeat_ns"] is not None and report.state != MachineState.STOPPED:  # who said goodbye is not missing
        found.append(_silent("agent", row["heartbeat_ns"], now_ns, "`mobility-agent run`"))
    return tuple(found)


def _silent(part: str, heartbeat_ns: int | None, now_ns: int, command: str) -> ErrorReport:
    for_seconds = f"for {(now_ns - heartbeat_ns) // 10**9} s" if heartbeat_ns is not None else "yet"
    return ErrorReport(
        part=part,
        error="TransientError",
        message=f"the {part} was not heard of {for_seconds}",
        hint=f"see whether {command} is up there, and reaches this config server",
    )


def _stored(row: sqlite3.Row) -> int:
    """What the process server or the agent (which has it from the process server) said, whichever is newer."""
    return max(int(row["stored_sequence"]), _report(row).stored_sequence)


def _report(row: sqlite3.Row) -> AgentHeartbeat:
    """What the agent last said; a machine that never did is merely enrolled."""
    if row["report"] is None:
        return AgentHeartbeat(time_ns=0, state=ENROLLED)
    return AgentHeartbeat.model_validate_json(row["report"])


def _is_live(heartbeat_ns: int | None, now_ns: int) -> bool:
    return heartbeat_ns is not None and heartbeat_ns >= now_ns - LIVE_SECONDS * 10**9
