"""`mobility-agent install` and `uninstall`: the agent as a service of this machine, and nothing left of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from mobility_agent.install import clients, findings, steps, unit
from mobility_agent.install.findings import Finding, Verdict
from mobility_agent.install.plan import Step, carry_out
from mobility_agent.settings import SETTINGS_VARIABLE, AgentSettings, CaptureKind, DiskSettings, load_settings
from mobility_agent.state import StateDirectory
from replicar.errors import PermanentError, TransientError

DEFAULT_DIRECTORY: Final = Path("/var/lib/replicar/agent")
#: There while systemd is what runs the machine's services (sd_booted(3)).
_BOOTED: Final = Path("/run/systemd/system")

Settings = Annotated[
    Path, typer.Option("--settings", "-s", envvar=SETTINGS_VARIABLE, help="The agent's settings, a TOML file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")]
Units = Annotated[Path, typer.Option(help="Where systemd looks for units.", file_okay=False)]
_SETTINGS: Final = Path("/etc/replicar/agent.toml")


def add(app: typer.Typer) -> None:
    """Give `app` these commands."""
    app.command()(install)
    app.command()(uninstall)


def install(
    settings: Settings = _SETTINGS,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of a disk to protect; writes the settings if there are none.", metavar="NAME=PATH"
        ),
    ] = None,
    directory: Annotated[
        Path, typer.Option("--directory", "-d", help="The state directory, for settings that are written here.")
    ] = DEFAULT_DIRECTORY,
    check: Annotated[bool, typer.Option("--check", help="Only look at the machine.")] = False,
    dry_run: DryRun = False,
    start: Annotated[bool, typer.Option(help="Enable and start the service.")] = True,
    units: Units = unit.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Make the agent a service of this machine; enrol it first.

    Looks at kernel, privileges, space, clock and disks, says how each disk is captured and why, and stops at whatever
    would keep the agent from running. Then it writes the unit, enables and starts it. May be run again.
    """
    settings, written, chosen, why = _settings(settings.absolute(), disk or [], directory.absolute())
    found = findings.look(chosen)
    failed = [finding for finding in found if finding.verdict is Verdict.FAILED]
    start = start and not check
    boots = _BOOTED.is_dir()
    plan = steps.install(chosen, settings, program(), units=units, settings_text=written, start=start and boots)
    if not as_json:
        _show(found, chosen.capture, why)
    if not failed and not check:
        _carry_out(plan, dry_run=dry_run, quiet=as_json)
    if as_json:
        print(json.dumps(_facts(found, plan, chosen, why, done=not failed and not check and not dry_run)))
    if failed:
        raise PermanentError(
            f"{failed[0].what}: {failed[0].text}",
            hint=failed[0].hint or "mend that, and install again",
            what=failed[0].what,
        )
    if start and not boots and not dry_run:
        raise TransientError(
            "the unit is written, but no systemd runs here to start it",
            hint=f"run it by hand: `{program()} run --settings {settings}`; or --no-start if that is as it should be",
        )


def uninstall(
    settings: Settings = _SETTINGS,
    purge: Annotated[bool, typer.Option("--purge", help="Remove its state too: identity and change log.")] = False,
    dry_run: DryRun = False,
    units: Units = unit.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Stop the agent and take it off this machine; the disks stay as they are.

    Without --purge its state is kept, and an agent that is installed again goes on from it. Changes that were captured
    and not sent yet are in that state alone.
    """
    chosen = load_settings(settings)
    boots = _BOOTED.is_dir()
    _refuse_use(chosen)
    sockets = [address.path for address in chosen.addresses.values() if address.path is not None]
    plan = steps.uninstall(
        chosen, settings.absolute(), program(), units=units, leftovers=sockets, stop=boots, purge=purge
    )
    if not (boots and (units / unit.NAME).exists()):
        _refuse_running(chosen)
    _carry_out(plan, dry_run=dry_run, quiet=as_json)
    if as_json:
        print(json.dumps({"steps": [str(step) for step in plan], "done": not dry_run}))
    elif not dry_run:
        kept = "" if purge else f"; its state is kept in {chosen.directory}"
        print(f"The agent is gone from this machine, its disks are as they were{kept}.")


def program() -> Path:
    """The command that runs now, as a unit may name it."""
    return Path(sys.argv[0]).resolve()


def _settings(path: Path, disks: Sequence[str], directory: Path) -> tuple[Path, str | None, AgentSettings, str]:
    """The settings: those there are, or made of `disks`. Path, text to be written (None: none), values, and why so."""
    if path.exists():
        if disks:
            raise PermanentError(
                f"{path} is there already, and --disk would change it",
                hint="edit it, or leave --disk out",
                path=str(path),
            )
        return path, None, load_settings(path), "as the settings say"
    if not disks:
        return path, None, load_settings(path), ""  # says that they can't be read
    named = [_named(disk) for disk in disks]
    facts = [findings.disk_facts(name, target, directory / "log") for name, target in named]
    capture, why = findings.suggest(facts)
    lines = [f'directory = "{directory}"', f'capture = "{capture}"   # {why}']
    for name, target in named:
        lines += ["", "[[disks]]", f"name = {json.dumps(name)}", f"path = {json.dumps(str(target))}"]
    values = AgentSettings(
        directory=directory,
        capture=capture,
        disks=tuple(DiskSettings(name=name, path=target) for name, target in named),
    )
    return path, "\n".join(lines) + "\n", values, why


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise PermanentError(f"--disk {text!r} is not NAME=PATH", hint="for example: --disk data=/dev/sdb")
    return name, Path(path).absolute()


def _refuse_use(settings: AgentSettings) -> None:
    if settings.capture is not CaptureKind.INLINE:
        return
    used: list[tuple[str, object, int]] = [
        (name, address, clients.count(address)) for name, address in settings.addresses.items()
    ]
    used += [(name, file, clients.loop_devices(file)) for name, file in settings.files.items()]
    for name, where, number in used:
        if number:
            raise PermanentError(
                f"disk {name} has {number} client{'s' if number > 1 else ''} at {where}, who would lose it",
                hint="shut the machine or the file system that uses it down first",
                disk=name,
            )


def _refuse_running(settings: AgentSettings) -> None:
    if settings.directory.is_dir() and StateDirectory(settings.directory).is_running():
        raise PermanentError(
            f"an agent runs on {settings.directory}, and no unit of this machine's does it",
            hint="stop it (SIGTERM), and uninstall again",
            path=str(settings.directory),
        )


def _carry_out(plan: Sequence[Step], *, dry_run: bool, quiet: bool) -> None:
    if dry_run:
        for step in plan:
            if not quiet and not step.is_done():
                print(f"would {step}")
        return
    carry_out(plan, (lambda text: None) if quiet else print)


def _show(found: Sequence[Finding], capture: CaptureKind, why: str) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    signs = {Verdict.GOOD: "ok", Verdict.DOUBTFUL: "look", Verdict.FAILED: "FAILED"}
    for finding in found:
        text = f"{finding.text}; {finding.hint}" if finding.hint else finding.text
        table.add_row(signs[finding.verdict], finding.what, text)
    table.add_row("", "capture", f"{capture}: {why}")
    Console().print(table, soft_wrap=True)


def _facts(
    found: Sequence[Finding], plan: Sequence[Step], settings: AgentSettings, why: str, *, done: bool
) -> dict[str, Any]:
    return {
        "findings": [finding.as_dict() for finding in found],
        "capture": str(settings.capture),
        "capture_reason": why,
        "capabilities": list(unit.capabilities(settings)),
        "steps": [str(step) for step in plan],
        "done": done,
    }
