"""`process-server`: enrol this host as a process server, run it, and see how it is."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from process_server.exposed import PART
from process_server.health import load_status
from process_server.service import ProcessServer
from process_server.settings import DEFAULT_DIRECTORY, Settings, load_settings
from process_server.watermarks import Level
from replicar.clock import SystemClock
from replicar.control.enrolment import RegistrationKey, enrol, read_passphrase
from replicar.control.identity import Role
from replicar.errors import ReplicarError
from replicar.memory import collect_rarely, keep_memory
from replicar.observe import logs
from replicar.signals import Level as Health

app = typer.Typer(
    name="process-server",
    help="""The process server of a Replicar vault: receives machines' changes and stores them, sealed, as page blobs.

    First `enrol` it with the vault's passphrase and a registration key (`config-server registration-key`), then `run`
    it with a settings file that names the storage account. Storage credentials stay on this host.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # brackets in the settings shown are TOML
    pretty_exceptions_enable=False,
)

#: A server says how it is every second; older than this, it does not run.
STALE_SECONDS: Final = 10.0

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@app.command("enrol")
def enrol_command(
    config_server: Annotated[str, typer.Option(help="The config server, as host:port.")],
    registration_key_file: Annotated[
        Path, typer.Option(help="The key made by `config-server registration-key`, good for five days; mode 0600.")
    ],
    passphrase_file: Annotated[Path, typer.Option(help="A file with the vault's passphrase; mode 0600.")],
    name: Annotated[str, typer.Option(help="What operators call this process server.")],
    directory: Annotated[
        Path, typer.Option("--directory", "-d", help="Where its identity, cache and state are to be.")
    ] = DEFAULT_DIRECTORY,
    as_json: Json = False,
) -> None:
    """Make this host a process server of the vault; enrolling a name again keeps its id."""
    identity = asyncio.run(
        enrol(
            config_server=config_server,
            role=Role.PROCESS_SERVER,
            name=name,
            passphrase=read_passphrase(passphrase_file),
            directory=directory,
            registration_key=RegistrationKey.load(registration_key_file),
        )
    )
    facts = {"id": str(identity.id), "name": name, "vault": identity.vault, "directory": str(directory.absolute())}
    _tell(
        as_json,
        facts,
        f"Process server {name} of vault {identity.vault} is enrolled; its identity is in {directory.absolute()}.\n"
        "Next: write a settings file that names the storage account, then process-server run --settings FILE\n"
        "(process-server run --help shows one).",
    )


