"""`config-server`: make a vault, run its server, and make what admits others to it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from config_server import foundation, service, vault_key_cli
from config_server.exposed import PART
from config_server.operator_routes import software
from config_server.parties import moment
from config_server.registry import Registry
from config_server.settings import DEFAULT_DIRECTORY, Settings, load_settings
from config_server.vault import (
    OPERATOR_DIRECTORY,
    PASSPHRASE_FILE,
    REGISTRATION_FILE,
    REGISTRY_FILE,
    Vault,
)
from replicar.clock import SystemClock
from replicar.control.identity import Role
from replicar.control.messages import DEFAULT_PORT
from replicar.control.transport import parse_address
from replicar.errors import PermanentError, ReplicarError
from replicar.observe import logs

app = typer.Typer(
    name="config-server",
    help="""The config server of a Replicar vault: registry, certificate authority and API.

    First `init` makes a vault, then `run` serves it. Machines and process servers enrol with the vault's passphrase
    (`mobility-agent enrol`, `process-server enrol`); operators use the `replicar` command with the identity that `init`
    makes. Back the vault's directory up: without it, what is in storage can't be read.
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[
    Path | None,
    typer.Option(
        "--directory", "-d", help=f"The vault's directory.  [default: {DEFAULT_DIRECTORY}]", show_default=False
    ),
]
app.add_typer(vault_key_cli.app)
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings", help="TOML settings file.  [default: config-server.toml in the directory]", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@app.command()
def init(
    vault: Annotated[str, typer.Option("--vault", help="The vault's name, as operators will see it.")],
    directory: Directory = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port where the other parts reach it.  [default: this host's name]", show_default=False),
    ] = None,
    listen: Annotated[str, typer.Option(help="The local address to listen on.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[
        int | None,
        typer.Option(
            help=f"The port to listen on.  [default: the port of --address, or {DEFAULT_PORT}]",
            min=1,
            max=65535,
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a vault: its authority, keys, registry, passphrase, a registration key and an operator's identity."""
    place = (directory or load_settings().directory).absolute()
    if port is None:
        port = parse_address(address)[1] if address else DEFAULT_PORT
    address = address or f"{socket.getfqdn()}:{port}"
    made = foundation.found_vault(place, vault, address=address, listen=listen, port=port, clock=SystemClock())
    _tell(
        as_json,
        {
            "vault": made.name,
            "vault_id": str(made.id),
            "directory": str(place),
            "address": address,
            "passphrase_file": str(place / PASSPHRASE_FILE),
            "registration_key_file": str(place / REGISTRATION_FILE),
            "operator_identity": str(place / OPERATOR_DIRECTORY),
        },
        f"Vault {made.name} is in {place}; back it up, and guard the copy.\n"
        f"  passphrase             {place / PASSPHRASE_FILE} (for enrolling machines and process servers)\n"
        f"  registration key       {place / REGISTRATION_FILE} (for enrolling process servers, five days)\n"
        f"  operator's identity    {place / OPERATOR_DIRECTORY} (for the `replicar` command)\n"
        f"Parts will reach it at {address}; it will listen on {listen}:{port}.\n"
        f"Next: config-server run --directory {place}",
    )


@app.command("registration-key")
def registration_key(
    directory: Directory = None,
    settings: SettingsFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The file to write.  [default: registration.key in the directory]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a new registration key: it admits any number of process servers for five days. The server may be running."""
    loaded = load_settings(settings, directory=directory)
    vault = Vault.load(loaded.directory)
    file = (output or loaded.directory / REGISTRATION_FILE).absolute()
    registry = Registry(loaded.directory / REGISTRY_FILE)
    try:
        key = foundation.new_registration_key(vault, registry, file, SystemClock())
    finally:
        registry.close()
    expires = moment(key.expires_ns)
    _tell(
        as_json,
        {"registration_key_file": str(file), "key_id": key.key_id, "expires": expires},
        f"Registration key in {file}, good until {expires}.\nNext, on the process server: process-server enrol --help",
    )


@app.command()
def operator(
    name: Annotated[str, typer.Argument(help="The operator's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write the identity into.")],
    admin: Annotated[bool, typer.Option("--admin", help="One who may also let others in: `replicar token`.")] = False,
    directory: Directory = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Make an operator's identity, for the `replicar` command; doing it again for a name ends the former one."""
    _make_identity(Role.ADMIN if admin else Role.OPERATOR, name, output, directory, settings, as_json)


@app.command()
def auditor(
    name: Annotated[str, typer.Argument(help="The auditor's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write the identity into.")],
    directory: Directory = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Make an auditor's identity: `replicar verify` and whatever only looks, with keys, and nothing that changes.

    Give it a shared access signature that may read and list, and it can't write in storage either.
    """
    _make_identity(Role.AUDITOR, name, output, directory, settings, as_json)


def _make_identity(
    role: Role, name: str, output: Path, directory: Path | None, settings: Path | None, as_json: bool
) -> None:
    loaded = load_settings(settings, directory=directory)
    vault = Vault.load(loaded.directory)
    registry = Registry(loaded.directory / REGISTRY_FILE)
    try:
        identity = foundation.new_identity(
            vault, registry, role, name, output, address=_address(loaded), clock=SystemClock()
        )
    finally:
        registry.close()
    _tell(
        as_json,
        {f"{role}_identity": str(output.absolute()), "id": str(identity.id), "name": name},
        f"Identity of {role} {name} in {output.absolute()}.\nNext: replicar status --help",
    )


@app.command()
def run(
    directory: Directory = None,
    settings: SettingsFile = None,
    listen: Annotated[str | None, typer.Option(help="The local address to listen on.", show_default=False)] = None,
    port: Annotated[
        int | None,
        typer.Option(help="The port to listen on; 0: a free one.", min=0, max=65535, show_default=False),
    ] = None,
    heartbeat_seconds: Annotated[
        float | None, typer.Option(help="How often the parts report.", min=1, max=30, show_default=False)
    ] = None,
) -> None:
    """Serve the vault until SIGTERM or Ctrl-C.

    Every option can also be set in config-server.toml (`port = 8443`) or in the environment
    (`REPLICAR_CONFIG_SERVER_PORT=8443`); an option beats the environment, the environment beats the file.
    """
    loaded = load_settings(settings, directory=directory, listen=listen, port=port, heartbeat_seconds=heartbeat_seconds)
    logs.set_up(PART, loaded.log_format)
    asyncio.run(_serve(loaded))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"config-server {software()}")
        raise typer.Exit


async def _serve(settings: Settings) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        logs.announce(f"config-server: listening on {settings.listen}:{port}, vault in {settings.directory}")

    await service.run(settings, SystemClock(), stop, ready)


def _address(settings: Settings) -> str:
    if not settings.address:
        raise PermanentError(
            "the settings do not say where the other parts reach this config server",
            hint='set address = "host:port" in config-server.toml',
            setting="address",
        )
    return settings.address


def _tell(as_json: bool, result: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(result) if as_json else text)


def main() -> None:
    """The entry point: a `ReplicarError` becomes its message, its hint and its exit status."""
    try:
        app()
    except ReplicarError as error:
        if not logs.told(error):
            typer.echo(f"config-server: {error.message}", err=True)
            if error.hint:
                typer.echo(f"next: {error.hint}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
