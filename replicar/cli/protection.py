"""`move`, `remove`: which process server a machine is replicated through, and the end of it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from recovery.replica.removal import destroy_replica
from replicar.cli.console import Json, Machine, SettingsFile, Telling, run
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.messages import MachineSummary
from replicar.errors import PermanentError
from replicar.log import headers
from replicar.storage.target import open_store


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


def remove(
    machine: Machine,
    destroy_keys: Annotated[
        bool,
        typer.Option("--destroy-keys", help="Make all that is stored of it unreadable, by anybody, for good."),
    ] = False,
    confirm: Annotated[
        str | None,
        typer.Option("--confirm", help="With --destroy-keys: the machine's name once more.", metavar="MACHINE"),
    ] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """End a machine's protection: its agent and process server stop, and what is stored can still be recovered.

    With --destroy-keys nothing can be recovered any more, from no point and by nobody: its data keys are destroyed in
    the config server's registry and its process server, the headers that carry them in storage are overwritten, and its
    blobs deleted, those of a warm replica too. An interrupted one is finished by doing it again.
    """
    if destroy_keys and confirm != machine:
        raise typer.BadParameter(f"--destroy-keys is for good: add --confirm {machine}")
    if confirm is not None and not destroy_keys:
        raise typer.BadParameter("--confirm goes with --destroy-keys")

    async def work(telling: Telling) -> None:
        loaded = load_settings(settings)
        target = loaded.target() if destroy_keys else None  # refused before anything is done
        async with loaded.control() as control:
            found = await control.remove(machine)
            blobs = None
            if target is not None:
                async with open_store(target) as store:
                    blobs = await headers.destroy(store, found.id, found.epoch)
                    blobs += await destroy_replica(store, found.id)
                found = await control.destroy_keys(machine)
        data = {**found.model_dump(mode="json"), "keys_destroyed": destroy_keys, "blobs_deleted": blobs}
        telling.result(data, lambda console: _show_removed(console, machine, blobs))

    run(as_json, work)


def _show_removed(console: Console, machine: str, blobs: int | None) -> None:
    console.print(f"{escape(machine)} is no longer protected.")
    if blobs is None:
        console.print("What is stored of it stays, with its keys and points: replicar recover.")
        return
    console.print(f"Its data keys are destroyed and {blobs} blobs deleted: no point of it can be recovered any more.")
    console.print(
        "Not reached: disks that drills and failovers have made; "
        "snapshots, versions and soft-deleted copies that the storage account keeps of blobs (they hold "
        "wrapped keys, which are useless once the vault's key is rotated, `replicar rewrap` has run and the former key "
        "is forgotten), backups of the vault's directory, and plain data in the agent's change log and the process "
        "server's cache until they are overwritten."
    )


async def _machines_of(control: ControlClient, server: str) -> list[str]:
    names = [machine.name for machine in await control.machines() if machine.process_server == server]
    if not names:
        raise PermanentError(f"no machine is replicated through {server!r}", hint="see `replicar machines`")
    return names


def _show(console: Console, found: list[MachineSummary]) -> None:
    for machine in found:
        server = machine.process_server or "?"
        console.print(f"{escape(machine.name)} is replicated through {escape(server)} (epoch {machine.epoch}).")
