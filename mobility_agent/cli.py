"""`mobility-agent`: enrol this machine, run its agent, ask how it is."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from mobility_agent.capture.fuse import session
from mobility_agent.capture.trace import tracefs
from mobility_agent.capture.trace.freeze import thaw_all
from mobility_agent.capture.trace.tracked import BlockDevice
from mobility_agent.exposed import PART
from mobility_agent.hooks import Hooks
from mobility_agent.install import cli as install_cli
from mobility_agent.running import Running
from mobility_agent.settings import SETTINGS_VARIABLE, CaptureKind, load_settings
from mobility_agent.state import StateDirectory
from replicar.control.enrolment import enrol as enrol_with, read_passphrase
from replicar.control.identity import Role
from replicar.errors import PermanentError, ReplicarError
from replicar.observe import logs

#: A status older than this is no status of now.
STALE_SECONDS: Final = 10.0

_T = TypeVar("_T")

app = typer.Typer(
    name="mobility-agent",
    help="Replicates this machine's disks, write by write. First `enrol` the machine, then `run` the agent.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Directory = Annotated[
    Path, typer.Option("--directory", "-d", help="The agent's state directory, as in its settings.", file_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mobility-agent {metadata.version('replicar')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def enrol(
    config_server: Annotated[str, typer.Option(help="Where the config server is: host:port.", metavar="HOST:PORT")],
    passphrase_file: Annotated[
        Path, typer.Option(help="A copy of the vault's file `passphrase`, mode 0600.", dir_okay=False)
    ],
    directory: Directory,
    name: Annotated[str, typer.Option(help="What the operator calls this machine.")],
    as_json: Json = False,
) -> None:
    """Make this machine known to the vault, and keep its identity in DIRECTORY/identity.

    A name that is known already is enrolled again: it keeps its points, and is compared in full at the next start.
    """
    with StateDirectory(directory) as state:
        identity = _run(
            lambda: enrol_with(
                config_server=config_server,
                role=Role.MACHINE,
                name=name,
                passphrase=read_passphrase(passphrase_file),
                directory=state.identity,
            )
        )
    if as_json:
        facts = {"machine": identity.name, "machine_id": str(identity.id), "vault": identity.vault}
        print(json.dumps({**facts, "incarnation": identity.incarnation, "directory": str(directory)}))
    else:
        print(f"Enrolled {identity.name} ({identity.id}) with the vault {identity.vault}.")
        print("Next: write the agent's settings, `mobility-agent run --settings FILE`; then `replicar protect` it.")


@app.command()
def run(
    settings: Annotated[
        Path, typer.Option("--settings", "-s", envvar=SETTINGS_VARIABLE, help="The settings, a TOML file.")
    ] = Path("/etc/replicar/agent.toml"),
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Serve the disks over NBD (or follow them) and replicate what is written to them, until SIGTERM.

    SIGHUP has the settings read again: disks may be added, removed, or have grown.

    Settings (any of them also as REPLICAR_AGENT_<NAME> in the environment):

    directory = "/var/lib/replicar"   state: identity, change log

    journal_bytes = "4 GiB"   the change log's limit

    audit_bytes_per_second = "4 MiB"   how fast the disks are read again to prove the copy; 0: not at all

    copy_free_space = true   false: what file systems have free comes back as zeros and is not sent (inline capture)

    mark_every_seconds = 300   how often a recovery point is named by itself; 0: never
    capture = "inline"   or "trace": follow mounted block devices where they are; freeze_budget_seconds = 0.5;
    or "scan": read the disks over and over; scan_every_seconds = 60

    journal_file_bytes, seed_bytes_per_second, rate_limit_bytes_per_second, seal_delay_seconds, heartbeat_seconds

    metrics_listen = ""   where Prometheus may ask: a port of this machine, or host:port

    log_format = "text"   or "json": one object a line

    application, a table with hooks (a directory), hook_timeout_seconds, mark_every_seconds: application-consistent
    points

    nbd_tls, a table with certificate, key and authority: then nbd addresses may lead off this machine

    and for each disk a table [[disks]] with name, path, and nbd (a socket path, or host:port on this machine) or file
    (a path that the disk is shown as, to put a loop device on) or both
    """
    chosen = load_settings(settings)
    logs.set_up(PART, chosen.log_format, level=logging.DEBUG if verbose else logging.INFO)
    _run(lambda: Running(settings, chosen).run())


