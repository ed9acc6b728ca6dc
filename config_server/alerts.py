"""Alerts: what an operator should know of machines, raised and cleared; functions on a transaction.

One is raised when something begins, cleared when it is over, and kept afterwards, so that a night's trouble is seen in
the morning. The same trouble raises one alert, however often it is looked at.
"""

from __future__ import annotations

import sqlite3
import uuid
from typing import Final

from config_server import lives, policies
from config_server.lifecycle import RECOVERABLE
from config_server.machines import MACHINES
from replicar.control.messages import AgentHeartbeat, Alert

RPO_EXCEEDED: Final = "rpo-exceeded"
#: Alerts that are kept, newest first; those that last are always kept.
MAX_ALERTS: Final = 1000
MAX_LISTED: Final = 200


def look_at_rpo(connection: sqlite3.Connection, now_ns: int) -> bool:
    """Raise and clear what machines' RPO thresholds say now; whether anything changed."""
    changed = False
    rows = connection.execute(f"{MACHINES} WHERE parties.removed_ns IS NULL AND machines.report IS NOT NULL").fetchall()
    for row in rows:
        machine_id = uuid.UUID(row["id"])
        threshold = policies.of_machine(connection, machine_id).rpo_threshold_seconds
        rpo = rpo_seconds(row, now_ns)
        exceeded = lives.state_of(connection, machine_id) in RECOVERABLE and rpo > threshold
        message = f"the RPO of machine {row['name']} is {rpo:.0f} s; its policy's threshold is {threshold} s"
        hint = "see what is in its way: `replicar status`"
        changed |= put(connection, machine_id, RPO_EXCEEDED, exceeded, message, hint, now_ns)
    return changed


def rpo_seconds(row: sqlite3.Row, now_ns: int) -> float:
    """A machine's RPO: what its agent said, and the time since then, in which nobody knows what changed."""
    report = AgentHeartbeat.model_validate_json(row["report"])
    return report.rpo_seconds + max(now_ns - int(row["heartbeat_ns"]), 0) / 1e9


def listed(connection: sqlite3.Connection, *, lasting_only: bool = False) -> tuple[Alert, ...]:
    """Alerts, newest first."""
    rows = connection.execute(
        "SELECT alerts.*, parties.name FROM alerts JOIN parties ON parties.id = machine_id"
        " WHERE NOT ? OR cleared_ns IS NULL ORDER BY number DESC LIMIT ?",
        (lasting_only, MAX_LISTED),
    ).fetchall()
    return tuple(
        Alert(
            number=row["number"],
            machine=row["name"],
            code=row["code"],
            message=row["message"],
            hint=row["hint"],
            raised_ns=row["raised_ns"],
            cleared_ns=row["cleared_ns"],
        )
        for row in rows
    )


def put(
    connection: sqlite3.Connection,
    machine_id: uuid.UUID,
    code: str,
    lasts: bool,
    message: str,
    hint: str,
    now_ns: int,
) -> bool:
    """Raise an alert, or clear it; whether that changes anything."""
    row = connection.execute(
        "SELECT number FROM alerts WHERE machine_id = ? AND code = ? AND cleared_ns IS NULL", (str(machine_id), code)
    ).fetchone()
    if lasts == (row is not None):
        return False
    if row is not None:
        connection.execute("UPDATE alerts SET cleared_ns = ? WHERE number = ?", (now_ns, row["number"]))
        return True
    connection.execute(
        "INSERT INTO alerts (machine_id, code, message, hint, raised_ns) VALUES (?, ?, ?, ?, ?)",
        (str(machine_id), code, message, hint, now_ns),
    )
    connection.execute(
        "DELETE FROM alerts WHERE cleared_ns IS NOT NULL AND number NOT IN"
        " (SELECT number FROM alerts ORDER BY number DESC LIMIT ?)",
        (MAX_ALERTS,),
    )
    return True
