"""`config-server vault-key`: rotate the vault's key, have Azure Key Vault hold it, forget former ones.

All of it is done while no config server runs on the vault, for one that runs has the keys in its memory. Replication
does not wait for that: agents and process servers go on without a config server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from config_server import data_keys
from config_server.registry import Registry
from config_server.service import lock
from config_server.settings import DEFAULT_DIRECTORY, load_settings
from config_server.vault import REGISTRY_FILE, VAULT_KEY_FILE, Vault
from replicar.control.vault_key import VaultKey

app = typer.Typer(
    name="vault-key",
    help="Rotate the vault's key, have Azure Key Vault hold it, or forget former ones; stop the config server first.",
    no_args_is_help=True,
)
Directory = Annotated[
    Path | None,
    typer.Option("--directory", "-d", help=f"The vault's directory.  [default: {DEFAULT_DIRECTORY}]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@app.command()
def rotate(directory: Directory = None, as_json: Json = False) -> None:
    """Make a new vault's key, and wrap every data key in the registry by it. Former ones are kept in vault.key.

    Back vault.key up again, start the config server, and run `replicar rewrap`.
    """
    _change(
        directory,
        as_json,
        lambda key: key.rotated(),
        "The vault has a new key. Next: back the vault's directory up, start the config server, then: replicar rewrap",
    )


@app.command()
def hold(
    key_vault_key: Annotated[
        str, typer.Option("--key-vault-key", help="The key that wraps it: https://NAME.vault.azure.net/keys/KEY")
    ],
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Have a key of Azure Key Vault (or a managed HSM) wrap the vault's key; vault.key alone opens nothing then.

    Uses this host's own Azure identity. Doing it again takes up the key's newest version. Plain copies of vault.key
    that exist elsewhere stay as good as they were: rotate after this, and forget the former key, to be rid of them.
    """
    _change(
        directory,
        as_json,
        lambda key: VaultKey(key.keys, key_vault_key),
        f"The vault's key is wrapped by {key_vault_key}. Next: remove plain copies of vault.key, "
        "and start the config server",
    )


@app.command()
def release(directory: Directory = None, as_json: Json = False) -> None:
    """Take the vault's key back from Azure Key Vault: vault.key holds it in plain again."""
    _change(directory, as_json, lambda key: VaultKey(key.keys), "vault.key holds the vault's key in plain.")


@app.command()
def forget(
    rewrapped: Annotated[
        bool,
        typer.Option("--headers-rewrapped", help="`replicar rewrap` ended well for every machine, removed ones too."),
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Destroy the vault's former keys. Wrapped keys of before, wherever copies of them lie, are useless then."""
    if not rewrapped:
        raise typer.BadParameter(
            "headers that want a former key would be lost: run `replicar rewrap`, then add --headers-rewrapped"
        )
    _change(
        directory, as_json, lambda key: key.present(), "The former keys are destroyed. Next: destroy backups of them"
    )


def _change(directory: Path | None, as_json: bool, change: Callable[[VaultKey], VaultKey], text: str) -> None:
    """The file first, with all keys that are still wanted; then the registry, which a start would mend as well."""
    place = (directory or load_settings().directory).absolute()
    with _alone(place):
        before = Vault.load(place)
        key = change(before.key)
        if len(key.keys) < len(before.key.keys):
            _wrap_anew(before)
        key.save(place / VAULT_KEY_FILE)
        _wrap_anew(Vault.load(place))
    facts = {"vault": before.name, "keys": len(key.keys), "held_by": key.held_by or None}
    typer.echo(json.dumps(facts) if as_json else text)


def _wrap_anew(vault: Vault) -> None:
    registry = Registry(vault.directory / REGISTRY_FILE)
    try:
        registry.run(lambda connection: data_keys.wrap_anew(connection, vault))
        registry.checkpoint()
    finally:
        registry.close()


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    descriptor = lock(directory)
    try:
        yield
    finally:
        os.close(descriptor)