@app.command()
def thaw(
    settings: Annotated[
        Path, typer.Option("--settings", "-s", envvar=SETTINGS_VARIABLE, help="The agent's settings, a TOML file.")
    ] = Path("/etc/replicar/agent.toml"),
) -> None:
    """Thaw file systems that a traced machine's agent left frozen. For the unit's ExecStopPost; harmless otherwise.

    An agent that dies is followed by a guard that thaws. Only if both are killed at one instant is anything left. What
    a killed agent left in the tracing file system is removed too.
    """
    chosen = load_settings(settings)
    for disk in chosen.disks:
        if disk.path.is_block_device():
            for mountpoint in thaw_all(BlockDevice(disk.path).family()):
                print(f"thawed {mountpoint}")
    if chosen.application is not None:
        hooks = Hooks(
            chosen.application.hooks,
            StateDirectory(chosen.directory).hooks,
            timeout_seconds=chosen.application.hook_timeout_seconds,
        )
        _run(hooks.recover)
    if chosen.capture is CaptureKind.TRACE:
        with suppress(PermanentError):  # without a tracing file system nothing can have been left in one
            tracefs.remove_stale()


@app.command()
def release(directory: Directory, as_json: Json = False) -> None:
    """Take away the files of disks that are in use while no agent runs: their users get errors, and wait no longer."""
    state = StateDirectory(directory)
    if state.is_running():
        raise PermanentError(
            f"an agent runs on {directory}, and serves those files",
            hint="unmount what is on them, then stop the agent: it takes them away itself",
            path=str(directory),
        )
    released = [str(path) for path in session.release(state.keepers)]
    if as_json:
        print(json.dumps({"released": released}))
    else:
        print(f"Released {', '.join(released)}." if released else "No file is left.")


@app.command()
def status(directory: Directory, as_json: Json = False) -> None:
    """Show how replication stands. Exit status 0 only if the agent runs and says so."""
    if not directory.is_dir():
        raise PermanentError(
            f"there is no directory {directory}",
            hint="give the `directory` of the agent's settings",
            path=str(directory),
        )
    state = StateDirectory(directory)
    facts = state.load_status()
    age = max(time.time_ns() - int(facts.get("time_ns", 0)), 0) / 1e9
    if not state.is_running() or age > STALE_SECONDS:
        raise PermanentError(
            f"no agent runs on {directory}" if not state.is_running() else f"the agent on {directory} hangs",
            hint=f"its last word is {age:.0f} s old; start it with `mobility-agent run`, and see its log",
            path=str(directory),
            status=facts,
        )
    if as_json:
        print(json.dumps(facts))
    else:
        _show(facts)


install_cli.add(app)


