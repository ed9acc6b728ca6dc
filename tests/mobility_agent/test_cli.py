"""`mobility-agent` as a command of its own: enrol, run, status, signals, and what it prints when it can't."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from config_server.foundation import found_vault
from config_server.vault import PASSPHRASE_FILE
from replicar.control.identity import Identity, Role
from replicar.nbd.client import NbdClient
from tests.config_server.support import House, SetClock, running
from tests.mobility_agent.core import MIB, replay
from tests.mobility_agent.wire_server import WireServer

COMMAND = (sys.executable, "-m", "mobility_agent.cli")
DISK_BYTES = 4 * MIB


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    output: str
    errors: str

    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.output)
        return fields


async def run(*arguments: str | Path) -> Result:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Result(process.returncode, output.decode(), errors.decode())


@asynccontextmanager
async def serving(settings: Path, socket: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`mobility-agent run`, serving its disk."""
    with (settings.parent / "agent.out").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*COMMAND, "run", "--settings", settings, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            while not await _answers(socket):
                assert process.returncode is None, (settings.parent / "agent.out").read_text()
                await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    return True


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = SetClock()
    found_vault(tmp_path / "vault", "demo", address="127.0.0.1:443", listen="127.0.0.1", port=443, clock=clock)
    async with running(tmp_path / "vault", clock) as house:
        yield house


def enrol_arguments(house: House, directory: Path, name: str = "db1") -> list[str | Path]:
    passphrase = house.directory / PASSPHRASE_FILE
    place: list[str | Path] = ["--config-server", house.address, "--passphrase-file", passphrase]
    return ["enrol", *place, "--directory", directory, "--name", name]


def write_settings(directory: Path, **fields: object) -> Path:
    image = directory / "root.img"
    if not image.exists():
        image.write_bytes(os.urandom(MIB) + bytes(DISK_BYTES - MIB))
    chosen = {"directory": "agent", "journal_bytes": "64 MiB", "journal_file_bytes": "4 MiB", **fields}
    lines = [f"{name} = {json.dumps(value)}" for name, value in chosen.items()]
    lines += ["[[disks]]", 'name = "root"', 'path = "root.img"', 'nbd = "n.sock"']
    path = directory / "agent.toml"
    path.write_text("\n".join(lines))
    return path


async def protected(house: House, tmp_path: Path) -> WireServer:
    """A process server, not running yet, that db1 is assigned to once it runs at `port`."""
    identity = await house.enrol(tmp_path / "ps", "ps1", Role.PROCESS_SERVER)
    server = WireServer(identity)
    server.store_all = True
    return server


async def protect(house: House, server: WireServer) -> None:
    async with house.client(server.identity) as client, house.operator() as operator:
        await client.process_server_heartbeat(house.server_heartbeat(port=server.port))
        await operator.protect("db1")


async def test_from_enrolment_to_a_replicated_disk_and_through_a_kill(house: House, tmp_path: Path) -> None:
    enrolled = await run(*enrol_arguments(house, tmp_path / "agent"), "--json")
    assert enrolled.status == 0, enrolled.errors
    assert enrolled.json()["machine"] == "db1"
    identity = Identity.load(tmp_path / "agent" / "identity")
    assert str(identity.id) == enrolled.json()["machine_id"]

    settings, socket, image = write_settings(tmp_path), tmp_path / "n.sock", tmp_path / "root.img"
    async with (await protected(house, tmp_path)).running() as server:
        await protect(house, server)
        async with serving(settings, socket) as agent:
            async with await NbdClient.connect(socket) as client:
                for number in range(50):
                    await client.write(number * 4096, os.urandom(4096))
                await until_replicated(server, image)
                async with asyncio.timeout(20):
                    while (shown := await run("status", "--directory", tmp_path / "agent", "--json")).status:
                        await asyncio.sleep(0.2)
                assert shown.json()["machine"] == "db1"
                text = await run("status", "--directory", tmp_path / "agent")
                assert text.status == 0
                assert "process server" in text.output
                server.reading.clear()  # from here on nothing is read, so the kill leaves something unsent
                for number in range(50):
                    await client.write(number * 8192, os.urandom(4096))
            agent.kill()
            await agent.wait()
        stale = await run("status", "--directory", tmp_path / "agent")
        assert stale.status == 1
        assert "no agent runs on" in stale.errors
        assert "next step: " in stale.errors
        server.hang_up()
        server.reading.set()
        async with serving(settings, socket):
            await until_replicated(server, image)


