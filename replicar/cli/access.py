"""A machine's log and what opens it.

Usually the config server gives the data key, and says how far the log must reach. With the vault's key in a file it is
not needed at all: every log blob carries the data key wrapped by that key. Then nobody says how far the log must reach,
so a log that was cut off at its end looks like one that ends there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from recovery.chunks import MachineLog
from replicar.cli.settings import OperatorSettings
from replicar.control.keys import data_keys
from replicar.control.messages import PointList
from replicar.control.vault_key import VaultKey
from replicar.errors import CorruptionError, PermanentError
from replicar.log.index import list_index, read_index_header
from replicar.log.reader import LogReader
from replicar.storage.store import PageBlobStore
from replicar.storage.target import open_store

VaultKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--vault-key-file",
        help="Do without the config server: the vault's key (vault.key of its directory). Needs --machine-id.",
        show_default=False,
    ),
]
MachineId = Annotated[
    uuid.UUID | None,
    typer.Option("--machine-id", help="The machine's id, when the config server is not asked.", show_default=False),
]


@dataclass(frozen=True, slots=True)
class Access:
    """An opened log; `stored_number` and `stored_digest` are those of the segment last reported as stored, if known.

    `quiet`: a sequence, and an instant up to which the machine says that it captured nothing behind it. `points` asks
    the config server what is offered; None where that is not used.
    """

    log: MachineLog
    stored_number: int = 0
    stored_digest: bytes | None = None
    quiet: tuple[int, int] | None = None
    points: Callable[[], Awaitable[PointList]] | None = None


@asynccontextmanager
async def open_machine(
    settings: OperatorSettings, machine: str, *, vault_key_file: Path | None, machine_id: uuid.UUID | None
) -> AsyncIterator[Access]:
    """The machine's log in storage, with its keys.

    Raises:
        PermanentError: an unknown machine, settings that are not there, a container that is not, a key that does not
            fit.
        TransientError: config server or storage are away.
    """
    target = settings.target()
    if vault_key_file is None:
        async with settings.control() as control:
            key = await control.key(machine)
        keys = data_keys(key)
        async with open_store(target) as store:
            digest = bytes.fromhex(key.stored_digest) or None
            asking = partial(_points, settings, machine)
            log = MachineLog(store, key.machine_id, keys)
            yield Access(log, key.stored_segment or 0, digest, key.quiet, asking)
        return
    if machine_id is None:
        raise PermanentError(
            "without the config server a machine is known by its id only",
            hint="add --machine-id; the names under machines/ in the container are the ids there are",
        )
    vault_key = await asyncio.to_thread(VaultKey.read, vault_key_file, hint="give the copy that was kept of vault.key")
    async with open_store(target) as store:
        yield Access(MachineLog(store, machine_id, await _unwrapped(store, machine_id, vault_key, vault_key_file)))


async def _points(settings: OperatorSettings, machine: str) -> PointList:
    async with settings.control() as control:
        return await control.points(machine)


async def _unwrapped(store: PageBlobStore, machine_id: uuid.UUID, vault_key: VaultKey, path: Path) -> dict[int, bytes]:
    """The data keys in the headers of runs and index. Of one key there may be several wrapped forms; any will do."""
    keys: dict[int, bytes] = {}
    unopened: set[int] = set()
    for run in await LogReader(store, machine_id, {}).runs():
        header = run.header
        try:
            keys[header.key_id] = vault_key.unwrap(header.wrapped_key)
        except CorruptionError:
            unopened.add(header.key_id)
    index = await list_index(store, machine_id)
    for name in index.sizes if index.folds else ():  # of a log that was folded, a key may be left there alone
        entry = await read_index_header(store, name)
        if entry is not None and entry.key_id not in keys:
            try:
                keys[entry.key_id] = vault_key.unwrap(entry.wrapped_key)
            except CorruptionError:
                unopened.add(entry.key_id)
    if unopened - keys.keys():
        raise PermanentError(
            f"the vault's key in {path} does not open the data key of machine {machine_id}",
            hint="it must be the key of the vault that the machine was enrolled with, from after its last rotation",
            path=str(path),
        )
    return keys
