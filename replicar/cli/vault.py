"""What the config server knows and does: `status`, `machines`, `protect`, `points`, `tag`."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from recovery.history import History
from recovery.points import survey
from replicar.cli import groups, overview
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.console import Json, Machine, SettingsFile, Telling, run
from replicar.cli.following import Timeout, carried_out
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.messages import MAX_WAIT_SECONDS, JobKind, Point, PointList
from replicar.errors import TransientError
from replicar.formats.record import Consistency
from replicar.moments import format_moment

#: What `status` ends with while a protected machine is not being stored; no error of the common tree has it.
NOT_STORING_STATUS: Final = 7
#: How long `tag` waits for the agent (and, if asked to, for storage) unless told otherwise.
TAG_SECONDS: Final = 120.0


def status(settings: SettingsFile = None, as_json: Json = False) -> None:
    """Show the vault at a glance: process servers, machines, how far replication is, and what is in its way.

    The exit status is 7 while a protected machine is not being stored: something is in the way of it, which is named.
    """

    async def work(telling: Telling) -> int:
        async with load_settings(settings).control() as control:
            found = await control.status()
        telling.result(found.model_dump(mode="json"), lambda console: overview.show_status(console, found))
        return 0 if all(machine.storing for machine in found.machines) else NOT_STORING_STATUS

    run(as_json, work)


def machines(
    name: Annotated[str | None, typer.Argument(help="Show this one, with all its figures.", show_default=False)] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """List the machines: state, initial replication, what is stored, RPO; or show everything about one."""

    async def every(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.machines()
        data = {"machines": [machine.model_dump(mode="json") for machine in found]}
        telling.result(data, lambda console: overview.show_machines(console, found))

    async def one(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.machine(name or "")
        telling.result(found.model_dump(mode="json"), lambda console: overview.show_machine(console, found))

    run(as_json, every if name is None else one)


def protect(
    machine: Machine,
    policy: Annotated[
        str | None, typer.Option(help="The policy to protect it by: `replicar policy list`.", show_default=False)
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow it until it has a recovery point and its target settings."),
    ] = False,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Protect a machine: assign it to the least loaded process server. Doing it again changes nothing."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.protect(machine, policy=policy)
            jobs = (await control.jobs(machine)).jobs if wait else ()  # newest first
            job = next((job for job in jobs if job.kind is JobKind.FINALIZE), None)
            if job is not None:
                await carried_out(telling, control, job, timeout=timeout)
                return
            undecided = (await control.target(machine)).missing()

        def show(console: Console) -> None:
            console.print(f"{escape(found.name)} is replicated through {escape(found.process_server or '?')}.")
            console.print("Initial replication begins now; `replicar machines` shows how far it is.")
            if undecided:
                command = f"`replicar target set {escape(machine)}` ({', '.join(undecided)})"
                console.print(f"Decide what it is to be made of, for drills and failovers: {command}.")

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
        telling.result(found.model_dump(mode="json"), lambda console: overview.show_points(console, found))

    async def from_log(telling: Telling) -> None:
        access = open_machine(load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id)
        async with access as opened:
            found = points_of(machine, opened.log.machine_id, await survey(opened.log))
        telling.result(found.model_dump(mode="json"), lambda console: overview.show_points(console, found))

    run(as_json, from_config_server if vault_key_file is None else from_log)


def tag(
    machine: Machine,
    name: Annotated[str, typer.Argument(help="The point's name; a machine has each name once.")],
    wait_stored: Annotated[
        bool, typer.Option("--wait-stored", help="Wait until everything up to the point is in storage.")
    ] = False,
    application: Annotated[
        bool, typer.Option("--application", help="Have the machine's hooks hold its applications still for it.")
    ] = False,
    together: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="Another machine that the point is to be of, as of the same instant.", metavar="MACHINE"
        ),
    ] = None,
    hold_seconds: Annotated[
        float, typer.Option(help="How long writers may be held for a point of several machines.", min=0.1, max=10.0)
    ] = 2.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.", min=1)] = TAG_SECONDS,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Make a named recovery point of a machine, over all its disks; or of several machines, as of one instant."""
    if together:
        if application:
            raise typer.BadParameter("a point of several machines holds their writers; leave --application out")
        request = groups.request((machine, *together), name, hold_seconds)
        run(as_json, lambda telling: groups.tag(telling, request, settings, timeout if wait_stored else None))
        return
    consistency = Consistency.APPLICATION if application else Consistency.CRASH

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            point = await _tag(control, machine, name, wait_stored, timeout, consistency)
        held = "" if point.pause_seconds is None else f", applications held for {point.pause_seconds * 1000:.0f} ms"
        telling.result(
            point.model_dump(mode="json"),
            lambda console: console.print(
                f"{escape(point.name)}: sequence {point.sequence}, {format_moment(point.time_ns)}, "
                f"{'stored' if point.stored else 'not stored yet'}{held}"
            ),
        )

    run(as_json, work)


async def _tag(
    control: ControlClient, machine: str, name: str, wait_stored: bool, seconds: float, consistency: Consistency
) -> Point:
    """Ask until the point is there; always with the same command id, so that it is made once."""
    command_id, deadline = str(uuid.uuid4()), time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return await control.mark(
                machine,
                name,
                consistency=consistency,
                wait_stored=wait_stored,
                wait_seconds=max(min(left, MAX_WAIT_SECONDS), 0),
                command_id=command_id,
            )
        except TransientError as error:
            # Only the end of one wait carries the command's id; any other trouble is for the operator to see.
            if "command_id" not in error.fields or time.monotonic() >= deadline:
                raise


def points_of(machine: str, machine_id: uuid.UUID, history: History) -> PointList:
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
        "ordered_until_ns": history.last.time_ns if history.last is not None and first is not None else None,
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