async def until_replicated(server: WireServer, image: Path) -> None:
    async with asyncio.timeout(30):
        while replay(server.frames, DISK_BYTES) != image.read_bytes():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_signal_ends_it_in_good_order(house: House, tmp_path: Path, number: signal.Signals) -> None:
    assert (await run(*enrol_arguments(house, tmp_path / "agent"))).status == 0
    settings, socket = write_settings(tmp_path), tmp_path / "n.sock"
    async with serving(settings, socket) as agent, await NbdClient.connect(socket) as client:
        await client.write(0, b"\1" * 4096)
        agent.send_signal(number)
        assert await asyncio.wait_for(agent.wait(), 20) == 0
    assert not socket.exists()
    assert (tmp_path / "root.img").read_bytes()[:4096] == b"\1" * 4096
    status = json.loads((tmp_path / "agent" / "status.json").read_text())
    assert status["state"] == "stopped"


async def test_a_wrong_passphrase_is_refused_and_nothing_is_kept(house: House, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not this one\n")
    wrong.chmod(0o600)
    result = await run(
        *("enrol", "--config-server", house.address, "--passphrase-file", wrong),
        *("--directory", tmp_path / "agent", "--name", "db1"),
    )
    assert result.status == 1
    assert "passphrase" in result.errors
    assert "next step: " in result.errors
    assert "Traceback" not in result.errors
    assert "not this one" not in result.errors + result.output
    assert not (tmp_path / "agent" / "identity").exists()


async def test_an_error_with_json_is_one_object(house: House, tmp_path: Path) -> None:
    shutil.rmtree(house.directory / "none", ignore_errors=True)
    result = await run("status", "--directory", tmp_path / "none", "--json")
    assert result.status == 1
    assert result.json()["error"] == "PermanentError"
    assert result.json()["hint"]
    away = await run(
        *("enrol", "--config-server", "127.0.0.1:1", "--passphrase-file", house.directory / PASSPHRASE_FILE),
        *("--directory", tmp_path / "agent", "--name", "db1", "--json"),
    )
    assert away.status == 75
    assert "127.0.0.1:1" in away.json()["message"]


async def test_enrolling_under_a_running_agent_is_refused(house: House, tmp_path: Path) -> None:
    assert (await run(*enrol_arguments(house, tmp_path / "agent"))).status == 0
    async with serving(write_settings(tmp_path), tmp_path / "n.sock"):
        result = await run(*enrol_arguments(house, tmp_path / "agent"))
        assert result.status == 1
        assert "another agent (process " in result.errors


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"jurnal_bytes": 5}, "jurnal_bytes"), ({"journal_bytes": "4096 TiB"}, "journal_bytes is"), ({}, "identity")],
)
async def test_run_names_what_is_wrong_and_ends(tmp_path: Path, fields: dict[str, object], named: str) -> None:
    if named == "journal_bytes is":
        clock = SetClock()
        found_vault(tmp_path / "vault", "demo", address="127.0.0.1:443", listen="127.0.0.1", port=443, clock=clock)
        async with running(tmp_path / "vault", clock) as house:
            await house.enrol(tmp_path / "agent" / "identity", "db1")
    result = await run("run", "--settings", write_settings(tmp_path, **fields))
    assert result.status == 1
    assert named in result.errors
    assert "next step: " in result.errors
    assert "Traceback" not in result.errors


async def test_help_says_what_to_do_first() -> None:
    result = await run("--help")
    assert result.status == 0
    assert "First `enrol` the machine" in result.output
    for command in ("enrol", "run", "status"):
        assert (await run(command, "--help")).status == 0
    assert (await run("--version")).output.startswith("mobility-agent ")
