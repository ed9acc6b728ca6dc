"""`replica run`, `status` and `points`: a machine's warm replica, kept close behind its log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from recovery.chunks import MachineLog
from recovery.points import Latest, Request, locate
from recovery.replica.journal import Phase
from recovery.replica.points import POINT_SECONDS, ReplicaPoint
from recovery.replica.warm import Round, WarmReplica, points_kept, read_journal
from recovery.retention import Policy
from recovery.upkeep import retention_policy
from replicar.cli.access import Access, MachineId, VaultKeyFile, open_machine
from replicar.cli.choice import At, PointName, Sequence, chosen_point
from replicar.cli.console import Json, Machine, SettingsFile, Telling, duration, row, run, size, table
from replicar.cli.export import until_told
from replicar.cli.settings import OperatorSettings, load_settings
from replicar.clock import SystemClock
from replicar.errors import PermanentError, TransientError
from replicar.moments import format_moment

app = typer.Typer(
    name="replica", help="A machine's warm replica: VHD blobs kept close behind its log.", no_args_is_help=True
)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Which points are kept as snapshots: how they are thinned, and how far apart they are."""

    policy: Policy
    every_seconds: float


@app.command("run")
def run_replica(
    machine: Machine,
    every: Annotated[float, typer.Option(help="Seconds between rounds.", min=1.0)] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="One round, then end; failover does so.")] = False,
    points_every: Annotated[
        float | None,
        typer.Option(
            help="Seconds between the points that are kept as snapshots of the blobs; 0: none. The policy's otherwise.",
            min=0.0,
        ),
    ] = None,
    point: PointName = None,
    at: At = None,
    sequence: Sequence = None,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Keep a machine's replica close behind its log, round by round, until Ctrl-C or SIGTERM.

    The blobs are replicas/MACHINE-ID/DISK-INDEX.vhd in the logs' container, fixed VHDs that Azure imports. They are not
    sealed. Whoever runs this last is the only writer; where the machine's policy says `warm`, recovery workers do it.
    With --once a point ahead may be given; the latest is meant otherwise. Every so often the point that is held is kept
    as a snapshot of each blob, thinned by the machine's retention policy.
    """

    async def work(telling: Telling) -> None:
        named = any((point, at, sequence))
        if named and not once:
            raise PermanentError("a point goes with --once", hint="add --once, or leave the point out")
        request = chosen_point(point, at, sequence, latest=not named)
        loaded = load_settings(settings)
        kept = await _keeping(loaded, machine, points_every, asks=vault_key_file is None)
        async with (
            open_machine(loaded, machine, vault_key_file=vault_key_file, machine_id=machine_id) as access,
            WarmReplica(access.log, access.log.store, clock=SystemClock(), random=os.urandom) as replica,
        ):
            if once:
                await _round(telling, machine, replica, request, access, kept)
            else:
                await _rounds(telling, machine, replica, request, access, kept, every)

    run(as_json, work)


@app.command("status")
def status(
    machine: Machine,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Say which point a machine's replica holds, and how far behind its log that is. Exit status 1: it holds none."""

    async def work(telling: Telling) -> int:
        async with open_machine(
            load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id
        ) as access:
            return await _status(telling, machine, access.log)

    run(as_json, work)


