"""`verify`: every byte of a machine's log checked, and the exit status that says whether it is sound."""

from __future__ import annotations

import time

from rich.console import Console

from recovery.verify import Report, verify as verify_log
from replicar.cli.access import MachineId, VaultKeyFile, open_machine
from replicar.cli.console import Json, Machine, SettingsFile, Telling, duration, row, run, size, table
from replicar.cli.settings import load_settings
from replicar.errors import CorruptionError


def verify(
    machine: Machine,
    settings: SettingsFile = None,
    vault_key_file: VaultKeyFile = None,
    machine_id: MachineId = None,
    as_json: Json = False,
) -> None:
    """Check a machine's whole log in storage: chain, every chunk decrypted, every frame, every audit.

    The exit status is 0 only if nothing is wrong.
    """

    async def work(telling: Telling) -> int:
        began = time.monotonic()
        async with open_machine(
            load_settings(settings), machine, vault_key_file=vault_key_file, machine_id=machine_id
        ) as access:
            with telling.counting("verifying segments") as advance:
                report = await verify_log(
                    access.log,
                    stored_number=access.stored_number,
                    stored_digest=access.stored_digest,
                    verified=lambda segments, _: advance(segments, access.stored_number),
                )
        seconds = time.monotonic() - began
        data = {"machine": machine, **report.as_dict(), "seconds": round(seconds, 3)}
        telling.result(data, lambda console: _show(console, machine, report, seconds))
        return 0 if report.is_sound else CorruptionError.exit_status

    run(as_json, work)


def _show(console: Console, machine: str, report: Report, seconds: float) -> None:
    made = table("", "~")
    row(made, "machine", machine)
    row(made, "segments", f"{report.segments} (up to number {report.last_number}, {report.stored_number} stored)")
    row(made, "chunks", report.chunks)
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
        console.print("[bold green]sound[/]: chain, seals, frames and audits are as they were written")
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
