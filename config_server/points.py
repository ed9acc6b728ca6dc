"""What can be recovered: marks, gaps and the commands that ask for marks, as functions on a transaction.

The stream in storage is the truth; this is its catalogue, as agents report it. Reports come more than once and out of
step, so everything here may be said again without harm.

A mark is *stored* when its incarnation's stored sequence has passed it. The incarnation matters: sequences of a machine
that was enrolled again are all higher, and must not make marks look stored that were lost with the old change log.

Nor do they say that the log of the earlier incarnation is still there: somebody may have enrolled the machine again
because its container was lost. So marks of an earlier incarnation are listed as `earlier`, and the ordered window is
that of the present incarnation, once storage has gone past the end of the gap it begins with.

A mark that lies in a gap is kept, so that its command is answered, but never listed: it is no state to go back to.

Weak: once a machine has more than `MAX_MARKS` marks, or more than `MAX_SCHEDULED` that nobody asked for, the oldest
leave the catalogue. They stay in the stream, where recovery by name, instant or sequence still reaches them.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable
from typing import Final

from replicar.control.identity import INCARNATION_SHIFT
from replicar.control.messages import AgentHeartbeat, Command, CommandRefusal, GapReport, MarkReport, MarkRequest, Point
from replicar.errors import ConflictError, LimitError, PermanentError
from replicar.formats.frame import ANEW_STEP
from replicar.formats.record import Consistency

#: A mark every five minutes for a year.
MAX_MARKS: Final = 100_000
MAX_GAPS: Final = 10_000
#: Of which made by the clock, so that they don't drive out those that have been asked for; at five minutes, a week.
MAX_SCHEDULED: Final = 2016
#: What one reply holds, newest first.
MAX_POINTS_LISTED: Final = 10_000
#: Marks that a machine was asked for and has not made yet; more means that it is away.
MAX_COMMANDS: Final = 64
MARK: Final = "mark"
#: Marks, and whether the group that each is of is a point.
_MARKS: Final = (
    "SELECT *, EXISTS (SELECT 1 FROM group_points WHERE group_points.id = marks.command_id) AS in_group FROM marks "
)


def record_marks(
    connection: sqlite3.Connection, machine_id: uuid.UUID, marks: Iterable[MarkReport], stored_sequence: int
) -> None:
    """Take marks into the catalogue, and their commands off the list; a mark that is known already stays as it is."""
    some = False
    for mark in marks:
        some = True
        connection.execute(
            "INSERT INTO marks (machine_id, sequence, name, kind, time_ns, command_id, stored, in_gap, pause_seconds)"
            " VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?) ON CONFLICT DO NOTHING",
            (
                *(str(machine_id), mark.sequence, mark.name, mark.kind, mark.time_ns, mark.command_id, mark.in_gap),
                mark.pause_seconds,
            ),
        )
        if mark.command_id is not None:
            connection.execute(
                "DELETE FROM commands WHERE id = ? AND machine_id = ?", (mark.command_id, str(machine_id))
            )
    if some:
        _trim(connection, "marks", "sequence", machine_id, MAX_SCHEDULED, "AND command_id IS NULL")
        _trim(connection, "marks", "sequence", machine_id, MAX_MARKS)
    record_stored(connection, machine_id, stored_sequence)


def record_stored(connection: sqlite3.Connection, machine_id: uuid.UUID, stored_sequence: int) -> None:
    """Everything up to `stored_sequence` is in storage, from where the stream last began anew.

    What a change log had lost before, and a mark in it, never got there; nobody can tell that from what just was not
    reported in time, so neither is offered here. (The log itself knows.)
    """
    begin = stored_sequence // ANEW_STEP * ANEW_STEP
    connection.execute(
        "UPDATE marks SET stored = 1 WHERE machine_id = ? AND stored = 0 AND sequence BETWEEN ? AND ?",
        (str(machine_id), begin, stored_sequence),
    )


def record_gaps(connection: sqlite3.Connection, machine_id: uuid.UUID, gaps: Iterable[GapReport]) -> None:
    """Take gaps into the catalogue; one that has ended stays ended."""
    some = False
    for gap in gaps:
        some = True
        connection.execute(
            "INSERT INTO gaps VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET last_sequence = coalesce(excluded.last_sequence, last_sequence)",
            (str(machine_id), gap.first_sequence, gap.last_sequence, gap.reason),
        )
    if some:
        _trim(connection, "gaps", "first_sequence", machine_id, MAX_GAPS)


def record_refusals(connection: sqlite3.Connection, machine_id: uuid.UUID, refusals: Iterable[CommandRefusal]) -> None:
    """Note which commands the agent won't carry out; each machine's latest few are kept for who asked."""
    some = False
    for refusal in refusals:
        some = True
        connection.execute(
            "UPDATE commands SET refusal = ? WHERE id = ? AND machine_id = ?",
            (refusal.model_dump_json(), refusal.command_id, str(machine_id)),
        )
    if some:
        connection.execute(
            "DELETE FROM commands WHERE machine_id = ?1 AND refusal IS NOT NULL AND id NOT IN (SELECT id FROM commands"
            " WHERE machine_id = ?1 AND refusal IS NOT NULL ORDER BY created_ns DESC LIMIT ?2)",
            (str(machine_id), MAX_COMMANDS),
        )


def refusal(connection: sqlite3.Connection, command_id: str) -> CommandRefusal | None:
    """Why the agent won't carry a command out, if it said so."""
    row = connection.execute("SELECT refusal FROM commands WHERE id = ?", (command_id,)).fetchone()
    if row is None or row["refusal"] is None:
        return None
    return CommandRefusal.model_validate_json(row["refusal"])


