"""`mount` and `unmount`: single files out of a disk as it was at a point."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from recovery.export.disk import ServedDisk, base_of
from recovery.export.overlay import Overlay
from recovery.mount import mounting
from recovery.mount.mounting import Mounted, mounted
from recovery.view import View
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.choice import At, Newest, PointName, Sequence, chosen_disks, chosen_point
from replicar.cli.console import Json, Machine, SettingsFile, Telling, run
from replicar.cli.export import SCRATCH, opened_view, until_told
from replicar.cli.settings import load_settings
from replicar.errors import PermanentError
from replicar.moments import format_moment


def mount(
    machine: Machine,
    directory: Annotated[Path, typer.Argument(help="An empty directory.", show_default=False)],
    point: PointName = None,
    at: At = None,
    sequence: Sequence = None,
    latest: Newest = False,
    disk: Annotated[str | None, typer.Option(help="The disk's name, if there are several.", show_default=False)] = None,
    partition: Annotated[
        int | None,
        typer.Option(
            help="Its number, if there are several file systems; 0: the whole disk.", min=0, show_default=False
        ),
    ] = None,
    no_journal: Annotated[
        bool,
        typer.Option("--no-journal", help="Don't play the file system's journal; files may be missing or old then."),
    ] = False,
    scratch: Annotated[
        Path, typer.Option(help="Where what playing the journal writes is put until the end.")
    ] = SCRATCH,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Mount a disk of a machine as it was at one point, read-only, to take single files out of it. Takes root.

    Nothing is copied first. It ends with `replicar unmount DIRECTORY`, Ctrl-C or SIGTERM; a second Ctrl-C ends it for
    those who still use it. The machine and its log are never touched: what the file system writes to play its journal
    is thrown away.
    """

    async def work(telling: Telling) -> None:
        request = chosen_point(point, at, sequence, latest)
        mounting.check(directory)
        async with open_machine(
            load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id
        ) as access:
            view = await opened_view(telling, access, request)
            (item,) = chosen_disks(view, [disk] if disk is not None else [], every=False)
            over = None if no_journal else Overlay.thrown_away(scratch, base_of(view, item))
            served = ServedDisk(view, item, over)
            try:
                async with mounted(served, directory, partition=partition, play_journal=not no_journal) as made:
                    _tell(telling, view, made)
                    await _until_ended(telling, made)
            finally:
                await served.aclose()

    run(as_json, work)


def unmount(
    directory: Annotated[Path, typer.Argument(help="Where `replicar mount` mounted.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Unmount what `replicar mount` has mounted; also when that was killed. Nothing is left of it."""

    async def work(telling: Telling) -> None:
        await mounting.unmount(directory.absolute())
        telling.result(
            {"directory": str(directory), "mounted": False},
            lambda console: console.print(f"unmounted {escape(str(directory))}"),
        )

    run(as_json, work)


async def _until_ended(telling: Telling, made: Mounted) -> None:
    """Return when it was unmounted by somebody, or this was told to end: gently once, and then not."""
    gone = asyncio.create_task(made.until_gone())
    try:
        async with until_told() as told:
            for _ in range(2):
                asked = asyncio.create_task(told.wait())
                await asyncio.wait([gone, asked], return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                if gone.done():
                    return
                told.clear()
                try:
                    await made.unmount()
                    return
                except PermanentError as error:
                    telling.failure(error)
    finally:
        gone.cancel()


def _tell(telling: Telling, view: View, made: Mounted) -> None:
    place, volume = view.state.place, made.volume
    data = {
        "sequence": place.sequence,
        "time_ns": place.time_ns,
        "time": format_moment(place.time_ns),
        "directory": str(made.directory),
        "partition": volume.partition,
        "file_system": volume.kind,
    }
    telling.result(
        data,
        lambda console: console.print(
            f"{volume} at {made.directory}, as of sequence {place.sequence}, {format_moment(place.time_ns)}",
            markup=False,
            soft_wrap=True,
        ),
    )
