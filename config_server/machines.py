"""Machines and process servers: what they report, and what each is to do; functions on a transaction.

Instructions are computed from the registry, whole, each time; their `version` is a digest of what they say, so that a
long poll knows news from repetition without anybody keeping count.

How far a machine is *stored* never goes back here, whatever is reported, nor is the digest of what was stored replaced
by another for the same place: recovery, and a process server that takes a log over, take it as the place up to which
the log must be whole, and that is how they notice one that was cut short or put back.

Bytes received and stored are totals over restarts and process servers: what is added is how much more a process server
counted than it had at its last heartbeat, or all of it when it began to count anew. What it counted between its last
heartbeat and its death is missing; nothing is counted twice.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import uuid
from typing import Any, Final

from config_server import data_keys, points, policies
from config_server.parties import Party
from config_server.vault import Vault
from replicar.control.identity import INCARNATION_SHIFT
from replicar.control.messages import (
    AgentAssignment,
    AgentHeartbeat,
    AgentInstructions,
    MachineKey,
    MachineProgress,
    ProcessServerAssignment,
    ProcessServerHeartbeat,
    ProcessServerInstructions,
)
from replicar.errors import PermanentError
from replicar.signals import worst

#: Three of the longest polls: who was not heard of for so long is away.
LIVE_SECONDS: Final = 90
#: What a column holds.
_MAX_COUNT: Final = 2**63 - 1

MACHINES: Final = (
    "SELECT machines.*, parties.name, parties.incarnation, parties.removed_ns, servers.name AS server_name,"
    " process_servers.heartbeat_ns AS server_heartbeat_ns"
    " FROM machines JOIN parties ON parties.id = machines.id"
    " LEFT JOIN parties AS servers ON servers.id = machines.process_server_id"
    " LEFT JOIN process_servers ON process_servers.id = machines.process_server_id"
)


def record_agent(connection: sqlite3.Connection, machine_id: uuid.UUID, heartbeat: AgentHeartbeat, now_ns: int) -> None:
    """Keep an agent's report."""
    report = heartbeat.model_dump_json(exclude={"marks", "gaps", "refusals", "hold", "wait_seconds", "known_version"})
    connection.execute(
        "UPDATE machines SET report = ?, heartbeat_ns = ? WHERE id = ?", (report, now_ns, str(machine_id))
    )
    points.record_marks(connection, machine_id, heartbeat.marks, machine_row(connection, machine_id)["stored_sequence"])
    points.record_stored(connection, machine_id, heartbeat.stored_sequence)
    points.record_gaps(connection, machine_id, heartbeat.gaps)
    points.record_refusals(connection, machine_id, heartbeat.refusals)


def agent_instructions(
    connection: sqlite3.Connection, machine_id: uuid.UUID, heartbeat_seconds: float
) -> AgentInstructions:
    """What an agent is to do now."""
    row = connection.execute(
        "SELECT machines.epoch, process_servers.* FROM machines"
        " JOIN process_servers ON process_servers.id = machines.process_server_id WHERE machines.id = ?",
        (str(machine_id),),
    ).fetchone()
    assignment = None
    if row is not None:
        assignment = AgentAssignment(
            epoch=row["epoch"], process_server_id=uuid.UUID(row["id"]), host=row["host"], port=row["port"]
        )
    commands = points.pending(connection, machine_id)
    schedule = policies.schedule(connection, machine_id)
    said = [assignment.model_dump(mode="json") if assignment else None, [c.id for c in commands]]
    return AgentInstructions(
        assignment=assignment,
        commands=commands,
        schedule=schedule,
        heartbeat_seconds=heartbeat_seconds,
        version=_version([*said, schedule.model_dump()]),
    )


def record_process_server(
    connection: sqlite3.Connection, server_id: uuid.UUID, heartbeat: ProcessServerHeartbeat, now_ns: int
) -> tuple[frozenset[uuid.UUID], bool]:
    """Keep a process server's report; what it says of machines that are not its own (any more) is left out.

    Returns the machines it reported on, and whether it moved to another address.
    """
    before = connection.execute("SELECT host, port FROM process_servers WHERE id = ?", (str(server_id),)).fetchone()
    connection.execute(
        "INSERT INTO process_servers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET host = excluded.host,"
        " port = excluded.port, cache_bytes = excluded.cache_bytes, cache_bytes_free = excluded.cache_bytes_free,"
        " heartbeat_ns = excluded.heartbeat_ns",
        (
            str(server_id),
            heartbeat.host,
            heartbeat.port,
            heartbeat.cache_bytes,
            heartbeat.cache_bytes_free,
            now_ns,
        ),
    )
    level = worst(signal.level for signal in heartbeat.signals)
    connection.execute("INSERT OR REPLACE INTO temp.server_health VALUES (?, ?)", (str(server_id), str(level)))
    reported = []
    for progress in heartbeat.machines:
        if not _record_progress(connection, server_id, progress):
            continue
        points.record_stored(connection, progress.machine_id, progress.stored_sequence)
        reported.append(progress.machine_id)
    moved = before is not None and (before["host"], before["port"]) != (heartbeat.host, heartbeat.port)
    return frozenset(reported), before is None or moved


