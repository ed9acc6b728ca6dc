"""`storage` and `fold`: what a machine takes of its container, and giving up what its policy does not keep."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich.console import Console

from recovery.folding import Folded, Folder
from recovery.indexing import Indexed, make_index
from recovery.moments import format_moment
from recovery.retention import Policy, Rule
from recovery.usage import Usage, usage
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.console import Json, Machine, SettingsFile, Telling, row, run, size, table
from replicar.cli.settings import load_settings
from replicar.clock import SystemClock
from replicar.errors import PermanentError
from replicar.log.tail import Stored

_UNITS: Final = {"m": 60, "h": 3600, "d": 86400}
_NS: Final = 1_000_000_000
#: What the policy is when nobody says otherwise.
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
    window: Annotated[str, typer.Option(help="How long every instant is kept: 90m, 2h, 1d.")] = DEFAULT_WINDOW,
    thin: Annotated[
        list[str] | None,
        typer.Option(
            help="Up to an AGE, one point of every STRETCH; may be given several times.  "
            "\\[default: 1d:1h 7d:2h 15d:4h]",
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

    To be run now and then, by anybody who may read and write the container: a run that dies is made good by the next.
    What one run gives up, a later one frees.
    """

    async def work(telling: Telling) -> None:
        policy = Policy(_span(window), tuple(_rule(text) for text in thin or DEFAULT_THIN))
        access = open_machine(load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id)
        async with access as opened:
            stored = Stored(opened.stored_number, 0, opened.stored_digest or b"")
            with telling.counting("indexing segments") as advance:
                indexed = await make_index(
                    opened.log, clock=SystemClock(), random=os.urandom, stored=stored, made=advance
                )
            done = None
            if not index_only:
                done = await Folder(opened.log, policy, clock=SystemClock(), random=os.urandom).run()
        data = {"machine": machine, "index": asdict(indexed), "fold": asdict(done) if done is not None else None}
        telling.result(data, lambda console: _tell(console, machine, indexed, done))

    run(as_json, work)


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
