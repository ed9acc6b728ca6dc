"""A vault founded once and copied for each test, and a config server running on it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from config_server.foundation import found_vault
from replicar.control.identity import Identity, Role
from tests.config_server.support import Cast, House, SetClock, running


@pytest.fixture(scope="session")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vaults") / "vault"
    found_vault(directory, "demo", address="127.0.0.1:443", listen="127.0.0.1", port=443, clock=SetClock())
    return directory


@pytest.fixture
def vault_directory(founded: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "vault"
    shutil.copytree(founded, directory)
    return directory


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
async def house(vault_directory: Path, clock: SetClock) -> AsyncIterator[House]:
    async with running(vault_directory, clock) as house:
        yield house


@pytest.fixture
async def cast(house: House, tmp_path: Path) -> AsyncIterator[Cast]:
    async with AsyncExitStack() as stack:
        identities = (
            Identity.load(house.directory / "operator"),
            await house.enrol(tmp_path / "db1", "db1"),
            await house.enrol(tmp_path / "ps1", "ps1", Role.PROCESS_SERVER),
        )
        clients = [await stack.enter_async_context(house.client(identity)) for identity in identities]
        yield Cast(house, *clients)