def list_points(
    connection: sqlite3.Connection, machine_id: uuid.UUID, incarnation: int
) -> tuple[tuple[Point, ...], bool]:
    """Named points, newest first, and whether older ones were left out; `incarnation` is the present one."""
    rows = connection.execute(
        _MARKS + "WHERE machine_id = ? AND in_gap = 0 ORDER BY sequence DESC, name LIMIT ?",
        (str(machine_id), MAX_POINTS_LISTED + 1),
    ).fetchall()
    return tuple(_point(row, incarnation) for row in rows[:MAX_POINTS_LISTED]), len(rows) > MAX_POINTS_LISTED


def stored_window(
    report: AgentHeartbeat, incarnation: int, stored_sequence: int
) -> tuple[tuple[int, int] | None, int | None]:
    """From where (sequence, time_ns) and until when every instant can be recovered from storage; None for nowhere."""
    begin = report.ordered_from
    if begin is None or begin[0] > stored_sequence:
        return None, None
    if {begin[0] >> INCARNATION_SHIFT, stored_sequence >> INCARNATION_SHIFT} != {incarnation}:
        return None, None
    return begin, max(begin[1], report.stored_until_ns or 0)


def list_gaps(connection: sqlite3.Connection, machine_id: uuid.UUID) -> tuple[GapReport, ...]:
    rows = connection.execute(
        "SELECT * FROM gaps WHERE machine_id = ? ORDER BY first_sequence", (str(machine_id),)
    ).fetchall()
    return tuple(
        GapReport(first_sequence=row["first_sequence"], last_sequence=row["last_sequence"], reason=row["reason"])
        for row in rows
    )


def ask_for_mark(
    connection: sqlite3.Connection, machine_id: uuid.UUID, name: str, request: MarkRequest, now_ns: int
) -> None:
    """Put a mark on the machine's list of commands, unless it is there or was made already.

    Raises:
        LimitError: the machine has too many to make.
        PermanentError: the command's id belongs to another machine.
    """
    if commanded(connection, machine_id, request.command_id) is not None:
        return
    row = connection.execute("SELECT machine_id FROM commands WHERE id = ?", (request.command_id,)).fetchone()
    if row is not None:
        if row["machine_id"] != str(machine_id):
            raise PermanentError("this command id is another machine's", hint="ask without an id", status=409)
        return
    waiting = len(pending(connection, machine_id))
    if waiting >= MAX_COMMANDS:
        raise LimitError(
            f"machine {name} has {waiting} marks still to make; {MAX_COMMANDS} is the limit",
            hint="see whether its agent is up: `replicar machines`",
            status=429,
            machine=name,
        )
    connection.execute(
        "INSERT INTO commands VALUES (?, ?, ?, ?, ?, ?, NULL)",
        (request.command_id, str(machine_id), MARK, request.name, request.consistency, now_ns),
    )


def pending(connection: sqlite3.Connection, machine_id: uuid.UUID) -> tuple[Command, ...]:
    """The machine's commands that no mark has answered yet, oldest first."""
    rows = connection.execute(
        "SELECT * FROM commands WHERE machine_id = ? AND refusal IS NULL ORDER BY created_ns, id", (str(machine_id),)
    ).fetchall()
    return tuple(
        Command(id=row["id"], kind=row["kind"], name=row["name"], consistency=Consistency(row["consistency"]))
        for row in rows
    )


def commanded(connection: sqlite3.Connection, machine_id: uuid.UUID, command_id: str) -> Point | None:
    """The mark that a command led to, once it is reported.

    Raises:
        PermanentError: it was made but lies in a gap, or the agent refused to make it.
        LimitError, ConflictError: the agent refused it by that.
    """
    row = connection.execute(
        _MARKS + "WHERE machine_id = ? AND command_id = ?", (str(machine_id), command_id)
    ).fetchone()
    if row is not None and row["in_gap"]:
        raise PermanentError(
            f"the mark {row['name']!r} was made at sequence {row['sequence']}, but order was not captured there, "
            "so it is no recovery point",
            hint="wait until the machine is protected (`replicar machines`), then make one by another name",
            status=409,
            sequence=row["sequence"],
        )
    refused = refusal(connection, command_id) if row is None else None
    if refused is not None:
        cls = {"LimitError": LimitError, "ConflictError": ConflictError}.get(refused.error, PermanentError)
        raise cls(f"the agent refused: {refused.message}", hint=refused.hint, status=409, command_id=command_id)
    return _point(row) if row is not None else None


def _trim(
    connection: sqlite3.Connection, table: str, column: str, machine_id: uuid.UUID, keep: int, which: str = ""
) -> None:
    # table, column and which are constants of this module, so nothing foreign gets into the statement
    newest = f"SELECT {column} FROM {table} WHERE machine_id = ?1 {which} ORDER BY {column} DESC LIMIT 1 OFFSET ?2"  # noqa: S608
    connection.execute(
        f"DELETE FROM {table} WHERE machine_id = ?1 {which} AND {column} < ({newest})",  # noqa: S608
        (str(machine_id), keep - 1),
    )


def _point(row: sqlite3.Row, incarnation: int = 0) -> Point:
    kind = Consistency(row["kind"])
    if kind is Consistency.GROUP and not row["in_group"]:
        kind = Consistency.CRASH  # not every machine of its group kept it, so it is this one's point alone
    return Point(
        name=row["name"],
        kind=kind,
        sequence=row["sequence"],
        time_ns=row["time_ns"],
        stored=bool(row["stored"]),
        earlier=row["sequence"] >> INCARNATION_SHIFT < incarnation,
        command_id=row["command_id"],
        pause_seconds=row["pause_seconds"],
    )