def _show(facts: dict[str, Any]) -> None:
    console = Console()
    sender, control = facts["sender"], facts["config_server"]
    table = Table(show_header=False, box=None, pad_edge=False)
    behind = facts["captured_sequence"] - facts["stored_sequence"]
    capture = facts["capture"]
    traced = capture["kind"] == "trace"
    rows = [
        ("machine", f"{facts['machine']} ({facts['machine_id']})"),
        ("state", facts["state"] + (" (inside a gap: no points)" if facts["in_gap"] and not traced else "")),
        ("process server", f"{sender['server'] or 'none assigned'}, {sender['state']}"),
        (
            "RPO",
            f"{facts['rpo_seconds']:.2f} s now, p50 {facts['rpo_p50_seconds']:.2f} s, p99 "
            f"{facts['rpo_p99_seconds']:.2f} s over ten minutes",
        ),
        ("behind", f"{behind:,} changes not in storage"),
        ("journal", _journal(facts)),
        ("audit", _audit(facts)),
        ("captured", f"{_size(facts['bytes_captured'])} since the agent started, sent {_size(facts['bytes_sent'])}"),
    ]
    for disk in facts["disks"]:
        done = 100.0 * (1 - disk["dirty_bytes"] / disk["size_bytes"])
        where = disk["path"] if traced else " and ".join(filter(None, (disk["nbd"], disk.get("file"))))
        rows.append((f"disk {disk['name']}", f"{_size(disk['size_bytes'])}, {done:.1f} % replicated, at {where}"))
        if disk.get("grown_bytes"):
            text = f"by {_size(disk['grown_bytes'])}, which are not replicated yet: reload the agent (SIGHUP)"
            rows.append((f"disk {disk['name']} has grown", text))
    if traced:
        rows += _trace_rows(capture)
    if facts.get("application") is not None:
        rows += _application_rows(facts["application"])
    for what, error in (("not sending", sender["error"]), ("config server", control["error"])):
        if error is not None:
            rows.append((what, f"{error['message']}; {error['hint']}" if error["hint"] else error["message"]))
    for name, text in rows:
        table.add_row(name, text)
    console.print(table, soft_wrap=True)


def _journal(facts: dict[str, Any]) -> str:
    text = f"{_size(facts['journal_used_bytes'])} of {_size(facts['journal_limit_bytes'])}"
    full, left = facts.get("journal_full_seconds"), facts.get("copy_remaining_seconds")
    if full is not None:
        text += f", full in about {timedelta(seconds=round(full))} if it goes on so"
    if left:
        text += f"; all is copied in about {timedelta(seconds=round(left))}"
    return text


def _audit(facts: dict[str, Any]) -> str:
    audit = facts.get("audit")
    if audit is None:
        return "off"
    done = 100.0 * audit["done_bytes"] / max(audit["total_bytes"], 1)
    text = f"{done:.1f} % of this round, {_size(audit['bytes_per_second'])}/s"
    if audit["last_ended_ns"] is None:
        return f"{text}; no round was completed yet"
    age = max(facts["time_ns"] - audit["last_ended_ns"], 0) / 3.6e12
    left_out = f", {_size(audit['last_skipped_bytes'])} left out" if audit["last_skipped_bytes"] else ""
    return f"{text}; the last whole round ended {age:.1f} h ago{left_out}"


def _application_rows(application: dict[str, Any]) -> list[tuple[str, str]]:
    last, longest = application["last_pause_seconds"], application["longest_pause_seconds"]
    text = "no point yet: `replicar tag --application` makes one"
    if last is not None:
        text = f"applications were held for {last * 1000:.0f} ms at the last point, {longest * 1000:.0f} ms at most"
    rows = [("applications", text)]
    return [*rows, ("MAY BE HELD STILL", application["trouble"])] if application["trouble"] else rows


def _trace_rows(capture: dict[str, Any]) -> list[tuple[str, str]]:
    points = "none yet: `replicar tag` makes one"
    if capture["points"]:
        last, longest = capture["last_freeze_seconds"] * 1000, capture["longest_freeze_seconds"] * 1000
        held = f"writers were held {last:.0f} ms at the last, {longest:.0f} ms at most"
        points = f"{capture['points']} since the agent started; {held}"
    rows = [
        ("capture", f"trace, {capture['method']}: {capture['reason']}"),
        ("to copy", f"{_size(capture['dirty_bytes'])}" + ("" if capture["is_whole"] else " (the disks in full)")),
        ("points", f"{points}; nothing in between can be recovered"),
    ]
    if capture["refused"]:
        rows.append(("last refusal", capture["refused"]))
    return rows


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _run(main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run on uvloop, which halves the cost of TLS, or on asyncio's own loop where it is missing."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop


def main() -> None:
    """The command's entry point: an error ends it with a message, the next step, and the error's exit status."""
    try:
        app()
    except ReplicarError as error:
        if logs.told(error):
            pass
        elif "--json" in sys.argv[1:]:
            print(json.dumps(error.as_dict()))
        else:
            print(f"error: {error.message}", file=sys.stderr)
            if error.hint:
                print(f"next step: {error.hint}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
