"""`token`: let programs speak to the API, with a role and for a time; `audit`: who did what."""

from __future__ import annotations

import time
import uuid
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from replicar.cli.console import Json, SettingsFile, Telling, row, run, table
from replicar.cli.settings import load_settings
from replicar.control.messages import MAX_TOKEN_DAYS, TOKEN_ROLES, AuditEntry, Token, TokenRequest
from replicar.errors import PermanentError
from replicar.moments import format_moment

app = typer.Typer(
    name="token", help="Tokens for programs that use the API: create, list, revoke.", no_args_is_help=True
)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for: letters, digits, dots, dashes.")],
    role: Annotated[str, typer.Option(help=f"One of {', '.join(TOKEN_ROLES)}.")] = "reader",
    days: Annotated[int, typer.Option(help="How long it is good.", min=1, max=MAX_TOKEN_DAYS)] = 90,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Make a token, and show it: this once. Needs an admin's identity: `config-server operator NAME --admin`."""

    async def work(telling: Telling) -> None:
        try:
            request = TokenRequest.model_validate({"name": name, "role": role, "days": days})
        except ValueError:
            raise PermanentError(
                f"{name!r} with the role {role!r} is no token", hint=f"the roles are {', '.join(TOKEN_ROLES)}"
            ) from None
        async with load_settings(settings).control() as control:
            made = await control.create_token(request)
        text = made.text.get_secret_value()

        def show(console: Console) -> None:
            console.print(text, soft_wrap=True, markup=False)
            console.print(f"Keep it: it is not shown again. Good until {format_moment(made.token.expires_ns)}.")

        telling.result({**made.token.model_dump(mode="json"), "text": text}, show)

    run(as_json, work)


@app.command("list")
def list_tokens(settings: SettingsFile = None, as_json: Json = False) -> None:
    """List tokens; their texts are shown to nobody."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.tokens()
        data = {"tokens": [token.model_dump(mode="json") for token in found]}
        telling.result(data, lambda console: _show(console, found))

    run(as_json, work)


@app.command()
def revoke(
    token: Annotated[uuid.UUID, typer.Argument(help="The token's id, as `replicar token list` shows it.")],
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """End a token."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.revoke_token(token)
        telling.result(
            found.model_dump(mode="json"), lambda console: console.print(f"{escape(found.name)} is revoked.")
        )

    run(as_json, work)


def audit(
    before: Annotated[
        int | None, typer.Option(help="Only what is older than this entry.", min=1, show_default=False)
    ] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Show who changed something, or was given a key: the newest entries."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.audit(before=before)
        data = {"entries": [entry.model_dump(mode="json") for entry in found]}
        telling.result(data, lambda console: _show_audit(console, found))

    run(as_json, work)


def _show(console: Console, found: tuple[Token, ...]) -> None:
    made = table("token", "name", "role", "good until", "~by")
    now_ns = time.time_ns()
    for token in found:
        until = format_moment(token.expires_ns) if token.expires_ns > now_ns else "expired"
        row(made, token.id, token.name, token.role, until if token.revoked_ns is None else "revoked", token.created_by)
    console.print(made)


def _show_audit(console: Console, found: tuple[AuditEntry, ...]) -> None:
    made = table(">entry", "time", "who", "what", "~of")
    for entry in found:
        row(made, entry.number, format_moment(entry.time_ns), entry.party, entry.action, entry.subject)
    console.print(made)
