"""Tokens and the audit over the config server's API; a part of `ControlClient`."""

from __future__ import annotations

import uuid

from replicar.control.caller import Caller
from replicar.control.messages import AuditEntry, AuditTrail, NewToken, Token, TokenList, TokenRequest


class AccessCalls(Caller):
    """What an admin asks about who may do what, and anybody about who did."""

    async def tokens(self) -> tuple[Token, ...]:
        """All tokens, newest first, without their texts."""
        return (await self._get("/tokens", TokenList)).tokens

    async def create_token(self, request: TokenRequest) -> NewToken:
        """Make a token; the reply is the only place that has its text."""
        return await self._post("/tokens", request, NewToken)

    async def revoke_token(self, token_id: uuid.UUID) -> Token:
        """End a token; again: changes nothing."""
        return await self._post(f"/tokens/{token_id}/revoke", None, Token)

    async def audit(self, *, before: int | None = None) -> tuple[AuditEntry, ...]:
        """Who did what, newest first; `before` an entry's number for older ones."""
        query = {"before": str(before)} if before is not None else {}
        return (await self._get("/audit", AuditTrail, query=query)).entries
