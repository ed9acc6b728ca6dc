"""A process server in a process of its own, with a real config server, a real Azurite and one protected machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from azure.storage.blob import BlobServiceClient

from config_server.foundation import found_vault
from process_server.cache import SLOT_BYTES
from replicar.control.identity import Identity, Role
from replicar.control.keys import key_number
from replicar.log.reader import LogReader
from replicar.storage.store import PageBlobStore
from replicar.storage.target import StorageTarget, open_store
from simulator.azurite import Azurite
from tests.config_server.support import House, SetClock, running
from tests.process_server.sender import Agent
from tests.process_server.support import stored_frames

STORY_SECONDS = 60
COMMAND = [sys.executable, "-m", "process_server.cli"]


@dataclass
class Server:
    """A process server in a process of its own; `command` is what starts it, before `run`."""

    directory: Path
    storage: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    command: Sequence[str | Path] = field(default_factory=lambda: [*COMMAND])
    process: subprocess.Popen[bytes] | None = None

    @property
    def settings_file(self) -> Path:
        return self.directory / "settings.toml"

    @property
    def log(self) -> str:
        return (self.directory / "log.txt").read_text()

    @property
    def port(self) -> int:
        return int((self.directory / "port").read_text())

    def status(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return data

    async def machine(self, **expected: Any) -> dict[str, Any]:
        """The one machine's status, once it says what is expected (None: anything but None)."""
        while True:
            for each in self.status()["machines"]:
                said = {name: each[name] for name in expected}
                if all(said[name] if value is None else said[name] == value for name, value in expected.items()):
                    found: dict[str, Any] = each
                    return found
            await asyncio.sleep(0.1)

    def write_settings(self) -> None:
        values = {
            "directory": str(self.directory),
            "listen_host": "127.0.0.1",
            "port": 0,
            "cache_bytes": 16 * SLOT_BYTES,
            "segment_age_seconds": 0.1,
            "heartbeat_seconds": 1.0,
            "log_blob_bytes": 64 << 20,
            **self.extra,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        lines += ["[storage]", *(f"{name} = {json.dumps(value)}" for name, value in self.storage.items())]
        self.settings_file.write_text("\n".join(lines) + "\n")

    async def launch(self) -> None:
        """Start the process, and wait for nothing."""
        (self.directory / "port").unlink(missing_ok=True)
        self.write_settings()
        with (self.directory / "log.txt").open("ab") as log:
            self.process = await asyncio.to_thread(
                subprocess.Popen, [*self.command, "run", "--settings", str(self.settings_file)], stderr=log
            )

    async def start(self) -> None:
        await self.launch()
        assert self.process is not None
        while not (self.directory / "port").exists():
            assert self.process.poll() is None, self.log
            await asyncio.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    async def stopped(self, number: int | None = signal.SIGTERM) -> int:
        """Its exit status, after a signal or by itself."""
        assert self.process is not None
        if number is not None:
            self.process.send_signal(number)
        while (status := self.process.poll()) is None:
            await asyncio.sleep(0.02)
        return status


@dataclass
class World:
    house: House
    server: Server
    machine: Identity
    agent: Agent
    target: StorageTarget

    async def stored(self) -> bytearray:
        """What the log holds, opened with the key that the operator gets."""
        async with self.house.operator() as operator, open_store(self.target) as store:
            key = await operator.key(self.machine.name)
            return await stored_frames(store, self.machine.id, key.data_key_bytes(), key_id=key_number(key.key_id))

    async def tear(self, store: PageBlobStore, known: int) -> int:
        """Blank a page in the middle of every stored segment that holds something behind sequence `known`; how many."""
        async with self.house.operator() as operator:
            key = await operator.key(self.machine.name)
        reader, torn = LogReader(store, self.machine.id, {key_number(key.key_id): key.data_key_bytes()}), 0
        async for found in reader.segments():
            header = found.table.header
            if header.position.last_sequence > known and header.table_offset > 2048:
                await store.break_lease(found.blob)
                await store.put_pages(found.blob, found.offset + 1024, bytes(512))
                torn += 1
        return torn

    async def run_agent(self, until_stored: int) -> None:
        """Send as an agent does, to wherever the server is at the time."""
        while self.agent.stored < until_stored:
            with contextlib.suppress(OSError, ValueError):
                self.agent.port = self.server.port
                await self.agent.converse(until_stored=until_stored)
            await asyncio.sleep(0.05)


def container(azurite: Azurite, name: str) -> BlobServiceClient:
    return BlobServiceClient(
        azurite.blob_endpoint,
        credential={"account_name": azurite.account_name, "account_key": azurite.account_key},
        connection_verify=str(azurite.authority_file),
    )


@asynccontextmanager
async def world(
    azurite: Azurite,
    container_name: str,
    key_file: Path,
    tmp_path: Path,
    *,
    through: Mapping[str, str] | None = None,
    seconds: float = STORY_SECONDS,
) -> AsyncIterator[World]:
    """A vault, a process server of it that runs, and one protected machine.

    Args:
        through: storage settings of the process server alone, where it is to reach Azurite by another way.
        seconds: for the whole story.
    """
    vault = tmp_path / "vault"
    found_vault(vault, "test", address="127.0.0.1:1", listen="127.0.0.1", port=0, clock=SetClock())
    storage = {
        "endpoint": azurite.blob_endpoint,
        "account_name": azurite.account_name,
        "account_key_file": str(key_file),
        "authority_file": str(azurite.authority_file),
        "container": container_name,
    }
    async with asyncio.timeout(seconds), running(vault, SetClock()) as house:
        server = Server(tmp_path / "ps", storage | dict(through or {}))
        identity = await house.enrol(server.directory, "ps1", Role.PROCESS_SERVER)
        machine = await house.enrol(tmp_path / "m1", "m1")
        await server.start()
        try:
            async with house.operator() as operator:
                while not any(each.online for each in (await operator.status()).process_servers):
                    await asyncio.sleep(0.05)
                await operator.protect("m1")
            yield World(house, server, machine, Agent(machine, identity.id), StorageTarget.model_validate(storage))
        finally:
            server.kill()
