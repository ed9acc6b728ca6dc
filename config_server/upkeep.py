"""Upkeep in the registry: which machine is due, who has it, and what retention has left of it; on a transaction.

Only machines that replicate are kept up. One that was failed over, is on its way home, or is protected no more keeps
what it has: nothing of it is given up by the clock, but for a warm replica. One that the policy does not want any more,
or whose machine is protected no more, is removed a while after it was last brought on: the log has what it had.

A machine is one worker's for the length of a lease, so that two don't do the same thing twice. Nothing depends on it:
folding and warm replicas are fenced in storage, by themselves. A worker that died has its machine back at once when it
returns; another has it when the lease runs out.

Failures become alerts: at once if somebody has to change something, after a few in a row if the world was in the way.
"""

from __future__ import annotations

import sqlite3
import uuid
from typing import Final

from config_server import alerts, lives, policies
from config_server.lifecycle import RECOVERABLE, REPLICATING
from config_server.machines import machine_row
from config_server.parties import Party
from replicar.control.messages import (
    UPKEEP_LEASE_SECONDS,
    ClaimedMachine,
    LifeState,
    Retention,
    UpkeepClaim,
    UpkeepKind,
    UpkeepReceipt,
    UpkeepRenewal,
    UpkeepReport,
    UpkeepTask,
)
from replicar.errors import FencedError

#: Where a machine's past is given up by the clock; a drill reads from a pinned point, which stays.
KEPT_UP: Final = REPLICATING | {LifeState.TEST_FAILOVER, LifeState.CLEAN_UP_PENDING}
#: Where there is a point for a warm replica to hold.
WARMED: Final = RECOVERABLE | {LifeState.TEST_FAILOVER, LifeState.CLEAN_UP_PENDING}
#: What an operator has to think better of not wanting a warm replica, which takes long to fill again.
UNWANTED_SECONDS: Final = 3600
#: Alerts: it failed, or nobody has done it for long although somebody did before.
FAILING: Final = {kind: f"{kind}-failing" for kind in UpkeepKind}
OVERDUE: Final = {kind: f"{kind}-overdue" for kind in UpkeepKind}
OVERDUE_SECONDS: Final = {
    UpkeepKind.FOLD: 6 * 3600,
    UpkeepKind.REPLICA: 3600,
    UpkeepKind.REPLICA_REMOVAL: 24 * 3600,
}
_WHAT: Final = {
    UpkeepKind.FOLD: "folding the log",
    UpkeepKind.REPLICA: "the warm replica",
    UpkeepKind.REPLICA_REMOVAL: "removing the warm replica",
}
#: Failures in a row that are an alert though trying again may help.
TRIES: Final = 3
_NS: Final = 10**9


def claim(connection: sqlite3.Connection, worker: Party, request: UpkeepClaim, now_ns: int) -> UpkeepTask:
    """The machine that has been due for longest, now this worker's; none if nothing is."""
    owner = _owner(worker, request.instance)
    rows = connection.execute(
        "SELECT machines.id FROM machines JOIN parties ON parties.id = machines.id"
        " LEFT JOIN upkeep ON upkeep.machine_id = machines.id AND upkeep.kind = ?"
        " WHERE parties.removed_ns IS NULL AND stored_segment IS NOT NULL AND destroyed_ns IS NULL"
        " AND (coalesce(due_ns, 0) <= ? OR owner = ?) ORDER BY coalesce(due_ns, 0), parties.name",
        (request.kind, now_ns, owner),
    ).fetchall()
    for row in rows:
        machine_id = uuid.UUID(row["id"])
        if not _is_wanted(connection, machine_id, request.kind, now_ns):
            continue
        connection.execute(
            "INSERT INTO upkeep (machine_id, kind, owner, due_ns, done_ns) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET owner = excluded.owner, due_ns = excluded.due_ns",
            (row["id"], request.kind, owner, lease_end(now_ns), now_ns),
        )
        return UpkeepTask(machine=_machine(connection, machine_id), policy=policies.of_machine(connection, machine_id))
    return UpkeepTask()


def renew(connection: sqlite3.Connection, worker: Party, said: UpkeepRenewal, now_ns: int) -> UpkeepReceipt:
    """Keep a machine for another while.

    Raises:
        FencedError: another worker has it by now.
    """
    changed = connection.execute(
        "UPDATE upkeep SET due_ns = ? WHERE machine_id = ? AND kind = ? AND owner = ?",
        (lease_end(now_ns), str(said.machine_id), said.kind, _owner(worker, said.instance)),
    ).rowcount
    if not changed:
        raise FencedError(
            f"{_WHAT[said.kind]} of machine {said.machine_id} is not this worker's (any more)",
            hint="nothing to do; another worker is at it, or will be",
            machine_id=str(said.machine_id),
        )
    return UpkeepReceipt(lease_seconds=UPKEEP_LEASE_SECONDS)