@app.command()
def run(
    settings: Annotated[
        Path | None, typer.Option("--settings", "-s", help="TOML settings file.", show_default=False)
    ] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    \b
    A settings file needs no more than:
      directory = "/var/lib/replicar/process-server"   # where `enrol` put the identity
      [storage]
      endpoint = "https://NAME.blob.core.windows.net"
      account_name = "NAME"
      account_key_file = "/etc/replicar/account.key"   # or shared_access_signature_file
      container = "replicar"

    \b
    and may say (defaults shown):
      port = 9443                  listen_host = "0.0.0.0"      advertise_host = ""  # this host's name
      cache_bytes = 17179869184    buffers_bytes = 268435456    compression_level = 1
      segment_age_seconds = 0.2    uploads_per_machine = 4      heartbeat_seconds = 10
      log_stripes = 8              log_blob_bytes = 4294967296
      metrics_listen = ""          # where Prometheus may ask: a port of this machine, or host:port
      log_format = "text"          # or "json": one object a line

    \b
    At the end of the file, if wanted:
      [bandwidth]                  # what is uploaded; windows in this host's local time
      bytes_per_second = 0         # outside all windows; 0: no limit
      [[bandwidth.windows]]        # the first that applies counts
      days = ["monday", "tuesday", "wednesday", "thursday", "friday"]
      start = "08:00"
      end = "18:00"
      bytes_per_second = 5000000
      [weights]                    # shares of cache and uploads, by machine; 1 for the others
      shop = 4

    The environment overrides it: REPLICAR_PS_PORT=9444, REPLICAR_PS_STORAGE__CONTAINER=other.
    """
    loaded = load_settings(settings)
    logs.set_up(PART, loaded.log_format)
    keep_memory()
    collect_rarely()
    with asyncio.Runner(loop_factory=_fast_loop) as runner:
        runner.run(_serve(loaded))


@app.command()
def status(
    directory: Annotated[
        Path, typer.Option("--directory", "-d", help="The process server's directory.")
    ] = DEFAULT_DIRECTORY,
    as_json: Json = False,
) -> None:
    """Show how the process server in a directory is; it writes this down every second while it runs.

    The exit status is 1 when it last did so more than ten seconds ago: then it does not run.
    """
    facts = load_status(directory)
    age_seconds = (SystemClock().now_ns() - facts["time_ns"]) / 1e9
    facts["age_seconds"] = round(age_seconds, 1)
    facts["alive"] = age_seconds <= STALE_SECONDS
    lines = _lines(facts)
    if not facts["alive"]:
        lines.insert(0, f"NOT RUNNING: this is how it was {age_seconds:,.0f} s ago")
    _tell(as_json, facts, "\n".join(lines))
    if not facts["alive"]:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"process-server {version('replicar')}")
        raise typer.Exit


async def _serve(settings: Settings) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        logs.announce(f"process-server: listening on {settings.listen_host}:{port}, state in {settings.directory}")

    await ProcessServer(settings, SystemClock()).run(stop, ready)


def _fast_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one: it moves a byte for about half of what asyncio's own loop takes."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _lines(facts: dict[str, Any]) -> list[str]:
    written = datetime.fromtimestamp(facts["time_ns"] / 1e9, UTC)
    used = facts["cache_bytes"] - facts["cache_bytes_free"]
    lines = [
        f"written {written:%Y-%m-%d %H:%M:%S} UTC",
        f"agents reach it at {facts['host']}:{facts['port']}",
        f"cache: {used:,} of {facts['cache_bytes']:,} bytes in use{_fullness(facts['cache_level'])}",
    ]
    lines += [
        f"{signal['level']}: {signal['cause']}; {signal['hint']}"
        for signal in facts.get("signals", ())
        if signal["level"] != Health.HEALTHY
    ]
    if facts["upload_limit"] is not None:
        lines.append(f"uploads: limited to {facts['upload_limit']:,} bytes a second at this hour")
    if facts.get("compression_level") is not None:
        lines.append(f"compression: level {facts['compression_level']} just now")
    lines += [f"{part}: {error['message']}; {error['hint']}" for part, error in facts["errors"].items()]
    for machine in facts["machines"]:
        counters = machine["counters"]
        lines.append(
            f"machine {machine['name']}: {machine['state']}, {'connected' if machine['connected'] else 'not connected'}"
            f", received up to {machine['received_sequence']}, stored up to {machine['stored_sequence']}"
            f" (segment {machine['stored_segment']}), {machine['pending_bytes']:,} bytes pending,"
            f" {counters['resends']} repeats asked for"
        )
        if machine["error"] is not None:
            lines.append(f"    {machine['error']['message']}; {machine['error']['hint']}")
    return lines


def _fullness(level: str) -> str:
    """What the cache's level means, for whoever reads it; nothing while all is well."""
    return {
        Level.WARNING: "; less than 30 % is free: storage is slower than what comes in",
        Level.CRITICAL: "; less than 25 % is free: storage is slower than what comes in, or away",
        Level.THROTTLED: "; less than 20 % is free, and receiving is throttled: storage is away, or too slow",
    }.get(Level(level), "")


def _tell(as_json: bool, facts: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(facts) if as_json else text)


def main() -> None:
    """Entry point: errors become one sentence, a hint, and an exit status."""
    try:
        app()
    except ReplicarError as error:
        if not logs.told(error):
            typer.echo(f"process-server: {error}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
