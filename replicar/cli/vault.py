"""What the config server knows and does: `status`, `machines`, `protect`, `points`, `tag`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recovery.history import History
from recovery.moments import format_moment
from recovery.points import survey
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.console import Json, Machine, SettingsFile, Telling, duration, row, run, size, table
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.messages import MAX_WAIT_SECONDS, MachineSummary, Point, PointList, VaultStatus
from replicar.errors import TransientError

#: How long `tag` waits for the agent (and, if asked to, for storage) unless told otherwise.
TAG_SECONDS: Final = 120.0
#: Gaps that `points` shows; a machine under trace capture has one for each point.
GAPS_SHOWN: Final = 10


def status(settings: SettingsFile = None, as_json: Json = False) -> None:
    """Show the vault at a glance: process servers, machines, how far replication is."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.status()
        telling.result(found.model_dump(mode="json"), lambda console: _show_status(console, found))

    run(as_json, work)


def machines(settings: SettingsFile = None, as_json: Json = False) -> None:
    """List the machines: state, initial replication, what is stored, RPO."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.machines()
        data = {"machines": [machine.model_dump(mode="json") for machine in found]}
        telling.result(data, lambda console: console.print(_machine_table(found)))

    run(as_json, work)


def protect(machine: Machine, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Protect a machine: assign it to the least loaded process server. Doing it again changes nothing."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.protect(machine)

        def show(console: Console) -> None:
            console.print(f"{escape(found.name)} is replicated through {escape(found.process_server or '?')}.")
            console.print("Initial replication begins now; `replicar machines` shows how far it is.")

        telling.result(found.model_dump(mode="json"), show)

    run(as_json, work)


def points(
    machine: Machine,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """List what a machine can be recovered to: named points, and the window in which any instant can be chosen."""

    async def from_config_server(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.points(machine)
        telling.result(found.model_dump(mode="json"), lambda console: _show_points(console, found))

    async def from_log(telling: Telling) -> None:
        access = open_machine(load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id)
        async with access as opened:
            found = _point_list(machine, opened.log.machine_id, await survey(opened.log))
        telling.result(found.model_dump(mode="json"), lambda console: _show_points(console, found))

    run(as_json, from_config_server if vault_key_file is None else from_log)


def tag(
    machine: Machine,
    name: Annotated[str, typer.Argument(help="The point's name; a machine has each name once.")],
    wait_stored: Annotated[
        bool, typer.Option("--wait-stored", help="Wait until everything up to the point is in storage.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.", min=1)] = TAG_SECONDS,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Make a named recovery point of a machine, over all its disks."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            point = await _tag(control, machine, name, wait_stored, timeout)
        telling.result(
            point.model_dump(mode="json"),
            lambda console: console.print(
                f"{escape(point.name)}: sequence {point.sequence}, {format_moment(point.time_ns)}, "
                f"{'stored' if point.stored else 'not stored yet'}"
            ),
        )

    run(as_json, work)


async def _tag(control: ControlClient, machine: str, name: str, wait_stored: bool, seconds: float) -> Point:
    """Ask until the point is there; always with the same command id, so that it is made once."""
    command_id, deadline = str(uuid.uuid4()), time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return await control.mark(
                machine,
                name,
                wait_stored=wait_stored,
                wait_seconds=max(min(left, MAX_WAIT_SECONDS), 0),
                command_id=command_id,
            )
        except TransientError as error:
            # Only the end of one wait carries the command's id; any other trouble is for the operator to see.
            if "command_id" not in error.fields or time.monotonic() >= deadline:
                raise


def _show_status(console: Console, found: VaultStatus) -> None:
    console.print(f"Vault {escape(found.vault)} (config server {escape(found.software)})\n")
    servers = table("process server", "state", "address", ">machines", ">cache free", ">of")
    for server in found.process_servers:
        state = "online" if server.online else "offline"
        row(servers, server.name, state, f"{server.host}:{server.port}", server.machines,
            size(server.cache_bytes_free), size(server.cache_bytes))  # fmt: skip
    if found.process_servers:
        console.print(servers)
    else:
        console.print("No process server is enrolled yet: process-server enrol --help")
    console.print()
    if found.machines:
        console.print(_machine_table(found.machines))
    else:
        console.print("No machine is enrolled yet: mobility-agent enrol --help")


def _machine_table(found: Iterable[MachineSummary]) -> Table:
    made = table(
        "machine",
        "state",
        "agent",
        "process server",
        ">initial",
        ">disks",
        ">captured",
        ">sent",
        ">stored",
        ">RPO",
        ">p99",
    )
    for machine in found:
        total = machine.seed_total_bytes
        initial = f"{100 * machine.seed_done_bytes / total:.0f} %" if total else "-"
        agent = "online" if machine.online else "offline"
        row(made, machine.name, machine.state, agent, machine.process_server or "-", initial, len(machine.disks),
            size(machine.bytes_captured), size(machine.bytes_sent), size(machine.bytes_stored),
            duration(machine.rpo_seconds), duration(machine.rpo_p99_seconds))  # fmt: skip
    return made


def _show_points(console: Console, found: PointList) -> None:
    if found.points:
        named = table("point", "consistency", "time", ">sequence", "stored")
        for point in found.points:
            row(named, point.name, point.kind, format_moment(point.time_ns), point.sequence,
                "yes" if point.stored else "not yet")  # fmt: skip
        console.print(named)
        if found.truncated:
            console.print("(older ones are left out)")
    else:
        console.print("There is no named point yet: replicar tag MACHINE NAME")
    console.print()
    if found.ordered_from is None:
        if found.points:
            console.print("Named points alone can be chosen now: the order of changes is not known after the last.")
        else:
            console.print("No instant can be chosen yet: initial replication is not complete.")
    else:
        sequence, time_ns = found.ordered_from
        console.print(f"Any instant since {format_moment(time_ns)} (sequence {sequence}) can be chosen with --at.")
    if len(found.gaps) > GAPS_SHOWN:
        console.print(f"({len(found.gaps) - GAPS_SHOWN} older gaps are left out; --json has them)")
    for gap in found.gaps[-GAPS_SHOWN:]:
        end = gap.last_sequence if gap.last_sequence is not None else "(it lasts)"
        console.print(f"But for the gap from sequence {gap.first_sequence} to {end}: {escape(gap.reason)}")


def _point_list(machine: str, machine_id: uuid.UUID, history: History) -> PointList:
    """A log's own account of its points, in the config server's words."""
    stored = history.last.sequence if history.last is not None else 0
    first = next((gap.after for gap in history.gaps if gap.after is not None), None)
    fields: dict[str, Any] = {
        "machine_id": machine_id,
        "name": machine,
        "points": [
            {
                "name": mark.name,
                "kind": mark.consistency,
                "sequence": mark.place.sequence,
                "time_ns": mark.place.time_ns,
                "stored": True,
            }
            for mark in reversed(history.marks)
            if not mark.in_gap
        ],
        "ordered_from": (first.sequence, first.time_ns) if first is not None else None,
        "stored_sequence": stored,
        "gaps": [
            {
                "first_sequence": gap.begin.sequence,
                "last_sequence": gap.after.sequence - 1 if gap.after is not None else None,
                "reason": gap.reason[:512],
            }
            for gap in history.gaps
        ],
    }
    return PointList.model_validate(fields)
