"""Who may speak to the API besides the parts: bearer tokens; and who did what: the audit."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from replicar.control.message import Count, Message, Name, Secret, Text

#: Roles that a token may have; see `config_server/rights.py`.
TOKEN_ROLES: Final = ("reader", "operator", "admin")
MAX_TOKEN_DAYS: Final = 366

TokenRole = Literal["reader", "operator", "admin"]


class TokenRequest(Message):
    """POST /v1/tokens."""

    name: Name
    role: TokenRole = "reader"
    days: Annotated[int, Field(ge=1, le=MAX_TOKEN_DAYS)] = 90


class Token(Message):
    """A token as it is known: by whom it was made, and until when it is good."""

    id: uuid.UUID
    name: Name
    role: TokenRole
    created_by: Text
    created_ns: Count
    expires_ns: Count
    revoked_ns: Count | None = None


class NewToken(Message):
    """A token that was just made, with its text: the only time that it is shown."""

    token: Token
    text: Secret


class TokenList(Message):
    """GET /v1/tokens, newest first."""

    tokens: tuple[Token, ...]


class AuditEntry(Message):
    """Who did what, to whom. `party` is a name where it is known."""

    number: Count
    time_ns: Count
    party_id: uuid.UUID
    party: Text
    action: Text
    subject: Text


class AuditTrail(Message):
    """GET /v1/audit: newest first; `before` a number for what is older."""

    entries: tuple[AuditEntry, ...]


class ApiDocument(Message):
    """GET /v1/openapi.json: the OpenAPI 3.1 document of this API."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    openapi: Text
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
