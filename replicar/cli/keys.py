"""`rotate-key` and `rewrap`: new keys for what is sealed from now on, and old ones wrapped anew where they lie."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich.console import Console

from replicar.cli.console import Json, Machine, SettingsFile, Telling, run
from replicar.cli.settings import load_settings
from replicar.control.keys import key_number
from replicar.control.messages import MachineKey
from replicar.errors import PermanentError, TransientError
from replicar.log import headers
from replicar.log.headers import Rewrapped
from replicar.storage.target import open_store

_GONE: Final = (409, 410)  # never protected, or destroyed: no key, so no header either


def rotate_key(machine: Machine, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Give a machine a new data key for all that is sealed from now on.

    Its process server begins a new run of log blobs under it. What was sealed before stays as it is and can be read:
    former keys are kept, in the registry and, wrapped, in the headers of the blobs that they sealed.
    """

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.rotate_key(machine)
        telling.result(
            found.model_dump(mode="json"),
            lambda console: console.print(f"{machine} has a new data key; its process server takes it up now."),
        )

    run(as_json, work)


def rewrap(
    machines: Annotated[list[str] | None, typer.Argument(help="Machines.  \\[default: all of the vault]")] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """After a rotation of the vault's key: put the newly wrapped data keys into the headers of all log and index blobs.

    The exit status is 0 only when no header is left that wants a former vault's key; until then, and for machines that
    were removed and are not named here, `config-server vault-key forget` would make data unreadable.
    """

    async def work(telling: Telling) -> None:
        loaded, found = load_settings(settings), {}
        async with loaded.control() as control, open_store(loaded.target()) as store:
            names = machines or [machine.name for machine in await control.machines()]
            for name in names:
                try:
                    key = await control.key(name)
                except PermanentError as error:
                    if machines is None and error.fields.get("status") in _GONE:
                        continue
                    raise
                found[name] = await headers.rewrap(store, key.machine_id, _wrapped(key))
        total = sum(found.values(), Rewrapped())
        if total.sealed:
            names = sorted(name for name, each in found.items() if each.sealed)
            raise PermanentError(
                f"{total.changed} headers were replaced, but {total.sealed} index blobs were written by an earlier "
                f"version, which sealed them with the form that they have; machines: {', '.join(names)}",
                hint="keep the former vault's key until folding (`replicar fold`) has replaced them all",
                **asdict(total),
            )
        if total.in_use or total.unknown:
            names = sorted(name for name, each in found.items() if each.in_use or each.unknown)
            raise TransientError(
                f"{total.changed} headers were replaced, but {total.in_use} belong to a writer that has not taken its "
                f"new key up, and {total.unknown} have a key that the config server does not know; machines: "
                f"{', '.join(names)}",
                hint="do it again when their process servers are up (`replicar status`)",
                **asdict(total),
            )
        telling.result({"machines": len(found), **asdict(total)}, lambda console: _show(console, len(found), total))

    run(as_json, work)


def _wrapped(key: MachineKey) -> dict[int, bytes]:
    pairs = [(key.key_id, key.wrapped_key), *((each.key_id, each.wrapped_key) for each in key.former_keys)]
    return {key_number(key_id): base64.b64decode(wrapped) for key_id, wrapped in pairs}


def _show(console: Console, machines: int, total: Rewrapped) -> None:
    console.print(
        f"{machines} machine(s): {total.changed} headers replaced, {total.current} were as they should be. "
        "No header wants a former vault's key any more."
    )
