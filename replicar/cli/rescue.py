"""`rescue`: recover from the container and the vault's key alone, when every server is gone."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from recovery.history import History
from recovery.points import survey
from recovery.rescue import FoundMachine, machines_in
from recovery.verify import nothing_there
from replicar.cli import overview
from replicar.cli.access import Access, open_machine
from replicar.cli.choice import At, DiskNames, Every, Newest, PointName, Sequence, chosen_point
from replicar.cli.console import Json, SettingsFile, Telling, row, run, size, table
from replicar.cli.recover import (
    Blob,
    Container,
    Device,
    Disks,
    Qcow2File,
    RawFile,
    Replace,
    VhdFile,
    chosen_target,
    recovered,
)
from replicar.cli.settings import OperatorSettings, load_settings
from replicar.cli.vault import points_of
from replicar.errors import PermanentError, ReplicarError
from replicar.moments import format_moment
from replicar.storage.target import open_store


def rescue(
    vault_key_file: Annotated[
        Path,
        typer.Option("--vault-key-file", help="The vault's key (vault.key of its directory).", show_default=False),
    ],
    machine_id: Annotated[
        uuid.UUID | None,
        typer.Argument(
            help="The machine's id; without one the machines in the container are listed.", show_default=False
        ),
    ] = None,
    point: PointName = None,
    at: At = None,
    sequence: Sequence = None,
    latest: Newest = False,
    disk: DiskNames = None,
    every: Every = False,
    raw: RawFile = None,
    vhd: VhdFile = None,
    qcow2: Qcow2File = None,
    device: Device = None,
    blob: Blob = None,
    container: Container = None,
    replace: Replace = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Recover machines when every server is gone: from the container and the vault's key alone.

    Without a machine it lists those in the container. With one it lists its disks and points, out of its log. With a
    point and a target it recovers, as `replicar recover` does. The settings need a [storage] section and nothing else;
    it only reads there, but for --blob.

    Without the config server nobody says how far the log must reach: one that was cut off at its end looks like one
    that ends there.
    """
    targets = {"raw": raw, "vhd": vhd, "qcow2": qcow2, "device": device, "blob": blob}
    wanted = any((point, at, sequence, latest, *targets.values()))

    async def work(telling: Telling) -> None:
        loaded = load_settings(settings)
        if machine_id is None:
            if wanted:
                raise PermanentError("say which machine to rescue", hint="`replicar rescue` without more lists them")
            await _list(telling, loaded, vault_key_file)
            return
        name = str(machine_id)
        async with open_machine(loaded, name, vault_key_file=vault_key_file, machine_id=machine_id) as access:
            if not wanted:
                history = await survey(access.log)
                if history.last is None:
                    raise nothing_there(access.log)
                _show_machine(telling, access, history)
                return
            request, to = chosen_point(point, at, sequence, latest), chosen_target(**targets)
            disks = Disks(tuple(disk or ()), every)
            where = loaded.target(container)
            await recovered(
                *(telling, name, access, request, disks, to, where),
                make_container=container is not None,
                replace=replace,
            )

    run(as_json, work)


async def _list(telling: Telling, loaded: OperatorSettings, vault_key_file: Path) -> None:
    async with open_store(loaded.target()) as store:
        machines = await machines_in(store)
    rows = [(machine, await _opens(loaded, machine, vault_key_file)) for machine in machines]
    data = {
        "machines": [
            {
                "machine_id": str(machine.machine_id),
                "blobs": machine.blobs,
                "space_bytes": machine.space_bytes,
                "last_modified_ns": machine.last_modified_ns,
                "opens": not trouble,
                "trouble": trouble,
            }
            for machine, trouble in rows
        ]
    }

    def show(console: Console) -> None:
        if not rows:
            console.print("there is no machine's log in this container")
            return
        made = table("machine", ">blobs", "last written", "~opened by this key")
        for machine, trouble in rows:
            written = machine.last_modified_ns
            row(
                made,
                machine.machine_id,
                machine.blobs,
                format_moment(written) if written is not None else "-",
                trouble or "yes",
            )
        console.print(made)
        console.print("next step: `replicar rescue MACHINE` with the same key shows its disks and points")

    telling.result(data, show)


async def _opens(loaded: OperatorSettings, machine: FoundMachine, vault_key_file: Path) -> str:
    """Why the key does not open the machine's log; empty if it does."""
    try:
        async with open_machine(
            loaded, str(machine.machine_id), vault_key_file=vault_key_file, machine_id=machine.machine_id
        ) as access:
            return "" if access.log.keys else "nothing was written to it yet"
    except ReplicarError as error:
        if not error.fields.get("path"):  # not about the key: the log itself, or storage
            raise
        return error.message


def _show_machine(telling: Telling, access: Access, history: History) -> None:
    found = points_of(str(access.log.machine_id), access.log.machine_id, history)
    disks = [disk for _, disk in sorted(history.disks.items())]
    data: dict[str, Any] = {
        **found.model_dump(mode="json"),
        "disks": [{"name": disk.name, "size_bytes": disk.size_bytes} for disk in disks],
    }

    def show(console: Console) -> None:
        made = table("~disk", ">size")
        for disk in disks:
            row(made, disk.name, size(disk.size_bytes))
        console.print(made)
        overview.show_points(console, found)
        console.print(
            "next step: `replicar rescue MACHINE --latest --all --raw '{disk}.raw'`, or --point NAME, or --at TIME"
        )

    telling.result(data, show)
