"""A vault founded once and copied for each test, a config server running on it, and those who speak to it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from config_server.foundation import found_vault
from replicar.control.identity import Identity, Role
from replicar.control.messages import GapReport, MarkReport, TargetSettings
from replicar.formats.record import Consistency
from tests.config_server.script import Script
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


@pytest.fixture
async def worker(cast: Cast, tmp_path: Path) -> AsyncIterator[Script]:
    identity = await cast.house.enrol(tmp_path / "recovery", "rw1", Role.RECOVERY)
    async with cast.house.client(identity) as client:
        yield Script(client)


@pytest.fixture
async def protected(cast: Cast) -> Cast:
    """db1 with two points in storage, and one in a gap."""
    await cast.protect()
    await cast.operator.set_target("db1", TargetSettings(compute="qemu"), base_version=0)
    marks = (
        MarkReport(name="noon", sequence=50, time_ns=1_000),
        MarkReport(name="app", kind=Consistency.APPLICATION, sequence=60, time_ns=2_000),
        MarkReport(name="lost", sequence=70, time_ns=3_000, in_gap=True),
        MarkReport(name="soon", sequence=500, time_ns=4_000),
    )
    gaps = (GapReport(first_sequence=65, last_sequence=75, reason="the journal was full"),)
    await cast.report_stored(100)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=marks, gaps=gaps, ordered_from=(80, 3_500)))
    return cast
