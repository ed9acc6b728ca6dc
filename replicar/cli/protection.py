"""`move`: which process server a machine is replicated through."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from replicar.cli.console import Json, SettingsFile, Telling, run
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.messages import MachineSummary
from replicar.errors import PermanentError


def move(
    machines: Annotated[
        list[str] | None, typer.Argument(help="The machines' names, as `replicar machines` shows them.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="The process server to take them over.  \\[default: the least loaded other one]"),
    ] = None,
    all_from: Annotated[
        str | None, typer.Option("--all-from", help="Every machine of this process server, which may be gone for good.")
    ] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Give machines to another process server, by hand or after a death; nothing is lost and nobody is asked.

    The former server is shut out by storage itself, whatever it does; the machine's agent, which keeps all that is not
    stored, goes on with the other one from there. Doing it again changes nothing.
    """
    if bool(machines) == bool(all_from):
        raise typer.BadParameter("name machines, or a process server with --all-from")

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            names = machines or await _machines_of(control, all_from or "")
            found = [await control.move(name, to) for name in names]
        data = {"machines": [machine.model_dump(mode="json") for machine in found]}
        telling.result(data, lambda console: _show(console, found))

    run(as_json, work)


async def _machines_of(control: ControlClient, server: str) -> list[str]:
    names = [machine.name for machine in await control.machines() if machine.process_server == server]
    if not names:
        raise PermanentError(f"no machine is replicated through {server!r}", hint="see `replicar machines`")
    return names


def _show(console: Console, found: list[MachineSummary]) -> None:
    for machine in found:
        server = machine.process_server or "?"
        console.print(f"{escape(machine.name)} is replicated through {escape(server)} (epoch {machine.epoch}).")
