"""Which process server serves which machine: chosen, moved by hand, moved after a death; functions on a transaction.

Moving a machine raises its *epoch*, and that alone makes it safe at any moment, whatever the former server believes or
does: the next server breaks the leases of every blob of an older epoch before it reads where the log ends, and the
store refuses the former one from then on. The agent, which keeps everything that is not stored, goes on with the new
server from there. So nobody has to be asked, least of all a server that is gone with its disk.

A server in critical health is never chosen, and one with a warning last (see `replicar.signals`).

Weak: a server is chosen by how many machines it has and how much of its cache is free, not by what they write.
"""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import dataclass
from typing import Final

from config_server import data_keys, parties
from config_server.machines import LIVE_SECONDS, machine_row, never_protected, server_of
from config_server.parties import Party
from config_server.vault import Vault
from replicar.control.identity import Role
from replicar.control.messages import MachineState
from replicar.errors import LimitError, PermanentError
from replicar.signals import Level

FIRST_EPOCH: Final = 1
#: What blob names and headers hold.
MAX_EPOCH: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Move:
    """A machine that changed its process server; `former` and `server` are the same where nothing had to change."""

    machine_id: uuid.UUID
    former: uuid.UUID
    server: uuid.UUID


def protect(connection: sqlite3.Connection, vault: Vault, machine: Party, now_ns: int) -> uuid.UUID:
    """Assign a machine to the live process server with the fewest machines, with a data key; returns the server's id.

    A machine that is assigned already stays where it is: to move it is another operation.

    Raises:
        PermanentError: the machine was removed, or no process server is alive.
    """
    _refuse_removed(machine)
    assigned = server_of(connection, machine.id)
    if assigned is not None:
        return assigned
    server_id = _choose(connection, now_ns)
    if server_id is None:
        raise PermanentError(
            f"no process server is alive to protect machine {machine.name}",
            hint="enrol one (`process-server enrol`) and start it (`process-server run`), then try again; one in "
            "critical health (`replicar status`) takes no more machines",
            status=409,
            machine=machine.name,
        )
    connection.execute(
        "UPDATE machines SET process_server_id = ?, epoch = max(epoch, ?) WHERE id = ?",
        (str(server_id), FIRST_EPOCH, str(machine.id)),
    )
    data_keys.ensure(connection, vault, machine.id)
    return server_id


def move(connection: sqlite3.Connection, machine: Party, to: str | None, now_ns: int) -> Move:
    """Give a machine to another process server: the one named `to`, or the live one with the fewest machines.

    A machine that is there already stays as it is, so that asking again is harmless.

    Raises:
        PermanentError: the machine is not protected, or that server is unknown or not alive, or there is no other.
        LimitError: it was moved four thousand million times.
    """
    _refuse_removed(machine)
    former = server_of(connection, machine.id)
    if former is None:
        raise never_protected(machine.name)
    server = _named(connection, to, now_ns) if to is not None else _choose(connection, now_ns, but=former)
    if server is None:
        raise PermanentError(
            f"no other process server is alive to take machine {machine.name} over",
            hint="enrol one (`process-server enrol`) and start it (`process-server run`), then try again",
            status=409,
            machine=machine.name,
        )
    if server != former:
        epoch = int(machine_row(connection, machine.id)["epoch"]) + 1
        if epoch > MAX_EPOCH:
            raise LimitError(f"machine {machine.name} is at epoch {epoch - 1}, the last one", hint="enrol another name")
        connection.execute(
            "UPDATE machines SET process_server_id = ?, epoch = ? WHERE id = ?", (str(server), epoch, str(machine.id))
        )
    return Move(machine.id, former, server)


def stranded(connection: sqlite3.Connection, now_ns: int, since_ns: int, seconds: float) -> list[Party]:
    """Machines to be taken over: cut off from storage since their process server is silent.

    Their agents must be heard of, and say that they reach nobody. A process server that only the config server can't
    reach goes on serving its agents, and to move those would stop what works; an agent that can't be told where to go
    would find nobody at all.

    Args:
        since_ns: when this config server began to listen; the silence of before is its own.
        seconds: how long a process server has to be silent.
    """
    silent_ns = now_ns - int(seconds * 1e9)
    if since_ns > silent_ns:
        return []
    rows = connection.execute(
        "SELECT parties.name FROM machines JOIN parties ON parties.id = machines.id"
        " JOIN process_servers ON process_servers.id = machines.process_server_id"
        " WHERE parties.removed_ns IS NULL AND process_servers.heartbeat_ns < ? AND machines.heartbeat_ns >= ?"
        " AND json_extract(machines.report, '$.state') = ? ORDER BY parties.name",
        (silent_ns, now_ns - LIVE_SECONDS * 10**9, str(MachineState.DISCONNECTED)),
    ).fetchall()
    return [parties.machine_named(connection, row["name"]) for row in rows]


def _choose(connection: sqlite3.Connection, now_ns: int, *, but: uuid.UUID | None = None) -> uuid.UUID | None:
    row = connection.execute(
        "SELECT process_servers.id FROM process_servers JOIN parties ON parties.id = process_servers.id"
        " LEFT JOIN temp.server_health AS health ON health.id = process_servers.id"
        " WHERE parties.removed_ns IS NULL AND process_servers.heartbeat_ns >= ? AND process_servers.id != ?"
        " AND coalesce(health.level, '') != 'critical' ORDER BY coalesce(health.level, '') = 'warning',"
        " (SELECT count(*) FROM machines WHERE machines.process_server_id = process_servers.id),"
        " process_servers.cache_bytes_free DESC, process_servers.id LIMIT 1",
        (now_ns - LIVE_SECONDS * 10**9, str(but)),
    ).fetchone()
    return uuid.UUID(row["id"]) if row is not None else None


def _named(connection: sqlite3.Connection, name: str, now_ns: int) -> uuid.UUID:
    party = parties.by_name(connection, Role.PROCESS_SERVER, name)
    if party is None or party.removed_ns is not None:
        raise PermanentError(
            f"no process server named {name!r} in this vault", hint="see `replicar status`", status=404, name=name
        )
    row = connection.execute("SELECT heartbeat_ns FROM process_servers WHERE id = ?", (str(party.id),)).fetchone()
    if row is None or row["heartbeat_ns"] < now_ns - LIVE_SECONDS * 10**9:
        raise PermanentError(
            f"process server {name} was not heard of for {LIVE_SECONDS} s",
            hint="start it (`process-server run`), or choose another one: `replicar status`",
            status=409,
            name=name,
        )
    health = connection.execute("SELECT level FROM temp.server_health WHERE id = ?", (str(party.id),)).fetchone()
    if health is not None and health["level"] == Level.CRITICAL:
        raise PermanentError(
            f"process server {name} is in critical health, and takes no more machines",
            hint="`replicar status` says why; choose another one, or mend that first",
            status=409,
            name=name,
        )
    return party.id


def _refuse_removed(machine: Party) -> None:
    if machine.removed_ns is not None:
        raise PermanentError(
            f"machine {machine.name} was removed from the vault",
            hint="enrol it again: `mobility-agent enrol` on that machine",
            status=409,
            machine=machine.name,
        )
