"""`recovery-worker`: enrol this host as one, and run it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from recovery.worker.exposed import PART
from recovery.worker.service import Worker
from recovery.worker.settings import DEFAULT_IDENTITY, WorkerSettings, load_settings
from replicar.clock import SystemClock
from replicar.control.enrolment import RegistrationKey, enrol, read_passphrase
from replicar.control.identity import Role
from replicar.errors import ReplicarError
from replicar.observe import logs

app = typer.Typer(
    name="recovery-worker",
    help="""The hands of a Replicar vault: carries out drills, failovers and failbacks that operators ask for,
    and folds machines' logs by the clock.

    First `enrol` it with the vault's passphrase and a registration key, then `run` it with a settings file that names
    the storage account.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command("enrol")
def enrol_command(
    config_server: Annotated[str, typer.Option(help="The config server, as host:port.")],
    registration_key_file: Annotated[
        Path, typer.Option(help="The key made by `config-server registration-key`, good for five days; mode 0600.")
    ],
    passphrase_file: Annotated[Path, typer.Option(help="A file with the vault's passphrase; mode 0600.")],
    name: Annotated[str, typer.Option(help="What operators call this worker.")],
    directory: Annotated[
        Path, typer.Option("--directory", "-d", help="Where its identity is to be.")
    ] = DEFAULT_IDENTITY,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Make this host a recovery worker of the vault; enrolling a name again keeps its id."""
    identity = asyncio.run(
        enrol(
            config_server=config_server,
            role=Role.RECOVERY,
            name=name,
            passphrase=read_passphrase(passphrase_file),
            directory=directory,
            registration_key=RegistrationKey.load(registration_key_file),
        )
    )
    facts = {"id": str(identity.id), "name": name, "vault": identity.vault, "directory": str(directory.absolute())}
    text = f"Recovery worker {name} of vault {identity.vault} is enrolled; its identity is in {directory.absolute()}."
    typer.echo(json.dumps(facts) if as_json else text)


@app.command()
def run(
    settings: Annotated[
        Path | None, typer.Option("--settings", "-s", help="TOML settings file.", show_default=False)
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Carry out the jobs that wait, then end.")] = False,
) -> None:
    """Carry out jobs until SIGTERM or Ctrl-C, and keep machines' logs indexed and thinned by their policies meanwhile.

        \b
        A settings file:
          identity = "/var/lib/replicar/worker"        # where `enrol` put it
          directory = "/var/lib/replicar/recovered"    # machines, overlays, evidence
          accelerator = "tcg"                          # "kvm" where this host has it
      fold_seconds = 900                           # how often logs are indexed and thinned; 0: not by this worker
    replica_seconds = 30                         # how often warm replicas are brought on; 0: not by this worker
          [storage]                                    # as a process server's
          endpoint = "https://NAME.blob.core.windows.net"
          account_name = "NAME"
          account_key_file = "/etc/replicar/account.key"
          container = "replicar"

        The environment overrides it: REPLICAR_WORKER_DIRECTORY=/srv/recovered.
    """
    loaded = load_settings(settings)
    logs.set_up(PART, loaded.log_format)
    asyncio.run(_work(loaded, settings, once))


async def _work(settings: WorkerSettings, file: Path | None, once: bool) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logs.announce(f"recovery-worker: at work, in {settings.directory}")
    await Worker(settings, file, SystemClock()).run(stop, once=once)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"recovery-worker {version('replicar')}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one sentence, a hint, and an exit status."""
    try:
        app()
    except ReplicarError as error:
        if not logs.told(error):
            typer.echo(f"recovery-worker: {error}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
