"""The process server as users run it: its own process, a real config server, real TLS, a real Azurite, and SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from azure.storage.blob import BlobServiceClient
from typer.testing import CliRunner

from config_server.foundation import found_vault
from process_server.cache import SLOT_BYTES
from process_server.cli import app
from replicar.control.identity import Identity, Role
from replicar.control.keys import key_number
from replicar.errors import CorruptionError
from replicar.storage.target import StorageTarget, open_store
from simulator.azurite import Azurite
from tests.config_server.support import House, SetClock, running
from tests.process_server.sender import Agent
from tests.process_server.support import stored_frames

STORY_SECONDS = 60
COMMAND = [sys.executable, "-m", "process_server.cli"]


@dataclass
class Server:
    """A process server in a process of its own."""

    directory: Path
    storage: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
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
                if all(said[name] == value or (value is None and said[name]) for name, value in expected.items()):
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

    async def start(self) -> None:
        (self.directory / "port").unlink(missing_ok=True)
        self.write_settings()
        with (self.directory / "log.txt").open("ab") as log:
            self.process = await asyncio.to_thread(
                subprocess.Popen, [*COMMAND, "run", "--settings", str(self.settings_file)], stderr=log
            )
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


@pytest.fixture
def key_file(azurite: Azurite, tmp_path: Path) -> Path:
    path = tmp_path / "account.key"
    path.write_text(azurite.account_key)
    path.chmod(0o600)
    return path


@asynccontextmanager
async def world(azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path) -> AsyncIterator[World]:
    """A vault, a process server of it that runs, and one protected machine."""
    vault = tmp_path / "vault"
    found_vault(vault, "test", address="127.0.0.1:1", listen="127.0.0.1", port=0, clock=SetClock())
    storage = {
        "endpoint": azurite.blob_endpoint,
        "account_name": azurite.account_name,
        "account_key_file": str(key_file),
        "authority_file": str(azurite.authority_file),
        "container": container_name,
    }
    async with asyncio.timeout(STORY_SECONDS), running(vault, SetClock()) as house:
        server = Server(tmp_path / "ps", storage)
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


async def test_sigkill_in_mid_flow_again_and_again_loses_nothing(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    random = Random(20261122)
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        agent.fill(40, size=200_000)
        for _ in range(4):
            last = agent.fill(25, size=random.choice((2000, 50_000, 900_000)))
            sending = asyncio.create_task(here.run_agent(last))
            await asyncio.sleep(random.uniform(0.05, 0.6))
            here.server.kill()
            acknowledged = agent.stored
            await here.server.start()
            assert agent.stored >= acknowledged
            if random.random() < 0.5:
                await sending
            sending.cancel()
            await asyncio.wait([sending])
        last = agent.fill(3)
        await here.run_agent(last)
        assert not agent.refusals or {each.error for each in agent.refusals} == {"TransientError"}
        assert await here.stored() == agent.everything
        async with here.house.operator() as operator:
            while (await operator.machine("m1")).stored_sequence < last:
                await asyncio.sleep(0.1)
            summary = await operator.machine("m1")
        assert summary.stored_segment is not None
        assert len(summary.stored_digest) == 64


async def test_sigterm_stores_what_is_pending_and_exits_with_zero(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        last = agent.fill(30, size=500_000)
        sending = asyncio.create_task(here.run_agent(last))
        while agent.received < last:
            await asyncio.sleep(0.005)
        assert await here.server.stopped() == 0
        sending.cancel()
        assert await here.stored() == agent.everything
        await here.server.machine(stored_sequence=last, pending_bytes=0)
        async with open_store(here.target) as store:
            assert [info.name for info in await store.list("") if info.leased] == []


async def test_it_goes_on_and_even_starts_while_the_config_server_is_down(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        await here.run_agent(agent.fill(5))
        await here.house.server.__aexit__(None, None, None)
        await here.run_agent(agent.fill(5))
        here.server.kill()
        await here.server.start()
        await here.run_agent(agent.fill(5))
        kept = here.server.directory / "assignments.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        while "config server" not in here.server.status()["errors"]:
            await asyncio.sleep(0.1)
        shown = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, "status", "--directory", str(here.server.directory)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "machine m1: running" in shown.stdout
        assert "config server:" in shown.stdout


async def test_a_container_that_is_deleted_is_reported_not_made_anew_and_nothing_acknowledged_is_lost(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        await here.run_agent(agent.fill(5))
        with container(azurite, container_name) as service:
            await asyncio.to_thread(service.delete_container, container_name)
            before = agent.stored
            last = agent.fill(10)
            sending = asyncio.create_task(here.run_agent(last))
            machine = await here.server.machine(error=None)
            assert container_name in machine["error"]["message"]
            assert agent.stored == before
            assert len(agent.frames) == 10

            here.server.kill()
            await here.server.start()
            while "storage" not in here.server.status()["errors"]:
                await asyncio.sleep(0.1)
            assert "is gone" in here.server.status()["errors"]["storage"]["message"]

            # Somebody makes an empty one: what was stored is still missing, and that is said, not papered over.
            await asyncio.to_thread(service.create_container, container_name)
            error = (await here.server.machine(state="refusing"))["error"]
            assert error["error"] == "ConflictError"
            assert "enrol the machine again" in error["hint"]
            sending.cancel()
            assert agent.stored == before


async def test_a_cache_disk_that_fails_ends_the_process_with_an_error(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        await here.run_agent(agent.fill(5))
        assert here.server.process is not None
        resource.prlimit(here.server.process.pid, resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
        last = agent.fill(20, size=500_000)
        sending = asyncio.create_task(here.run_agent(last))
        assert await here.server.stopped(None) == 1
        assert "can't write the cache" in here.server.log
        assert "Traceback" not in here.server.log
        await here.server.start()
        await sending
        assert await here.stored() == agent.everything


async def test_two_servers_on_one_directory_and_a_taken_port_are_refused(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        again = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, "run", "--settings", str(here.server.settings_file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 1
        assert "another process server has the cache" in again.stderr

        other = Server(tmp_path / "ps2", here.server.storage, {"port": here.server.port})
        await here.house.enrol(other.directory, "ps2", Role.PROCESS_SERVER)
        other.write_settings()
        taken = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, "run", "--settings", str(other.settings_file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert taken.returncode == 1
        assert f"port {here.server.port} is taken" in taken.stderr


async def test_enrolment_by_command_line(azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        directory = tmp_path / "enrolled"
        arguments = [
            *("--config-server", here.house.address, "--name", "ps9", "--directory", str(directory), "--json"),
            *("--registration-key-file", str(here.house.directory / "registration.key")),
        ]
        good = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, "enrol", *arguments, "--passphrase-file", str(here.house.directory / "passphrase")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert good.returncode == 0, good.stderr
        assert uuid.UUID(json.loads(good.stdout)["id"]) == Identity.load(directory).id
        wrong = tmp_path / "wrong"
        wrong.write_text("not the passphrase\n")
        wrong.chmod(0o600)
        bad = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, "enrol", *arguments, "--passphrase-file", str(wrong)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert bad.returncode != 0
        assert "passphrase" in bad.stderr
        assert "Traceback" not in bad.stderr


async def test_a_segment_swapped_in_storage_stops_the_machine_with_a_corruption_error(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here:
        agent = here.agent
        agent.begin()
        for _ in range(3):
            await here.run_agent(agent.fill(1))
        assert await here.server.stopped() == 0
        async with open_store(here.target) as store:
            [first] = [info for info in await store.list("") if info.name.endswith("-00.rlog")]
            await store.put_pages(first.name, 512, os.urandom(512))
        await here.server.start()
        assert (await here.server.machine(state="refusing"))["error"]["error"] in ("ConflictError", "CorruptionError")
        with pytest.raises((CorruptionError, AssertionError)):
            assert await here.stored() == agent.everything


def test_the_help_names_what_a_newcomer_needs() -> None:
    shown = CliRunner().invoke(app, ["run", "--help"]).output
    for word in ("cache_bytes", "[storage]", "account_key_file", "REPLICAR_PS_"):
        assert word in shown
    assert "registration" in CliRunner().invoke(app, ["enrol", "--help"]).output
