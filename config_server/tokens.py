"""Bearer tokens: how programs that are no part of Replicar (monitoring, scripts) speak to the API; on a transaction.

A token is `replicar_<id>_<secret>`, shown once, when it is made. Kept is the SHA-256 of its secret, which is enough for
256 random bits: nobody tries them out, and what a thief reads in the registry opens nothing. Each has a role, expires,
and can be revoked; both are looked at with every request. A token can't make tokens unless it is an admin's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
import uuid
from typing import Final

from pydantic import SecretStr

from config_server.parties import Party, moment
from replicar.control.identity import Role
from replicar.control.messages import MAX_TOKEN_DAYS, TOKEN_ROLES, NewToken, Token, TokenRequest
from replicar.errors import LimitError, PermanentError

#: Tokens that are neither expired nor revoked.
MAX_TOKENS: Final = 200
#: Tokens that are remembered at all, newest first.
MAX_REMEMBERED: Final = 1000
SECRET_BYTES: Final = 32
_TOKEN: Final = re.compile(r"Bearer replicar_([0-9a-f]{32})_([A-Za-z0-9_-]{43})")
_HINT: Final = "make a new one: `replicar token create`"
_DAY_NS: Final = 86_400 * 10**9


def create(connection: sqlite3.Connection, request: TokenRequest, created_by: str, now_ns: int) -> NewToken:
    """Make a token; its text is in the reply and nowhere else.

    Raises:
        LimitError: there are too many.
    """
    usable = connection.execute(
        "SELECT count(*) FROM tokens WHERE revoked_ns IS NULL AND expires_ns > ?", (now_ns,)
    ).fetchone()[0]
    if usable >= MAX_TOKENS:
        raise LimitError(f"the vault has {usable} tokens; {MAX_TOKENS} is the limit", hint="revoke some of them")
    token_id, secret = uuid.uuid4(), secrets.token_urlsafe(SECRET_BYTES)
    expires_ns = now_ns + request.days * _DAY_NS
    connection.execute(
        "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
        (str(token_id), request.name, request.role, _digest(secret), created_by, now_ns, expires_ns),
    )
    connection.execute(
        "DELETE FROM tokens WHERE id NOT IN (SELECT id FROM tokens ORDER BY"
        " revoked_ns IS NULL AND expires_ns > ? DESC, created_ns DESC LIMIT ?)",
        (now_ns, MAX_REMEMBERED),
    )
    return NewToken(token=_found(connection, token_id), text=SecretStr(f"replicar_{token_id.hex}_{secret}"))


def listed(connection: sqlite3.Connection) -> tuple[Token, ...]:
    """All tokens that are remembered, newest first; without their texts, which nobody has."""
    return tuple(_token(row) for row in connection.execute("SELECT * FROM tokens ORDER BY created_ns DESC"))


def revoke(connection: sqlite3.Connection, token_id: str, now_ns: int) -> Token:
    """End a token; again: changes nothing.

    Raises:
        PermanentError: there is none by this id.
    """
    connection.execute("UPDATE tokens SET revoked_ns = coalesce(revoked_ns, ?) WHERE id = ?", (now_ns, token_id))
    row = connection.execute("SELECT * FROM tokens WHERE id = ?", (token_id,)).fetchone()
    if row is None:
        raise PermanentError(f"no token with id {token_id}", hint="see `replicar token list`", status=404)
    return _token(row)


def authorise(connection: sqlite3.Connection, header: str, now_ns: int) -> Party:
    """Who a request's `Authorization` is of.

    Raises:
        PermanentError: it is no token of this vault, or one that was revoked or has expired (401).
    """
    found = _TOKEN.fullmatch(header)
    row = None
    if found is not None:
        row = connection.execute("SELECT * FROM tokens WHERE id = ?", (str(uuid.UUID(found[1])),)).fetchone()
    if found is None or row is None or not hmac.compare_digest(row["digest"], _digest(found[2])):
        raise PermanentError("this is no token of this vault", hint=_HINT, status=401)
    if row["revoked_ns"] is not None:
        raise PermanentError(
            f"the token {row['name']} was revoked at {moment(row['revoked_ns'])}", hint=_HINT, status=401
        )
    if now_ns >= row["expires_ns"]:
        raise PermanentError(f"the token {row['name']} expired at {moment(row['expires_ns'])}", hint=_HINT, status=401)
    return Party(uuid.UUID(row["id"]), Role(row["role"]), row["name"], 0, None)


def _found(connection: sqlite3.Connection, token_id: uuid.UUID) -> Token:
    return _token(connection.execute("SELECT * FROM tokens WHERE id = ?", (str(token_id),)).fetchone())


def _token(row: sqlite3.Row) -> Token:
    return Token(
        id=uuid.UUID(row["id"]),
        name=row["name"],
        role=row["role"],
        created_by=row["created_by"],
        created_ns=row["created_ns"],
        expires_ns=row["expires_ns"],
        revoked_ns=row["revoked_ns"],
    )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


assert set(TOKEN_ROLES) <= {str(role) for role in Role}
assert MAX_TOKEN_DAYS * _DAY_NS < 2**63
