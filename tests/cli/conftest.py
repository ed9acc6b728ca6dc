"""An operator with a settings file, a running config server, and a machine whose log is in a real Azurite."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from replicar.cli import app
from replicar.control.keys import key_number
from replicar.storage import PageBlobStore, StorageTarget, open_store
from simulator.azurite import Azurite
from tests.config_server.conftest import cast, clock, founded, house, protected, vault_directory, worker
from tests.config_server.support import Cast
from tests.recovery.log_builder import LogBuilder

__all__ = ["cast", "clock", "founded", "house", "protected", "vault_directory", "worker"]

SECTOR = 512
SIZES = (300 * SECTOR, 40 * SECTOR)


@dataclass
class Ended:
    """What a run of the command came to."""

    status: int
    output: str
    errors: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.output)
        assert isinstance(value, dict)
        return value


@dataclass
class Operator:
    """Runs `replicar` with a settings file, in a thread, since the servers it speaks to run in this process."""

    settings: Path
    environment: dict[str, str | None]

    async def __call__(self, *arguments: object) -> Ended:
        words = [str(argument) for argument in arguments]
        environment = {"REPLICAR_SETTINGS": str(self.settings), **self.environment}
        result = await asyncio.to_thread(CliRunner().invoke, app, words, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)


@dataclass
class Stored:
    """The machine db1: registered, and with a log of eight segments, of which all are reported as stored."""

    cast: Cast
    builder: LogBuilder
    target: StorageTarget
    points: dict[str, int]


def operator_settings(cast: Cast, directory: Path, storage: str = "", identity: Path | None = None) -> Operator:
    """An operator whose settings file is in `directory`."""
    identity = identity or cast.house.directory / "operator"
    settings = directory / "replicar.toml"
    settings.write_text(f'identity = "{identity}"\nconfig_server = "{cast.house.address}"\n{storage}')
    return Operator(settings, {"XDG_CONFIG_HOME": str(directory / "config"), "COLUMNS": "200"})


@pytest.fixture
def target(azurite: Azurite, container_name: str) -> StorageTarget:
    fields = {
        "endpoint": azurite.blob_endpoint,
        "account_name": azurite.account_name,
        "account_key": azurite.account_key,
        "authority_file": azurite.authority_file,
        "container": container_name,
    }
    return StorageTarget.model_validate(fields)


@pytest.fixture
async def store(target: StorageTarget) -> AsyncIterator[PageBlobStore]:
    async with open_store(target) as opened:
        await opened.ensure_container()
        yield opened


@pytest.fixture
def operator(cast: Cast, azurite: Azurite, container_name: str, tmp_path: Path) -> Operator:
    key_file = tmp_path / "account.key"
    key_file.touch(mode=0o600)
    key_file.write_text(azurite.account_key)
    key_file.chmod(0o600)
    storage = (
        "[storage]\n"
        f'endpoint = "{azurite.blob_endpoint}"\n'
        f'account_name = "{azurite.account_name}"\n'
        f'account_key_file = "{key_file}"\n'
        f'authority_file = "{azurite.authority_file}"\n'
        f'container = "{container_name}"\n'
    )
    return operator_settings(cast, tmp_path, storage)


@pytest.fixture
async def stored(cast: Cast, store: PageBlobStore, target: StorageTarget) -> Stored:
    await cast.protect()
    instructions = await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    (assignment,) = instructions.assignments
    builder = LogBuilder(
        store,
        machine_id=cast.machine_id,
        key=assignment.data_key_bytes(),
        key_id=key_number(assignment.key_id),
        wrapped_key=base64.b64decode(assignment.wrapped_key),
        stripe_count=2,
        blob_bytes=1 << 20,
    )
    random_ = random.Random(3)
    points = {"start": builder.begin(*SIZES)}
    for number in range(8):
        for _ in range(6):
            builder.write(0, random_.randrange(290) * SECTOR, os.urandom(10 * SECTOR))
        builder.write(1, number * SECTOR, os.urandom(SECTOR))
        builder.zero(0, number * SECTOR, SECTOR)
        points[f"point-{number}"] = builder.mark(f"point-{number}")
        await builder.seal()
    await cast.report_stored(
        builder.sequence - 1, stored_segment=builder.number - 1, stored_digest=builder.previous.hex()
    )
    return Stored(cast, builder, target, points)
