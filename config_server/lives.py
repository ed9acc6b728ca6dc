"""Machines' lives in the registry: what is decided about each, and what its reports make of that; see `lifecycle`."""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import dataclass

from config_server import machines, parties, placement
from config_server.lifecycle import REPLICATING, Seen, observed
from config_server.vault import Vault
from replicar.control.messages import AgentHeartbeat, LifeState, MachineHold, MachineState

_COPYING = frozenset({str(MachineState.INITIAL_REPLICATION), str(MachineState.RESYNCHRONISING)})


@dataclass(frozen=True, slots=True)
class Life:
    """What is stored: the state and since when, when the machine last left plain replication, whether it is held."""

    state: LifeState
    since_ns: int = 0
    left_ns: int | None = None
    held: bool = False


def stored(connection: sqlite3.Connection, machine_id: uuid.UUID) -> Life:
    row = connection.execute("SELECT * FROM lives WHERE machine_id = ?", (str(machine_id),)).fetchone()
    if row is None:
        return Life(LifeState.UNPROTECTED)
    return Life(LifeState(row["state"]), row["since_ns"], row["left_ns"], bool(row["held"]))


def state_of(connection: sqlite3.Connection, machine_id: uuid.UUID) -> LifeState:
    """The state that people see."""
    life = stored(connection, machine_id)
    if life.state not in REPLICATING:
        return life.state
    return observed(life.state, seen(connection, machines.machine_row(connection, machine_id)))


def seen(connection: sqlite3.Connection, row: sqlite3.Row) -> Seen:
    """What the registry knows of a machine's replication; `row` as `machines.machine_row` gives it."""
    report = AgentHeartbeat.model_validate_json(row["report"]) if row["report"] is not None else None
    if report is None:
        return Seen(reporting=False, copying=False, has_point=has_point(connection, row, None))
    return Seen(
        reporting=row["process_server_id"] is not None and report.state != MachineState.STARTING,
        copying=report.state in _COPYING,
        has_point=has_point(connection, row, report),
    )


def has_point(connection: sqlite3.Connection, row: sqlite3.Row, report: AgentHeartbeat | None) -> bool:
    """Whether storage has any state of the machine to go back to."""
    if report is not None and report.ordered_from is not None and report.ordered_from[0] <= row["stored_sequence"]:
        return True
    mark = connection.execute(
        "SELECT 1 FROM marks WHERE machine_id = ? AND stored = 1 AND in_gap = 0 LIMIT 1", (row["id"],)
    ).fetchone()
    return mark is not None


def move(connection: sqlite3.Connection, machine_id: uuid.UUID, state: LifeState, now_ns: int) -> None:
    """Store a state; the time of leaving plain replication is kept until the machine is back in it."""
    before = stored(connection, machine_id)
    left_ns = None if state in REPLICATING else before.left_ns or now_ns
    since_ns = before.since_ns if state is before.state else now_ns
    connection.execute(
        "INSERT INTO lives (machine_id, state, since_ns, left_ns) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET state = excluded.state, since_ns = excluded.since_ns, left_ns = excluded.left_ns",
        (str(machine_id), state, since_ns, left_ns),
    )


def hold(connection: sqlite3.Connection, machine_id: uuid.UUID) -> MachineHold:
    """Take the machine's stream from its process server, under a new epoch; doing it again changes nothing.

    Whoever writes into its log from here on does so by that epoch, and storage refuses what an older one writes: the
    new writer breaks the leases of all blobs of older epochs.
    """
    if not stored(connection, machine_id).held:
        connection.execute(
            "UPDATE lives SET held = 1, held_server_id ="
            " (SELECT process_server_id FROM machines WHERE machines.id = lives.machine_id) WHERE machine_id = ?",
            (str(machine_id),),
        )
        connection.execute(
            "UPDATE machines SET process_server_id = NULL, epoch = epoch + 1 WHERE id = ?", (str(machine_id),)
        )
    return MachineHold(epoch=machines.machine_row(connection, machine_id)["epoch"], held=True)


def withdraw(connection: sqlite3.Connection, machine_id: uuid.UUID) -> None:
    """End a machine's replication: no process server, no commands, no hold."""
    machines.withdraw(connection, machine_id)
    connection.execute("UPDATE lives SET held = 0, held_server_id = NULL WHERE machine_id = ?", (str(machine_id),))


def release(connection: sqlite3.Connection, vault: Vault, machine_id: uuid.UUID, now_ns: int) -> MachineHold:
    """Give a held machine back to its process server, or to another if that is gone; again: changes nothing.

    Raises:
        PermanentError: no process server is alive.
    """
    if stored(connection, machine_id).held:
        row = connection.execute(
            "SELECT held_server_id FROM lives JOIN parties ON parties.id = held_server_id"
            " WHERE machine_id = ? AND removed_ns IS NULL",
            (str(machine_id),),
        ).fetchone()
        if row is not None:
            connection.execute(
                "UPDATE machines SET process_server_id = ? WHERE id = ?", (row["held_server_id"], str(machine_id))
            )
        else:
            name = machines.machine_row(connection, machine_id)["name"]
            placement.protect(connection, vault, parties.machine_named(connection, name), now_ns)
        connection.execute("UPDATE machines SET epoch = epoch + 1 WHERE id = ?", (str(machine_id),))
        connection.execute("UPDATE lives SET held = 0, held_server_id = NULL WHERE machine_id = ?", (str(machine_id),))
    return MachineHold(epoch=machines.machine_row(connection, machine_id)["epoch"], held=False)
