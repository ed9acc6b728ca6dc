"""`export`: disks of a machine as they were at a point, served over NBD straight from storage."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer

from recovery.chunks import ChunkSource
from recovery.export.disk import ServedDisk, base_of
from recovery.export.overlay import Overlay
from recovery.export.server import Address, ExportServer
from recovery.pins import holding
from recovery.points import Request
from recovery.view import View
from replicar.cli.access import Access, MachineId, VaultKeyFile, open_machine
from replicar.cli.choice import (
    At,
    DiskNames,
    Every,
    Newest,
    PointName,
    Sequence,
    chosen_disks,
    chosen_point,
    disk_names,
    located,
)
from replicar.cli.console import Json, Machine, SettingsFile, Telling, run
from replicar.cli.settings import load_settings
from replicar.clock import SystemClock
from replicar.errors import PermanentError
from replicar.formats.record import Disk
from replicar.moments import format_moment
from replicar.nbd.tls import server_context

#: Where overlays that are thrown away lie; unlike /tmp it is seldom memory.
SCRATCH = Path("/var/tmp")  # noqa: S108 - the files have no names


def export(
    machine: Machine,
    point: PointName = None,
    at: At = None,
    sequence: Sequence = None,
    latest: Newest = False,
    disk: DiskNames = None,
    every: Every = False,
    socket: Annotated[
        Path | None, typer.Option(help="Serve at a Unix socket of this path.", show_default=False)
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="Serve at HOST:PORT instead; off this machine that needs TLS.", show_default=False),
    ] = None,
    overlay: Annotated[
        str | None,
        typer.Option(help="Keep what is written in this file; {disk} stands for the disk's name.", show_default=False),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Let nobody write.")] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Where what is written is put until the end.  \\[default: /var/tmp]", show_default=False),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", help="For TLS: what is shown; PEM.", show_default=False)
    ] = None,
    key: Annotated[Path | None, typer.Option("--tls-key", help="Its key; PEM.", show_default=False)] = None,
    authority: Annotated[
        Path | None,
        typer.Option("--tls-authority", help="Whose certificates clients have to show; PEM.", show_default=False),
    ] = None,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Serve disks of a machine over NBD, as they were at one point, without copying them first.

    Every disk is an export of its name. Clients may write: it goes over the point, and is thrown away when this ends,
    unless it is kept with --overlay; a kept one can be served again, over the same point. The machine and its log are
    never touched. It ends with Ctrl-C or SIGTERM.
    """

    async def work(telling: Telling) -> None:
        request = chosen_point(point, at, sequence, latest)
        address = _address(socket, listen)
        if read_only and (overlay is not None or scratch is not None):
            raise PermanentError("--read-only goes with neither --overlay nor --scratch", hint="leave one of them out")
        tls = None
        if any((certificate, key, authority)):
            if not (certificate and key and authority):
                raise PermanentError(
                    "TLS takes three files", hint="give --tls-certificate, --tls-key and --tls-authority"
                )
            tls = server_context(certificate, key, authority, setting="--tls-...")
        async with open_machine(
            load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id
        ) as access:
            view = await opened_view(telling, access, request)
            disks = chosen_disks(view, disk or [], every)
            kept = disk_names(disks, overlay) if overlay is not None else None
            served = served_disks(view, disks, kept=kept, scratch=None if read_only else scratch or SCRATCH)
            held = holding(access.log, view.state, clock=SystemClock(), random=os.urandom)
            async with held, ExportServer(served, address, tls=tls) as server, until_told() as told:
                _tell(telling, view, server)
                await told.wait()

    run(as_json, work)


async def opened_view(telling: Telling, access: Access, request: Request) -> View:
    """A view of the point that was asked for."""
    source = ChunkSource(access.log)
    return View(access.log, await located(telling, access, request, source), source=source)


def served_disks(
    view: View, disks: list[Disk], *, kept: list[str] | None = None, scratch: Path | None = None
) -> list[ServedDisk]:
    """Disks with overlays: `kept` at the paths given, else thrown away and put into `scratch`, else none.

    Raises:
        PermanentError, ConflictError, TransientError: see `Overlay.kept`.
    """
    served: list[ServedDisk] = []
    now_ns = SystemClock().now_ns()
    for number, disk in enumerate(disks):
        over: Overlay | None = None
        if kept is not None:
            over = Overlay.kept(Path(kept[number]), base_of(view, disk), created_ns=now_ns)
        elif scratch is not None:
            over = Overlay.thrown_away(scratch, base_of(view, disk))
        served.append(ServedDisk(view, disk, over))
    return served


@asynccontextmanager
async def until_told() -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _address(socket: Path | None, listen: str | None) -> Address:
    if (socket is None) == (listen is None):
        raise PermanentError("say where to serve", hint="give exactly one of --socket PATH, --listen HOST:PORT")
    if socket is not None:
        return socket
    assert listen is not None
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise PermanentError(f"{listen} is no address", hint="write it as HOST:PORT")
    return host.strip("[]"), int(port)


def _tell(telling: Telling, view: View, server: ExportServer) -> None:
    """Say that the disks are there: at once, since this goes on."""
    place = view.state.place
    uris = {name: _uri(name, server.address) for name in server.disks}
    data = {
        "sequence": place.sequence,
        "time_ns": place.time_ns,
        "time": format_moment(place.time_ns),
        "exports": uris,
    }
    telling.result(
        data,
        lambda console: console.print(
            "\n".join([f"as of sequence {place.sequence}, {format_moment(place.time_ns)}:", *uris.values()]),
            markup=False,
            soft_wrap=True,
        ),
    )


def _uri(name: str, address: Address) -> str:
    if isinstance(address, Path):
        return f"nbd+unix:///{name}?socket={address.absolute()}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"nbd://{host}:{address[1]}/{name}"
