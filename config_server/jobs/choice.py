"""Recovery points as operators choose them, turned down where the registry knows that there is no such.

The stream in storage is the truth, so a worker looks again; here a mistake is told at once, before a machine is made
for it. What the registry can't know (a name that has left its bounded catalogue, an instant of an earlier window) is
left to the worker.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from config_server import machines, points, upkeep
from config_server.parties import Party
from replicar.control.messages import PointChoice, PointKind, Retention
from replicar.errors import PermanentError, TransientError
from replicar.formats.record import Consistency
from replicar.moments import format_moment

_FIELDS: Final = {PointKind.NAMED: "name", PointKind.INSTANT: "time_ns", PointKind.SEQUENCE: "sequence"}


def check(connection: sqlite3.Connection, machine: Party, choice: PointChoice, now_ns: int) -> None:
    """Raises:
    PermanentError: there is no such point, or none that can be recovered.
    TransientError: storage does not hold it yet.
    """
    _check_fields(choice)
    hint = f"see what there is: `replicar points {machine.name}`"
    retention = upkeep.retention_of(connection, machine.id)
    if choice.kind is PointKind.NAMED:
        _check_name(connection, machine, choice.name, hint, retention)
    elif choice.kind is PointKind.INSTANT and (choice.time_ns or 0) > now_ns:
        raise PermanentError("the instant lies in the future", hint=hint, status=400)
    elif choice.kind is PointKind.INSTANT and retention is not None:
        _check_instant(choice.time_ns or 0, retention, hint)
    elif choice.kind is PointKind.SEQUENCE:
        _check_sequence(connection, machine, choice.sequence or 0, hint, retention)
    elif choice.kind is PointKind.LATEST_APPLICATION:
        rows = connection.execute(
            "SELECT sequence FROM marks WHERE machine_id = ? AND kind = ? AND in_gap = 0 AND stored = 1",
            (str(machine.id), Consistency.APPLICATION),
        ).fetchall()
        if all(retention is not None and retention.gave_up(row["sequence"]) for row in rows):
            raise PermanentError(
                f"machine {machine.name} has no application-consistent point in storage",
                hint=f"choose another point, or make one: `replicar tag {machine.name} NAME --application`",
                status=404,
            )


def _check_fields(choice: PointChoice) -> None:
    given = {"name"} if choice.name else set()
    given |= {name for name in ("time_ns", "sequence") if getattr(choice, name) is not None}
    wanted = {_FIELDS[choice.kind]} if choice.kind in _FIELDS else set()
    if given != wanted:
        raise PermanentError(
            f"a {choice.kind} point is chosen by {', '.join(wanted) or 'nothing else'}, not by "
            f"{', '.join(sorted(given)) or 'nothing'}",
            hint="choose one point, in one way",
            status=400,
        )


def _check_name(
    connection: sqlite3.Connection, machine: Party, name: str, hint: str, retention: Retention | None
) -> None:
    rows = connection.execute(
        "SELECT stored, in_gap, sequence FROM marks WHERE machine_id = ? AND name = ?", (str(machine.id), name)
    ).fetchall()
    usable = [row for row in rows if not row["in_gap"]]
    if not rows:
        count = connection.execute("SELECT count(*) FROM marks WHERE machine_id = ?", (str(machine.id),)).fetchone()[0]
        if count >= points.MAX_SCHEDULED:
            return  # it may be one that has left the catalogue
        raise PermanentError(f"machine {machine.name} has no point {name!r}", hint=hint, status=404, point=name)
    if not usable:
        raise PermanentError(
            f"the point {name!r} lies in a gap (sequence {rows[0]['sequence']}): order was not captured there, so it "
            "is no state that the machine had",
            hint=hint,
            status=409,
            point=name,
        )
    if retention is not None and all(retention.gave_up(row["sequence"]) for row in usable):
        raise _thinned(f"the point {name!r}", retention.nearest(sequence=usable[0]["sequence"]), hint)
    if not any(row["stored"] for row in usable):
        raise TransientError(
            f"storage does not hold the point {name!r} yet",
            hint=f"wait for it: `replicar points {machine.name}`",
            status=409,
            point=name,
        )


def _check_instant(time_ns: int, retention: Retention, hint: str) -> None:
    kept_times = {item.time_ns for item in retention.kept}
    is_told = not retention.kept_from and time_ns < retention.floor_time_ns
    if is_told and time_ns not in kept_times:
        raise _thinned(f"the instant {format_moment(time_ns)}", retention.nearest(time_ns=time_ns), hint)


def _thinned(what: str, nearest: str, hint: str) -> PermanentError:
    return PermanentError(f"{what} was thinned: retention gave it up", hint=f"{nearest}; {hint}", status=410)


def _check_sequence(
    connection: sqlite3.Connection, machine: Party, sequence: int, hint: str, retention: Retention | None
) -> None:
    stored = machines.machine_row(connection, machine.id)["stored_sequence"]
    if sequence > stored:
        raise PermanentError(
            f"sequence {sequence} is beyond what storage holds (up to {stored})", hint=hint, status=404
        )
    if retention is not None and retention.gave_up(sequence):
        raise _thinned(f"sequence {sequence}", retention.nearest(sequence=sequence), hint)
    gap = connection.execute(
        "SELECT first_sequence, reason FROM gaps WHERE machine_id = ?1 AND first_sequence <= ?2"
        " AND coalesce(last_sequence, ?2) >= ?2",
        (str(machine.id), sequence),
    ).fetchone()
    if gap is not None:
        raise PermanentError(
            f"sequence {sequence} lies in a gap that began at {gap['first_sequence']} ({gap['reason']}): order was "
            "not captured there",
            hint=hint,
            status=409,
        )