@app.command("points")
def points(
    machine: Machine,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """List the earlier points that a machine's replica has as snapshots: each is a VHD, to be copied or imported."""

    async def work(telling: Telling) -> None:
        async with open_machine(
            load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id
        ) as access:
            found = await points_kept(access.log, access.log.store)
        data = {
            "machine": machine,
            "points": [
                {
                    "sequence": each.sequence,
                    "time_ns": each.time_ns,
                    "snapshots": [{"disk": of.disk, "blob": of.blob, "snapshot": of.snapshot} for of in each.snapshots],
                }
                for each in found
            ],
        }
        telling.result(data, lambda console: _show_points(console, found))

    run(as_json, work)


async def _keeping(settings: OperatorSettings, machine: str, every: float | None, *, asks: bool) -> Keeping:
    """What the machine's policy says; without the config server, what operators know. `every` goes before either."""
    if not asks:
        return Keeping(Policy(), POINT_SECONDS if every is None else every)
    async with settings.control() as control:
        policy = await control.machine_policy(machine)
    return Keeping(retention_policy(policy), policy.replica_point_seconds if every is None else every)


async def _round(
    telling: Telling, machine: str, replica: WarmReplica, request: Request, access: Access, kept: Keeping
) -> None:
    began = time.monotonic()
    done = await replica.advance(request, stored_number=access.stored_number, stored_digest=access.stored_digest)
    await replica.keep_points(kept.policy, kept.every_seconds)
    _tell(telling, machine, done, time.monotonic() - began)


async def _rounds(
    telling: Telling,
    machine: str,
    replica: WarmReplica,
    request: Request,
    access: Access,
    kept: Keeping,
    every: float,
) -> None:
    """Round after round until told to end. Storage may be away: the next round does what this one did not."""
    async with until_told() as told:
        while not told.is_set():
            try:
                await _round(telling, machine, replica, request, access, kept)
            except TransientError as error:
                telling.failure(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await told.wait()


async def _status(telling: Telling, machine: str, log: MachineLog) -> int:
    record = await read_journal(log, log.store)
    latest = (await locate(log, Latest())).place
    holds = record is not None and record.phase is Phase.APPLIED
    behind_ns = latest.time_ns - record.time_ns if record is not None and holds else None
    data = {
        "machine": machine,
        "phase": record.phase.value if record is not None else None,
        "sequence": record.sequence if record is not None else None,
        "time_ns": record.time_ns if record is not None else None,
        "behind_sequences": latest.sequence - record.sequence if record is not None else None,
        "behind_seconds": behind_ns / 1e9 if behind_ns is not None else None,
        "disks": [{"name": disk.name, "size_bytes": disk.size_bytes} for disk in record.disks] if record else [],
    }

    def show(console: Console) -> None:
        if record is None:
            console.print("there is no replica yet; next step: `replicar replica run MACHINE`")
            return
        made = table("", "~")
        row(made, "holds" if holds else "on the way to", f"sequence {record.sequence}, {format_moment(record.time_ns)}")
        if behind_ns is not None:
            row(made, "behind the log", f"{latest.sequence - record.sequence} changes, {duration(behind_ns / 1e9)}")
        console.print(made)

    telling.result(data, show)
    return 0 if holds else 1


def _show_points(console: Console, found: list[ReplicaPoint]) -> None:
    if not found:
        console.print("the replica has no earlier points; `replicar points MACHINE` lists what the log has")
        return
    made = table("time", ">sequence", ">disk", "snapshot")
    for each in found:
        for number, of in enumerate(each.snapshots):
            row(
                made, *((format_moment(each.time_ns), each.sequence) if number == 0 else ("", "")), of.disk, of.snapshot
            )
    console.print(made)
    folder = found[-1].snapshots[0].blob.rpartition("/")[0]
    console.print(f"each of the blob {folder}/DISK.vhd", markup=False, soft_wrap=True)


def _tell(telling: Telling, machine: str, done: Round, seconds: float) -> None:
    data = {
        "machine": machine,
        "sequence": done.sequence,
        "time_ns": done.time_ns,
        "written_bytes": done.written_bytes,
        "full": done.full,
        "seconds": round(seconds, 3),
    }
    words = "made anew" if done.full else "brought on"
    telling.result(
        data,
        lambda console: console.print(
            f"{words} to sequence {done.sequence}, {format_moment(done.time_ns)}: {size(done.written_bytes)} written "
            f"in {duration(seconds)}",
            markup=False,
            soft_wrap=True,
        ),
    )
