"""What the registry of a story's config server says, read beside it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from config_server import machines, parties, upkeep
from config_server.registry import Registry
from config_server.vault import REGISTRY_FILE, Vault
from replicar.control.keys import key_number
from replicar.control.messages import GroupPoint, Retention
from replicar.errors import PermanentError
from simulator.world import cast
from simulator.world.world import World


def machine_keys(world: World, machine: str) -> dict[int, bytes] | None:
    """The machine's key; None if it was never protected."""
    vault = Vault.load(world.machines[cast.CONFIG_SERVER].directory / "vault")
    with _registry(world) as registry:
        try:
            key = registry.run(
                lambda connection: machines.machine_key(connection, vault, parties.machine_named(connection, machine))
            )
        except PermanentError:
            return None
    return {key_number(key.key_id): key.data_key_bytes()}


def server_of(world: World, machine_id: uuid.UUID) -> uuid.UUID | None:
    """The process server that has the machine."""
    with _registry(world) as registry:
        return registry.run(lambda connection: machines.server_of(connection, machine_id))


def retention(world: World, machine_id: uuid.UUID) -> Retention | None:
    """What is left of the machine's past, as far as somebody told it; None: nobody said that anything was given up."""
    with _registry(world) as registry:
        return registry.run(lambda connection: upkeep.retention_of(connection, machine_id))


def group_points(world: World) -> list[GroupPoint]:
    """The groups that are points."""
    with _registry(world) as registry:
        rows = registry.run(
            lambda connection: connection.execute("SELECT point FROM group_points ORDER BY id").fetchall()
        )
    return [GroupPoint.from_json(row["point"].encode()) for row in rows]


@contextmanager
def _registry(world: World) -> Iterator[Registry]:
    registry = Registry(world.machines[cast.CONFIG_SERVER].directory / "vault" / REGISTRY_FILE)
    try:
        yield registry
    finally:
        registry.close()