def report(connection: sqlite3.Connection, worker: Party, said: UpkeepReport, now_ns: int) -> UpkeepReceipt:
    """Take in how it went. What is left of a machine anybody may tell; the rest is for who has it."""
    machine_id = str(said.machine_id)
    if said.retention is not None:
        record_retention(connection, said.machine_id, said.retention)
    row = connection.execute(
        "SELECT * FROM upkeep WHERE machine_id = ? AND kind = ? AND owner = ?",
        (machine_id, said.kind, _owner(worker, said.instance)),
    ).fetchone()
    if row is None:
        return UpkeepReceipt(lease_seconds=0)
    failures, done_ns = row["failures"], row["done_ns"]
    if said.error is not None:
        failures += 1
    elif not said.elsewhere:
        failures, done_ns = 0, now_ns
    connection.execute(
        "UPDATE upkeep SET owner = '', due_ns = ?, done_ns = ?, failures = ? WHERE machine_id = ? AND kind = ?",
        (now_ns + int(said.again_seconds * _NS), done_ns, failures, machine_id, said.kind),
    )
    if said.error is not None and (failures >= TRIES or said.error.error != "TransientError"):
        message = f"{_WHAT[said.kind]} failed: {said.error.message}"
        alerts.put(connection, said.machine_id, FAILING[said.kind], True, message, said.error.hint, now_ns)
    elif not failures:
        alerts.put(connection, said.machine_id, FAILING[said.kind], False, "", "", now_ns)
        if said.kind is UpkeepKind.REPLICA_REMOVAL and not said.elsewhere:
            _forget_replica(connection, said.machine_id, now_ns)
    return UpkeepReceipt(lease_seconds=0)


def look(connection: sqlite3.Connection, now_ns: int) -> None:
    """Raise and clear alerts of what is overdue, by the clock."""
    for row in connection.execute("SELECT * FROM upkeep").fetchall():
        machine_id, kind = uuid.UUID(row["machine_id"]), UpkeepKind(row["kind"])
        is_wanted = _is_wanted(connection, machine_id, kind, now_ns)
        seconds = (now_ns - row["done_ns"]) // _NS
        is_at_it = bool(row["owner"]) and row["due_ns"] > now_ns  # a first index or fill may take hours
        is_late = is_wanted and not is_at_it and seconds > OVERDUE_SECONDS[kind]
        message = f"{_WHAT[kind]} was not seen to for {seconds // 60} minutes"
        hint = "see whether a recovery worker is up, and reaches this config server and storage"
        alerts.put(connection, machine_id, OVERDUE[kind], is_late, message, hint, now_ns)
        if not is_wanted:
            alerts.put(connection, machine_id, FAILING[kind], False, "", "", now_ns)


def record_retention(connection: sqlite3.Connection, machine_id: uuid.UUID, retention: Retention) -> None:
    """Keep what is left of a machine's past, unless something newer is known: a floor only rises."""
    known = retention_of(connection, machine_id)
    if known is not None and _age(retention) < _age(known):
        return
    connection.execute(
        "INSERT INTO retentions SELECT id, ? FROM machines WHERE id = ?"
        " ON CONFLICT DO UPDATE SET retention = excluded.retention",
        (retention.model_dump_json(), str(machine_id)),
    )


def retention_of(connection: sqlite3.Connection, machine_id: uuid.UUID) -> Retention | None:
    """What is left of a machine's past; None while nobody said that anything was given up."""
    row = connection.execute("SELECT retention FROM retentions WHERE machine_id = ?", (str(machine_id),)).fetchone()
    return Retention.model_validate_json(row["retention"]) if row is not None else None


def _age(retention: Retention) -> tuple[int, int]:
    # Generations of a log that was lost begin anew, but its successor's sequences are higher.
    return retention.floor_sequence, retention.generation


def _machine(connection: sqlite3.Connection, machine_id: uuid.UUID) -> ClaimedMachine:
    row = machine_row(connection, machine_id)
    return ClaimedMachine(
        id=machine_id,
        name=row["name"],
        incarnation=row["incarnation"],
        epoch=row["epoch"],
        stored_sequence=row["stored_sequence"],
        stored_segment=row["stored_segment"],
        stored_digest=row["stored_digest"],
    )


def _is_wanted(connection: sqlite3.Connection, machine_id: uuid.UUID, kind: UpkeepKind, now_ns: int) -> bool:
    state = lives.stored(connection, machine_id).state
    is_warm = policies.of_machine(connection, machine_id).replica == "warm"
    if kind is UpkeepKind.REPLICA_REMOVAL:
        is_unwanted = state is LifeState.DISABLED or (state in KEPT_UP and not is_warm)
        return is_unwanted and _was_warm(connection, machine_id, now_ns)
    if state not in KEPT_UP:
        return False
    if kind is UpkeepKind.FOLD:
        return True
    return is_warm and lives.state_of(connection, machine_id) in WARMED


def _was_warm(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int) -> bool:
    """Whether a worker has brought its replica on, none is at it, and that was long enough ago."""
    row = connection.execute(
        "SELECT * FROM upkeep WHERE machine_id = ? AND kind = ?", (str(machine_id), UpkeepKind.REPLICA)
    ).fetchone()
    if row is None or (row["owner"] and row["due_ns"] > now_ns):
        return False
    return bool(row["done_ns"] + UNWANTED_SECONDS * _NS <= now_ns)


def _forget_replica(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int) -> None:
    """There is none any more, so there is nothing to bring on or to remove, until one is wanted again."""
    for kind in (UpkeepKind.REPLICA, UpkeepKind.REPLICA_REMOVAL):
        connection.execute("DELETE FROM upkeep WHERE machine_id = ? AND kind = ?", (str(machine_id), kind))
        for code in (FAILING[kind], OVERDUE[kind]):
            alerts.put(connection, machine_id, code, False, "", "", now_ns)


def _owner(worker: Party, instance: str) -> str:
    return f"{worker.name}/{instance}"


def lease_end(now_ns: int) -> int:
    """When what a worker claims or renews now is anybody's again."""
    return now_ns + int(UPKEEP_LEASE_SECONDS * _NS)
