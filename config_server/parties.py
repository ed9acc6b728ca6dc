"""Who has been let in: parties, their certificates, registration keys, and the audit, as functions on a transaction.

A party is known by its id (in certificates) and by its role and name (to people). Enrolling a name again keeps the id,
raises the incarnation and revokes every certificate of before, so that a copy of the old machine can't go on beside
the new one. Renewal revokes nothing: the answer with the new certificate may be lost, and the old one must do then.
"""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from config_server.authority import Certificate
from replicar.control.identity import MAX_INCARNATION, Role
from replicar.errors import FencedError, LimitError, PermanentError
from replicar.tls import PeerIdentity

REGISTRATION_KEY_DAYS: Final = 5
#: A vault's parties; the figures this is built for end at a few hundred machines for each process server.
MAX_PARTIES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Party:
    """A machine, process server, operator or config server of the vault."""

    id: uuid.UUID
    role: Role
    name: str
    incarnation: int
    removed_ns: int | None


def by_name(connection: sqlite3.Connection, role: Role, name: str) -> Party | None:
    row = connection.execute("SELECT * FROM parties WHERE role = ? AND name = ?", (role, name)).fetchone()
    return _party(row) if row is not None else None


def machine_named(connection: sqlite3.Connection, name: str) -> Party:
    """The machine that people call `name`.

    Raises:
        PermanentError: there is none.
    """
    party = by_name(connection, Role.MACHINE, name)
    if party is None:
        raise PermanentError(
            f"no machine named {name!r} in this vault",
            hint="see `replicar machines`, or enrol it: `mobility-agent enrol` on that machine",
            status=404,
            machine=name,
        )
    return party


def authorise(connection: sqlite3.Connection, peer: PeerIdentity) -> Party:
    """The party behind a verified certificate.

    Raises:
        PermanentError: it is unknown here (404) or was removed (403).
        FencedError: the certificate was replaced when its name was enrolled again.
    """
    row = connection.execute("SELECT * FROM parties WHERE id = ? AND role = ?", (str(peer.id), peer.role)).fetchone()
    if row is None:
        raise PermanentError(
            f"no {peer.role} with id {peer.id} in this vault's registry",
            hint="enrol it again; if the registry was restored from an old backup, so must be what was enrolled since",
            status=404,
            id=str(peer.id),
        )
    party = _party(row)
    if party.removed_ns is not None:
        raise PermanentError(
            f"{party.role} {party.name} was removed from the vault at {moment(party.removed_ns)}",
            hint="enrol it again if it is to come back",
            status=403,
            name=party.name,
        )
    certificate = connection.execute("SELECT revoked_ns FROM certificates WHERE serial = ?", (peer.serial,)).fetchone()
    if certificate is not None and certificate["revoked_ns"] is not None:
        raise FencedError(
            f"{party.role} {party.name} was enrolled again at {moment(certificate['revoked_ns'])}; "
            "this certificate is of the time before",
            hint="stop this copy; if it is the right one, enrol it again",
            status=403,
            name=party.name,
        )
    return party


def admit(connection: sqlite3.Connection, role: Role, name: str, now_ns: int) -> Party:
    """Enrol a name: a new party, or the known one with a higher incarnation and its old certificates revoked.

    Raises:
        LimitError: the vault is full, or the name was enrolled 32,767 times.
    """
    known = by_name(connection, role, name)
    if known is None:
        count = connection.execute("SELECT count(*) FROM parties").fetchone()[0]
        if count >= MAX_PARTIES:
            raise LimitError(f"the vault has {count} parties; {MAX_PARTIES} is the limit", hint="use another vault")
        party = Party(uuid.uuid4(), role, name, 0, None)
        connection.execute(
            "INSERT INTO parties (id, role, name, incarnation, enrolled_ns) VALUES (?, ?, ?, 0, ?)",
            (str(party.id), role, name, now_ns),
        )
        if role is Role.MACHINE:
            connection.execute("INSERT INTO machines (id) VALUES (?)", (str(party.id),))
        return party
    if known.incarnation >= MAX_INCARNATION:
        raise LimitError(f"{role} {name} was enrolled {MAX_INCARNATION} times", hint="enrol it by another name")
    connection.execute(
        "UPDATE parties SET incarnation = incarnation + 1, enrolled_ns = ?, removed_ns = NULL WHERE id = ?",
        (now_ns, str(known.id)),
    )
    revoke(connection, known.id, now_ns)
    return Party(known.id, role, name, known.incarnation + 1, None)


def remove(connection: sqlite3.Connection, party: Party, now_ns: int) -> None:
    """Refuse the party from now on; its history and its key stay."""
    connection.execute("UPDATE parties SET removed_ns = coalesce(removed_ns, ?) WHERE id = ?", (now_ns, str(party.id)))
    revoke(connection, party.id, now_ns)


def revoke(connection: sqlite3.Connection, party_id: uuid.UUID, now_ns: int) -> None:
    connection.execute(
        "UPDATE certificates SET revoked_ns = ? WHERE party_id = ? AND revoked_ns IS NULL", (now_ns, str(party_id))
    )


def record_certificate(connection: sqlite3.Connection, party_id: uuid.UUID, certificate: Certificate) -> None:
    """Remember a certificate, and forget those of the same party that have expired."""
    connection.execute(
        "DELETE FROM certificates WHERE party_id = ? AND expires_ns < ?", (str(party_id), certificate.issued_ns)
    )
    connection.execute(
        "INSERT INTO certificates (serial, party_id, issued_ns, expires_ns) VALUES (?, ?, ?, ?)",
        (certificate.serial, str(party_id), certificate.issued_ns, certificate.expires_ns),
    )


def record_registration_key(connection: sqlite3.Connection, key_id: str, digest: bytes, now_ns: int) -> int:
    """Remember a registration key by its hash; returns when it expires."""
    expires_ns = now_ns + REGISTRATION_KEY_DAYS * 86_400 * 10**9
    connection.execute("INSERT INTO registration_keys VALUES (?, ?, ?, ?)", (key_id, digest, now_ns, expires_ns))
    return expires_ns


def registration_key(connection: sqlite3.Connection, key_id: str) -> tuple[bytes, int] | None:
    """(hash, expires_ns) of a registration key; expired ones are kept, so that their expiry can be told."""
    row = connection.execute("SELECT digest, expires_ns FROM registration_keys WHERE id = ?", (key_id,)).fetchone()
    return (bytes(row["digest"]), int(row["expires_ns"])) if row is not None else None


def take_nonce(connection: sqlite3.Connection, nonce: str, now_ns: int, keep_seconds: float) -> bool:
    """Whether the nonce is a new one; it is remembered, and those older than `keep_seconds` are forgotten."""
    connection.execute("DELETE FROM nonces WHERE time_ns < ?", (now_ns - int(keep_seconds * 10**9),))
    done = connection.execute("INSERT INTO nonces VALUES (?, ?) ON CONFLICT DO NOTHING", (nonce, now_ns))
    return done.rowcount == 1


def audit(connection: sqlite3.Connection, party_id: uuid.UUID, action: str, subject: str, now_ns: int) -> None:
    """Note who did what, and to whom, for good."""
    connection.execute(
        "INSERT INTO audit (time_ns, party_id, action, subject) VALUES (?, ?, ?, ?)",
        (now_ns, str(party_id), action, subject),
    )


def moment(time_ns: int) -> str:
    """A time as operators read it."""
    return f"{datetime.fromtimestamp(time_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _party(row: sqlite3.Row) -> Party:
    return Party(uuid.UUID(row["id"]), Role(row["role"]), row["name"], row["incarnation"], row["removed_ns"])
