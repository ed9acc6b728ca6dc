"""`storage` and `fold`: what a machine takes of its container, and giving up what its policy does not keep."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich.console import Console

from recovery.folding import Folded
from recovery.indexing import Indexed
from recovery.retention import Policy, Rule
from recovery.upkeep import KeptUp, keep_up, retention_policy
from recovery.usage import Usage, usage
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.console import Json, Machine, SettingsFile, Telling, row, run, size, table
from replicar.cli.settings import OperatorSettings, load_settings
from replicar.clock import SystemClock
from replicar.control.messages import UpkeepKind, UpkeepReport
from replicar.errors import PermanentError
from replicar.log.tail import Stored
from replicar.moments import format_moment

_UNITS: Final = {"m": 60, "h": 3600, "d": 86400}
_NS: Final = 1_000_000_000
#: Told to the config server with what a fold by hand left; only a worker's name means more than that.
_BY_HAND: Final = "by hand"
#: What the policy is where neither the command nor the config server says it.
DEFAULT_WINDOW: Final = "2h"
DEFAULT_THIN: Final = ("1d:1h", "7d:2h", "15d:4h")


def storage(
    machine: Machine,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Show what a machine takes of its container, which points are kept, and how fast it grows."""

    async def work(telling: Telling) -> None:
        access = open_machine(load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id)
        async with access as opened:
            found = await usage(opened.log)
        telling.result({"machine": machine, **found.as_dict()}, lambda console: _show(console, machine, found))

    run(as_json, work)


def fold(
    machine: Machine,
    window: Annotated[
        str | None,
        typer.Option(
            help="How long every instant is kept: 90m, 2h, 1d.  \\[default: as the machine's policy says]",
            show_default=False,
        ),
    ] = None,
    thin: Annotated[
        list[str] | None,
        typer.Option(
            help="Up to an AGE, one point of every STRETCH; may be given several times.  "
            "\\[default: as the machine's policy says]",
            metavar="AGE:STRETCH",
            show_default=False,
        ),
    ] = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Bring the index up to date; give up nothing.")
    ] = False,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Bring a machine's index up to date, and give up the points that its policy does not keep.

    Recovery workers do this by the clock. Anybody who may read and write the container may do it as well, at any time:
    a run that dies is made good by the next. What one run gives up, a later one frees. Without the config server, and
    without --window and --thin, all of two hours is kept, then points of 15 days ever further apart.
    """

    async def work(telling: Telling) -> None:
        loaded = load_settings(settings)
        asks = vault_key_file is None
        policy = None if index_only else await _policy(loaded, machine, window, thin, asks=asks)
        access = open_machine(loaded, machine, vault_key_file=vault_key_file, machine_id=machine_id)
        async with access as opened:
            stored = Stored(opened.stored_number, 0, opened.stored_digest or b"")
            with telling.counting("indexing segments") as advance:
                done = await keep_up(
                    opened.log, policy, clock=SystemClock(), random=os.urandom, stored=stored, made=advance
                )
            if asks and done.retention is not None:
                await _report(loaded, opened.log.machine_id, done)
        folded = asdict(done.folded) if done.folded is not None else None
        data = {"machine": machine, "index": asdict(done.indexed), "fold": folded}
        telling.result(data, lambda console: _tell(console, machine, done.indexed, done.folded))

    run(as_json, work)


async def _policy(
    settings: OperatorSettings, machine: str, window: str | None, thin: list[str] | None, *, asks: bool
) -> Policy:
    """What is named, else what the machine's policy says, else what operators know."""
    if window is None and thin is None and asks:
        async with settings.control() as control:
            return retention_policy(await control.machine_policy(machine))
    return Policy(_span(window or DEFAULT_WINDOW), tuple(_rule(text) for text in thin or DEFAULT_THIN))


async def _report(settings: OperatorSettings, machine_id: uuid.UUID, done: KeptUp) -> None:
    """Tell the config server what is left, so that it offers nothing else."""
    report = UpkeepReport(
        kind=UpkeepKind.FOLD, instance=_BY_HAND, machine_id=machine_id, again_seconds=1, retention=done.retention
    )
    async with settings.control() as control:
        await control.report_upkeep(report)


def _span(text: str) -> int:
    """Nanoseconds."""
    match = re.fullmatch(r"(\d{1,6})([mhd])", text.strip())
    if match is None:
        raise PermanentError(f"{text!r} is no length of time", hint="write it like 90m, 2h or 15d")
    return int(match[1]) * _UNITS[match[2]] * _NS


def _rule(text: str) -> Rule:
    age, colon, stretch = text.partition(":")
    if not colon:
        raise PermanentError(
            f"{text!r} is no rule", hint="write it like 7d:2h: up to 7 days, one point of every 2 hours"
        )
    return Rule(_span(age), _span(stretch))


def _tell(console: Console, machine: str, indexed: Indexed, done: Folded | None) -> None:
    made = f"{len(indexed.checkpoints)} checkpoint(s) of {indexed.segments} segment(s)"
    console.print(f"{machine}: {made}; indexed up to segment {indexed.segment} of {indexed.tail}", markup=False)
    if done is None:
        return
    if done.decided:
        console.print(f"fold {done.generation}: whole from sequence {done.floor_sequence} on, {done.kept} points kept")
    if done.swept:
        console.print(f"freed {size(done.freed_bytes)}, removed {done.deleted_blobs} blob(s)")
    if done.held_bytes:
        console.print(f"{size(done.held_bytes)} can't be freed before its process server begins another run")
    if done.waiting_for_pins:
        console.print("nothing was freed: somebody reads from a point that was given up")


def _show(console: Console, machine: str, found: Usage) -> None:
    made = table("", "~")
    row(made, "machine", machine)
    row(made, "log", f"{size(found.log_bytes)} in {found.log_blobs} blob(s), {size(found.kept_bytes)} for older points")
    row(made, "index", f"{size(found.index_bytes)} in {found.index_blobs} blob(s), {found.checkpoints} checkpoint(s)")
    if found.bytes_per_day is not None:
        row(made, "growth", f"{size(found.bytes_per_day)} a day before anything is given up")
    if found.window_begin_ns is not None and found.window_end_ns is not None:
        row(made, "any instant", f"{format_moment(found.window_begin_ns)} to {format_moment(found.window_end_ns)}")
    console.print(made)
    if found.kept:
        kept = table("kept point", ">sequence", "~why")
        for item in found.kept:
            row(kept, format_moment(item.time_ns), item.sequence, item.reason)
        console.print(kept)
