"""`verify`: a machine's log checked, every byte or a share in turn; the exit status says whether it is sound."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from recovery.pacing import PacedStore
from recovery.sampling import MAX_PARTS, verify_share
from recovery.verify import Report, verify as verify_log
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.console import Json, Machine, SettingsFile, Telling, duration, row, run, size, table
from replicar.cli.settings import load_settings
from replicar.clock import SystemClock
from replicar.control.files import PUBLIC_MODE, write_file
from replicar.errors import CorruptionError, PermanentError
from replicar.observe.exposition import Page

_DAY_NS: Final = 86_400 * 10**9


def verify(
    machine: Machine,
    share: Annotated[
        str | None,
        typer.Option(
            help="Check the data of this share only, as 5%; chain and tables are checked in full.", show_default=False
        ),
    ] = None,
    turn: Annotated[
        int | None,
        typer.Option(
            help="Which share: with 5% there are 20, taken in turn.  \\[default: by the day]",
            min=0,
            show_default=False,
        ),
    ] = None,
    bytes_per_second: Annotated[
        int | None, typer.Option(help="Read no faster than this.", min=1 << 16, show_default=False)
    ] = None,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            help="Write the result there for Prometheus, as node_exporter's textfile collector takes it (*.prom).",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a machine's whole log in storage: chain, every chunk decrypted, every frame, every audit.

    It only reads, so a shared access signature for reading and listing is enough. The exit status is 0 only if nothing
    is wrong.
    """

    async def work(telling: Telling) -> int:
        began = time.monotonic()
        parts = _parts(share)
        if turn is not None and share is None:
            raise PermanentError("--turn goes with --share", hint="give both, or neither")
        clock = SystemClock()
        which = turn if turn is not None else clock.now_ns() // _DAY_NS
        async with open_machine(
            load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id
        ) as access:
            log = access.log
            if bytes_per_second is not None:
                log = replace(log, store=PacedStore(log.store, bytes_per_second, clock=clock))
            with telling.counting("verifying segments") as advance:

                def verified(segments: int, _: int) -> None:
                    advance(segments, access.stored_number)

                known: dict[str, Any] = {"stored_number": access.stored_number, "stored_digest": access.stored_digest}
                if parts is None:
                    report = await verify_log(log, **known, verified=verified)
                else:
                    report = await verify_share(log, parts=parts, turn=which, **known, verified=verified)
        seconds = time.monotonic() - began
        data = {"machine": machine, **report.as_dict(), "seconds": round(seconds, 3)}
        if parts is not None:
            data |= {"parts": parts, "turn": which % parts}
        if metrics_file is not None:
            write_file(metrics_file, page(machine, report, clock.now_ns(), seconds).render().encode(), mode=PUBLIC_MODE)
        telling.result(data, lambda console: _show(console, machine, report, seconds))
        return 0 if report.is_sound else CorruptionError.exit_status

    run(as_json, work)


def _parts(share: str | None) -> int | None:
    """A share as the number of parts that there are of that size."""
    if share is None:
        return None
    try:
        percent = float(share.strip().removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 100 / MAX_PARTS <= percent <= 100:
        raise PermanentError(f"{share} is no share", hint="write it in percent, like 5%, from 0.01% to 100%")
    return math.ceil(100 / percent)


def page(machine: str, report: Report, now_ns: int, seconds: float) -> Page:
    """A verification as metrics. Commands end before anybody could ask them, so they leave these behind."""
    found, who = Page(), {"machine": machine, "machine_id": report.machine_id}
    for name, text, value in (
        ("ended_seconds", "When the last verification ended, since 1970.", now_ns / 1e9),
        ("duration_seconds", "What it took.", seconds),
        ("sound", "1 if all that was checked is as it was written.", int(report.is_sound)),
        ("problems", "What was wrong, audits included.", report.problem_count),
        ("audits", "Audits of the source disks that recovery was compared with.", report.audits),
        ("mismatches", "Audits of which the replica holds other bytes.", report.audits_failed),
        ("segments", "Segments whose place in the chain was checked.", report.segments),
    ):
        found.gauge(f"replicar_verify_{name}", text, value, **who)
    return found


def _show(console: Console, machine: str, report: Report, seconds: float) -> None:
    made = table("", "~")
    row(made, "machine", machine)
    row(made, "segments", f"{report.segments} (up to number {report.last_number}, {report.stored_number} stored)")
    row(made, "data checked", f"{report.opened} segments, {report.chunks} chunks")
    row(made, "frames", f"{report.frames}, {report.descriptors} descriptors")
    row(made, "sequences", f"{report.first_sequence} to {report.last_sequence}")
    row(made, "bytes", f"{size(report.sealed_bytes)} sealed, {size(report.raw_bytes)} opened, in {duration(seconds)}")
    row(
        made,
        "audits",
        f"{report.audits} compared, {report.audits_failed} failed, {report.audits_skipped} not comparable",
    )
    if report.note:
        row(made, "note", report.note)
    console.print(made)
    if report.is_sound:
        console.print("[bold green]sound[/]: what was checked is as it was written")
        return
    console.print(f"\n[bold red]{report.problem_count} problem(s)[/]")
    wrong = table(">segment", "~blob", ">byte", "~problem")
    for problem in report.problems:
        unknown = (problem.number, problem.blob, problem.offset)
        row(wrong, *("-" if value is None else value for value in unknown), problem.text)
    console.print(wrong)
    if report.problem_count > report.audits_failed:
        console.print(
            "next step: recover to a point before the first of these, and restore the blobs if you have a copy"
        )
    if report.audits_failed:
        console.print(
            "next step for failed audits: find out what wrote to the disk past the agent; then enrol the machine again"
            " under its name, and its disks are compared in full"
        )