def _record_progress(connection: sqlite3.Connection, server_id: uuid.UUID, progress: MachineProgress) -> bool:
    """Keep what a process server says of one machine; False when the machine is not its own."""
    machine = str(progress.machine_id)
    row = connection.execute(
        "SELECT * FROM machines WHERE id = ? AND process_server_id = ?", (machine, str(server_id))
    ).fetchone()
    if row is None:
        return False
    since, same = progress.counted_since, progress.counted_since == row["counted_since"]
    received = _count(row["bytes_received"], row["counted_received"] if same else 0, progress.bytes_received, since)
    stored = _count(row["bytes_stored"], row["counted_stored"] if same else 0, progress.bytes_stored, since)
    connection.execute(
        "UPDATE machines SET received_sequence = ?, bytes_received = ?, counted_received = ?, bytes_stored = ?,"
        " counted_stored = ?, counted_since = ? WHERE id = ?",
        (progress.received_sequence, *received, *stored, since, machine),
    )
    connection.execute(
        "UPDATE machines SET stored_sequence = ?1, stored_segment = ?2, stored_digest = ?3"
        " WHERE id = ?4 AND (stored_sequence < ?1 OR (stored_sequence = ?1 AND stored_digest = ''))",
        (progress.stored_sequence, progress.stored_segment, progress.stored_digest, machine),
    )
    return True


def _count(total: int, before: int, now: int, since: str) -> tuple[int, int]:
    """A total and the count it includes, once a count that was `before` is `now`."""
    if now < before and not since:
        before = 0  # it can't say so, but it began anew
    count = max(before, now)  # lower: a heartbeat that was overtaken by a later one
    return min(total + count - before, _MAX_COUNT), count


def process_server_instructions(
    connection: sqlite3.Connection, vault: Vault, server_id: uuid.UUID, heartbeat_seconds: float
) -> ProcessServerInstructions:
    """Which machines a process server is to serve, with their data keys.

    Raises:
        CorruptionError: a data key was not wrapped by this vault's key.
    """
    rows = connection.execute(
        f"{MACHINES} WHERE machines.process_server_id = ? AND parties.removed_ns IS NULL ORDER BY machines.id",
        (str(server_id),),
    ).fetchall()
    assignments = tuple(
        ProcessServerAssignment(
            machine_id=uuid.UUID(row["id"]),
            name=row["name"],
            epoch=row["epoch"],
            incarnation=row["incarnation"],
            **data_keys.told(connection, vault, uuid.UUID(row["id"])),
            **_known_stored(row),
        )
        for row in rows
    )
    version = _version(
        [[str(a.machine_id), a.name, a.epoch, a.incarnation, a.key_id, a.wrapped_key] for a in assignments]
    )
    return ProcessServerInstructions(assignments=assignments, heartbeat_seconds=heartbeat_seconds, version=version)


def _known_stored(row: sqlite3.Row) -> dict[str, Any]:
    """What must be in storage; nothing when the machine was enrolled again since, perhaps because its log was lost."""
    if row["stored_sequence"] >> INCARNATION_SHIFT != row["incarnation"]:
        return {}
    return {name: row[name] for name in ("stored_segment", "stored_sequence", "stored_digest")}


def machines_of(connection: sqlite3.Connection, server_id: uuid.UUID) -> tuple[uuid.UUID, ...]:
    rows = connection.execute("SELECT id FROM machines WHERE process_server_id = ?", (str(server_id),)).fetchall()
    return tuple(uuid.UUID(row["id"]) for row in rows)


def server_of(connection: sqlite3.Connection, machine_id: uuid.UUID) -> uuid.UUID | None:
    """The process server that a machine is assigned to."""
    text = machine_row(connection, machine_id)["process_server_id"]
    return uuid.UUID(text) if text is not None else None


def machine_key(connection: sqlite3.Connection, vault: Vault, machine: Party) -> MachineKey:
    """The machine's data key, and how far its log is known to reach.

    Raises:
        PermanentError: it has none, since it was never protected or its keys were destroyed.
        CorruptionError: it was not wrapped by this vault's key.
    """
    row = machine_row(connection, machine.id)
    data_keys.refuse_missing(row)
    return MachineKey(
        machine_id=machine.id,
        **data_keys.told(connection, vault, machine.id),
        stored_sequence=row["stored_sequence"],
        stored_segment=row["stored_segment"],
        stored_digest=row["stored_digest"],
    )


def never_protected(name: str) -> PermanentError:
    return PermanentError(
        f"machine {name} is not protected", hint=f"protect it: `replicar protect {name}`", status=409, machine=name
    )


def withdraw(connection: sqlite3.Connection, machine_id: uuid.UUID) -> None:
    """Take a machine from its process server, and the commands from its list."""
    connection.execute("UPDATE machines SET process_server_id = NULL WHERE id = ?", (str(machine_id),))
    connection.execute("DELETE FROM commands WHERE machine_id = ?", (str(machine_id),))


def machine_row(connection: sqlite3.Connection, machine_id: uuid.UUID) -> sqlite3.Row:
    row = connection.execute(f"{MACHINES} WHERE machines.id = ?", (str(machine_id),)).fetchone()
    assert isinstance(row, sqlite3.Row), f"machine {machine_id} was authorised or named, so it has a row"
    return row


def _version(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
