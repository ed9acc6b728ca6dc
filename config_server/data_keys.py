"""Machines' data keys in the registry, in wrapped form only: given, rotated, told, wrapped anew, destroyed.

A machine seals with its present key; former ones are kept, since what they sealed stays as it is. Every key lies in the
header of each log blob that it sealed as well, so the vault's key and the container are enough to recover.

What is destroyed is overwritten in the database's file (`secure_delete`) and its journal; backups of the vault's
directory and what a disk keeps of overwritten blocks are beyond reach here.
"""

from __future__ import annotations

import base64
import sqlite3
import uuid
from typing import Any, Final

from config_server.parties import Party, moment
from config_server.vault import Vault
from replicar.control.messages import FormerKey
from replicar.errors import LimitError, PermanentError

#: Former keys of one machine; a rotation a week for five years.
MAX_FORMER_KEYS: Final = 256


def ensure(connection: sqlite3.Connection, vault: Vault, machine_id: uuid.UUID) -> None:
    """Give the machine a data key if it has none."""
    if _row(connection, machine_id)["wrapped_key"] is None:
        _give(connection, vault, machine_id)


def rotate(connection: sqlite3.Connection, vault: Vault, machine: Party, now_ns: int) -> None:
    """Give the machine a new data key for what is sealed from now on.

    Raises:
        PermanentError: it has none yet.
        LimitError: it has too many.
    """
    row = _row(connection, machine.id)
    if row["wrapped_key"] is None or row["process_server_id"] is None:
        raise PermanentError(
            f"machine {machine.name} is not protected",
            hint=f"protect it: `replicar protect {machine.name}`",
            status=409,
            machine=machine.name,
        )
    count = connection.execute("SELECT count(*) FROM former_keys WHERE machine_id = ?", (str(machine.id),)).fetchone()
    if count[0] >= MAX_FORMER_KEYS:
        raise LimitError(
            f"machine {machine.name} has {count[0]} former keys; {MAX_FORMER_KEYS} is the limit",
            hint="enrol it by another name: a new machine begins with one key",
        )
    connection.execute(
        "INSERT INTO former_keys VALUES (?, ?, ?, ?)", (str(machine.id), row["key_id"], row["wrapped_key"], now_ns)
    )
    _give(connection, vault, machine.id)


def former(connection: sqlite3.Connection, vault: Vault, machine_id: uuid.UUID) -> tuple[FormerKey, ...]:
    """The machine's former keys, newest first.

    Raises:
        CorruptionError: one was not wrapped by this vault's key.
    """
    rows = connection.execute(
        "SELECT key_id, wrapped_key FROM former_keys WHERE machine_id = ? ORDER BY retired_ns DESC, key_id",
        (str(machine_id),),
    ).fetchall()
    return tuple(
        FormerKey(
            key_id=row["key_id"],
            data_key=vault.revealed(row["wrapped_key"]),
            wrapped_key=base64.b64encode(row["wrapped_key"]).decode(),
        )
        for row in rows
    )


def told(connection: sqlite3.Connection, vault: Vault, machine_id: uuid.UUID) -> dict[str, Any]:
    """What messages say of a machine's keys; it must have one.

    Raises:
        CorruptionError: one was not wrapped by this vault's key.
    """
    row = _row(connection, machine_id)
    return {
        "key_id": row["key_id"],
        "data_key": vault.revealed(row["wrapped_key"]),
        "wrapped_key": base64.b64encode(row["wrapped_key"]).decode(),
        "former_keys": former(connection, vault, machine_id),
    }


def wrap_anew(connection: sqlite3.Connection, vault: Vault) -> int:
    """Wrap every key by the vault's present key; returns how many were not. What none of its keys opens is left alone:
    whoever asks for that key is told."""
    changed = 0
    for table, of in (("machines", "id"), ("former_keys", "machine_id")):
        rows = connection.execute(
            f"SELECT {of} AS machine, key_id, wrapped_key FROM {table} WHERE wrapped_key IS NOT NULL"  # noqa: S608
        ).fetchall()
        for row in rows:
            if vault.key.is_present(row["wrapped_key"]) or not vault.key.opens(row["wrapped_key"]):
                continue
            connection.execute(
                f"UPDATE {table} SET wrapped_key = ? WHERE {of} = ? AND key_id = ?",  # noqa: S608
                (vault.wrap(vault.unwrap(row["wrapped_key"])), row["machine"], row["key_id"]),
            )
            changed += 1
    return changed


def destroy(connection: sqlite3.Connection, machine: Party, now_ns: int) -> None:
    """Destroy all keys of a machine that was removed, and forget its points; asking again is harmless.

    Raises:
        PermanentError: the machine is still protected.
    """
    if machine.removed_ns is None:
        raise PermanentError(
            f"machine {machine.name} was not removed: its keys are in use",
            hint=f"`replicar remove {machine.name} --destroy-keys` does both, in order",
            status=409,
            machine=machine.name,
        )
    who = (str(machine.id),)
    connection.execute("DELETE FROM former_keys WHERE machine_id = ?", who)
    for table in ("marks", "gaps"):
        connection.execute(f"DELETE FROM {table} WHERE machine_id = ?", who)  # noqa: S608 - one of two names
    connection.execute(
        "UPDATE machines SET key_id = NULL, wrapped_key = NULL, destroyed_ns = ?, stored_sequence = 0,"
        " stored_segment = NULL, stored_digest = '', received_sequence = 0, report = NULL WHERE id = ?",
        (now_ns, *who),
    )


def refuse_missing(row: sqlite3.Row) -> None:
    """Raises:
    PermanentError: the machine has no data key, since it was never protected or its keys were destroyed.
    """
    if row["wrapped_key"] is not None:
        return
    if row["destroyed_ns"] is not None:
        raise PermanentError(
            f"the data keys of machine {row['name']} were destroyed at {moment(row['destroyed_ns'])}",
            hint="what they sealed can't be read any more by anybody; that was asked for",
            status=410,
            machine=row["name"],
        )
    raise PermanentError(
        f"machine {row['name']} is not protected",
        hint=f"protect it: `replicar protect {row['name']}`",
        status=409,
        machine=row["name"],
    )


def _row(connection: sqlite3.Connection, machine_id: uuid.UUID) -> sqlite3.Row:
    row = connection.execute(
        "SELECT machines.*, parties.name FROM machines JOIN parties USING (id) WHERE id = ?", (str(machine_id),)
    ).fetchone()
    assert isinstance(row, sqlite3.Row), f"machine {machine_id} was authorised or named, so it has a row"
    return row


def _give(connection: sqlite3.Connection, vault: Vault, machine_id: uuid.UUID) -> None:
    connection.execute(
        "UPDATE machines SET key_id = ?, wrapped_key = ?, destroyed_ns = NULL WHERE id = ?",
        (str(uuid.uuid4()), vault.new_data_key(), str(machine_id)),
    )
