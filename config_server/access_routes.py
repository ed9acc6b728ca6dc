"""What admins call: tokens; and who did what, for everybody who may change something."""

from __future__ import annotations

import sqlite3
from typing import Final

from config_server import parties, tokens
from config_server.api import Call, Context, Route
from config_server.rights import ADMINS, OPERATORS
from replicar.control.messages import AuditEntry, AuditTrail, NewToken, Token, TokenList, TokenRequest
from replicar.errors import PermanentError

#: Entries of the audit in one reply.
AUDIT_LISTED: Final = 500


async def get_tokens(context: Context, call: Call) -> TokenList:
    """All tokens, without their texts."""
    return TokenList(tokens=await context.registry.run(tokens.listed))


async def post_token(context: Context, call: Call) -> NewToken:
    """Make a token; its text is shown here and never again."""
    request, now_ns = TokenRequest.from_json(call.body), context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> NewToken:
        made = tokens.create(connection, request, call.asking().name, now_ns)
        parties.audit(connection, call.asking().id, "token", f"{request.role} {request.name}", now_ns)
        return made

    return await context.registry.run(change)


async def post_token_revoke(context: Context, call: Call) -> Token:
    """End a token."""
    now_ns = context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> Token:
        token = tokens.revoke(connection, call.names["id"], now_ns)
        parties.audit(connection, call.asking().id, "revoke-token", token.name, now_ns)
        return token

    return await context.registry.run(change)


async def get_audit(context: Context, call: Call) -> AuditTrail:
    """Who did what, newest first."""
    text = call.query.get("before", str(2**63 - 1))
    if not (text.isascii() and text.isdecimal() and len(text) <= 19) or int(text) >= 2**63:
        raise PermanentError(f"before={text!r} is no number of an entry", hint="say one that a reply had", status=400)

    def read(connection: sqlite3.Connection) -> AuditTrail:
        rows = connection.execute(
            "SELECT audit.*, coalesce(parties.name, tokens.name, '') AS party FROM audit"
            " LEFT JOIN parties ON parties.id = audit.party_id LEFT JOIN tokens ON tokens.id = audit.party_id"
            " WHERE number < ? ORDER BY number DESC LIMIT ?",
            (int(text), AUDIT_LISTED),
        ).fetchall()
        return AuditTrail(entries=tuple(AuditEntry.model_validate(dict(row)) for row in rows))

    return await context.registry.run(read)


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/tokens", get_tokens, ADMINS),
    Route("POST", "/tokens", post_token, ADMINS, TokenRequest),
    Route("POST", "/tokens/{id}/revoke", post_token_revoke, ADMINS),
    Route("GET", "/audit", get_audit, OPERATORS, query=("before",)),
)
