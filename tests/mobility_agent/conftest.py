"""What the agent's tests share: a vault of their own, and a small process server of that vault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from replicar.control.identity import Identity, Role
from tests.mobility_agent.wire_server import Vault, WireServer


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault")


@pytest.fixture
def machine(vault: Vault) -> Identity:
    """The identity of the machine under test."""
    return vault.identity(Role.MACHINE, "db1")


@pytest.fixture
async def wire_server(vault: Vault) -> AsyncIterator[WireServer]:
    """A process server that keeps what it is sent; see `wire_server`."""
    async with WireServer(vault.identity(Role.PROCESS_SERVER, "ps1")).running() as server:
        yield server


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The sender's stories are told on both loops, since their TLS differs; everything else on what the agent uses."""
    if item.nodeid.rpartition("/")[2].startswith("test_sender"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}
