"""The operator's command put together: sub-commands, version, entry point."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from replicar.cli import (
    access_tokens,
    arrangements,
    circle,
    export,
    jobs,
    keys,
    mount,
    plans,
    protection,
    recover,
    replica,
    rescue,
    storage,
    vault,
    verify,
)
from replicar.cli.console import Json

app = typer.Typer(
    name="replicar",
    help="""Replicar: machines' disks replicated into Azure page blobs, and recovered to any point.

    This is the operator's command. It speaks to the config server with the identity that `config-server init` made;
    `recover`, `export` and `verify` also read the storage account. Both are set in ~/.config/replicar/replicar.toml:

    \b
        identity = "/var/lib/replicar/vault/operator"
        \\[storage]
        endpoint = "https://NAME.blob.core.windows.net"
        account_name = "NAME"
        account_key_file = "/etc/replicar/account.key"
        container = "replicar"

    To see everything at work on this machine: replicar demo
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    vault.status,
    vault.machines,
    vault.protect,
    protection.move,
    protection.remove,
    vault.points,
    vault.tag,
    recover.recover,
    export.export,
    mount.mount,
    mount.unmount,
    verify.verify,
    storage.storage,
    storage.fold,
    rescue.rescue,
    keys.rotate_key,
    keys.rewrap,
):
    app.command()(command)
for step in circle.COMMANDS:
    app.command()(step)
app.command()(arrangements.alerts)
app.command()(access_tokens.audit)
for group in (access_tokens.app, jobs.app, plans.app, replica.app, arrangements.policy_app, arrangements.target_app):
    app.add_typer(group)


@app.command()
def demo(
    directory: Annotated[
        Path | None,
        typer.Option(help="Where the demo makes its own directory.  \\[default: the system's]", show_default=False),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave that directory, with its logs.")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole story on this machine, without root: protect, tag, break, recover, verify."""
    from simulator.demo import run  # only here: the simulator is no part of what an operator's machine needs

    raise typer.Exit(run(json_output=as_json, directory=directory, keep=keep))


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        try:
            typer.echo(f"replicar {version('replicar')}")
        except PackageNotFoundError:
            typer.echo("replicar (not installed)")
        raise typer.Exit


def main() -> None:
    """The entry point."""
    app()
