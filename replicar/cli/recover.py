"""`recover`: a machine's disks as they were at a point, as files, on block devices, or as VHDs in page blobs."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from recovery.audits import Audited
from recovery.chunks import ChunkSource
from recovery.device import write_device
from recovery.output import Written, write_qcow2_file, write_raw_file, write_vhd_blob, write_vhd_file
from recovery.pins import holding
from recovery.points import Request
from recovery.view import Progress, View
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
from replicar.cli.console import Json, Machine, SettingsFile, Telling, duration, row, run, size, table
from replicar.cli.settings import load_settings
from replicar.clock import SystemClock
from replicar.errors import PermanentError
from replicar.formats.record import Disk
from replicar.moments import format_moment
from replicar.storage.store import PageBlobStore
from replicar.storage.target import StorageTarget, open_store

RawFile = Annotated[
    str | None,
    typer.Option("--raw", help="Write a raw file; {disk} stands for the disk's name.", show_default=False),
]
VhdFile = Annotated[
    str | None, typer.Option("--vhd", help="Write a fixed VHD file; {disk} likewise.", show_default=False)
]
Qcow2File = Annotated[
    str | None, typer.Option("--qcow2", help="Write a qcow2 file; {disk} likewise.", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Write onto a block device that nobody uses; with --replace also if it holds something.",
        show_default=False,
    ),
]
Blob = Annotated[
    str | None,
    typer.Option(
        "--blob", help="Write a fixed VHD into a page blob, ready for import; {disk} likewise.", show_default=False
    ),
]
Container = Annotated[
    str | None,
    typer.Option("--container", help="The container for --blob, if not the logs' own.", show_default=False),
]
Replace = Annotated[bool, typer.Option("--replace", help="Replace what is there already.")]

#: What writes to a path, by option.
_WRITERS: Final[dict[str, Callable[..., Awaitable[Written]]]] = {
    "raw": write_raw_file,
    "vhd": write_vhd_file,
    "qcow2": write_qcow2_file,
    "device": write_device,
}


def recover(
    machine: Machine,
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
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Recover disks of a machine, as they were at one point.

    Say which point (--point, --at, --sequence or --latest), which disks (--disk or --all; not needed for a machine with
    one disk), and where to (--raw, --vhd, --qcow2, --device or --blob).

    The machine itself is not touched. What is there already is not replaced unless you say so.
    """

    async def work(telling: Telling) -> None:
        request = chosen_point(point, at, sequence, latest)
        to = chosen_target(raw=raw, vhd=vhd, qcow2=qcow2, device=device, blob=blob)
        loaded = load_settings(settings)
        async with open_machine(loaded, machine, vault_key_file=vault_key_file, machine_id=machine_id) as access:
            disks = Disks(tuple(disk or ()), every)
            where = loaded.target(container)
            await recovered(
                *(telling, machine, access, request, disks, to, where),
                make_container=container is not None,
                replace=replace,
            )

    run(as_json, work)


@dataclass(frozen=True, slots=True)
class Disks:
    """Which disks were asked for: by their names, or every one."""

    names: tuple[str, ...] = ()
    every: bool = False


async def recovered(
    telling: Telling,
    machine: str,
    access: Access,
    request: Request,
    chosen: Disks,
    to: tuple[str, str],
    container: StorageTarget,
    *,
    make_container: bool,
    replace: bool,
) -> None:
    """Recover disks, and say what was written.

    Args:
        to: kind and name of the target, see `chosen_target`.
        container: where blobs go; it is made first if `make_container` says so.
    """
    began = time.monotonic()
    kind, target = to
    source = ChunkSource(access.log)
    view = View(access.log, await located(telling, access, request, source), source=source)
    disks = chosen_disks(view, list(chosen.names), chosen.every)
    names = disk_names(disks, target)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(holding(access.log, view.state, clock=SystemClock(), random=os.urandom))
        store = await stack.enter_async_context(open_store(container)) if kind == "blob" else None
        if store is not None and make_container:
            await store.ensure_container()
        written = [
            await _write(telling, view, item, kind, name, store, replace)
            for item, name in zip(disks, names, strict=True)
        ]
    audits = {item.name: await view.state.audited(item) for item in disks}
    _tell(telling, machine, access, view, written, audits, kind, time.monotonic() - began)


def chosen_target(**targets: str | None) -> tuple[str, str]:
    """The one target that was given, as kind and name.

    Raises:
        PermanentError: none was, or more than one.
    """
    given = [(kind, name) for kind, name in targets.items() if name is not None]
    if len(given) != 1:
        raise PermanentError(
            "say where to recover to" if not given else "more than one target was given",
            hint="give exactly one of --raw FILE, --vhd FILE, --qcow2 FILE, --device PATH, --blob NAME",
        )
    return given[0]


async def _write(
    telling: Telling, view: View, disk: Disk, kind: str, name: str, store: PageBlobStore | None, replace: bool
) -> Written:
    with telling.progress(f"{disk.name} -> {name}") as advance:
        progress: Progress = advance
        if store is not None:
            return await write_vhd_blob(view, disk, store, name, replace=replace, progress=progress)
        return await _WRITERS[kind](view, disk, Path(name), replace=replace, progress=progress)


def _tell(
    telling: Telling,
    machine: str,
    access: Access,
    view: View,
    written: list[Written],
    audits: dict[str, Audited],
    kind: str,
    seconds: float,
) -> None:
    place = view.state.place
    data = {
        "machine": machine,
        "machine_id": str(access.log.machine_id),
        "sequence": place.sequence,
        "time_ns": place.time_ns,
        "time": format_moment(place.time_ns),
        "kind": kind,
        "disks": [asdict(item) | asdict(audits[item.disk]) for item in written],
        "seconds": round(seconds, 3),
    }

    def show(console: Console) -> None:
        console.print(
            f"{machine} as it was after sequence {place.sequence}, {format_moment(place.time_ns)}", markup=False
        )
        made = table("~disk", "~target", ">size", ">data", ">audited", ">still proven", ">oldest proof")
        for item in written:
            shares = _audited(audits[item.disk], view.disk(item.disk).size_bytes, place.time_ns)
            row(made, item.disk, item.target, size(item.size_bytes), size(item.data_bytes), *shares)
        console.print(made)
        console.print(f"in {duration(seconds)}")

    telling.result(data, show)


def _audited(audited: Audited, size_bytes: int, time_ns: int) -> tuple[str, str, str]:
    """The share of a disk that was audited before the point, the share that an audit still holds for, since nothing was
    written there after it, and how long before the point the oldest of those was."""
    seen, held = (f"{int(100 * count / size_bytes)} %" for count in (audited.audited_bytes, audited.proven_bytes))
    if audited.oldest_proof_ns is None:
        return seen, held, "-"
    return seen, held, duration(max(time_ns - audited.oldest_proof_ns, 0) / 1e9)
