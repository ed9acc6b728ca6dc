"""What people and machines get wrong: each ends in an error that names the thing and the next step."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from simulator import command
from simulator.cluster import Cluster
from simulator.command import Result
from tests.end_to_end.stage import DISK, make_image, stage


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image")).path


def _says(result: Result, *words: str) -> None:
    """The command failed, and said these words and what to do next."""
    assert result.status != 0, result
    said = result.errors + result.output
    for word in words:
        assert word in said, said
    assert "Traceback" not in said, said


async def _status_naming(cluster: Cluster, word: str) -> Result:
    """What `replicar status` says once it knows of something; heartbeats take a while."""
    async with asyncio.timeout(30):
        while word not in (said := await cluster.replicar("status")).output:
            await asyncio.sleep(0.5)
    return said


async def test_a_wrong_passphrase_admits_neither_machine_nor_process_server(tmp_path: Path, image_path: Path) -> None:
    async with Cluster(tmp_path, disks={DISK: image_path}, in_memory=True) as cluster:
        await cluster.make_vault()
        await cluster.start_config_server()
        wrong = tmp_path / "passphrase"
        wrong.touch(mode=0o600)
        wrong.write_text("not-the-passphrase\n")
        server: list[str | Path] = ["--config-server", cluster.config_server_address, "--passphrase-file", wrong]
        machine = await command.run("mobility-agent", "enrol", *server, "--directory", tmp_path / "m", "--name", "m")
        _says(machine, "passphrase")
        key: list[str | Path] = ["--registration-key-file", cluster.vault / "registration.key"]
        part = await command.run("process-server", "enrol", *server, *key, "--directory", tmp_path / "p", "--name", "p")
        _says(part, "passphrase")
        assert not (tmp_path / "m" / "identity" / "key.pem").exists()
        assert "not-the-passphrase" not in machine.errors + part.errors


async def test_an_unknown_machine_is_named_by_every_command_that_is_given_it(tmp_path: Path, image_path: Path) -> None:
    async with Cluster(tmp_path, disks={DISK: image_path}, in_memory=True) as cluster:
        await cluster.start_storage()
        await cluster.make_vault()
        await cluster.start_config_server()
        for arguments in (
            ["protect", "nobody"],
            ["points", "nobody"],
            ["tag", "nobody", "now"],
            ["verify", "nobody"],
            ["recover", "nobody", "--latest", "--disk", DISK, "--raw", str(tmp_path / "out.raw")],
        ):
            _says(await cluster.replicar(*arguments), "nobody", "next step")
            failed = await cluster.replicar(*arguments, "--json")
            assert failed.status != 0
            assert "nobody" in json.loads(failed.output)["message"]
        assert not (tmp_path / "out.raw").exists()


async def test_a_taken_port_is_named_by_whoever_wants_it(tmp_path: Path, image_path: Path) -> None:
    async with Cluster(tmp_path, disks={DISK: image_path}, in_memory=True) as cluster:
        await cluster.start_storage()
        await cluster.make_vault()
        await cluster.start_config_server()
        await cluster.enrol_process_server()
        with socket.create_server(("127.0.0.1", cluster.process_server_port)):
            cluster.process_server.start()
            assert await cluster.process_server.ended(30) != 0
        said = cluster.process_server.said()
        assert str(cluster.process_server_port) in said
        assert "Traceback" not in said
        await cluster.start_process_server()
        second = await command.run("config-server", "run", "--directory", cluster.vault, limit_seconds=30)
        _says(second)


async def test_a_deleted_container_stops_storing_and_nothing_else(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        async with it.writing() as application:
            await asyncio.sleep(0.5)
            status = json.loads((await it.cluster.replicar("status", "--json")).require().output)
            assert status
            await it.cluster.delete_container()
            await asyncio.sleep(2.0)
            assert application.tally.changes_lost == 0
            assert it.cluster.process_server.process_id is not None
            _says(await it.cluster.replicar("verify", it.cluster.machine), it.cluster.container)
            said = await _status_naming(it.cluster, it.cluster.container)
            assert said.status == 7, said
            assert f"machine {it.cluster.machine} is not storing" in said.output
            assert "next step: " in said.output
            (machine,) = (await it.cluster.replicar("status", "--json")).json()["machines"]
            assert machine["storing"] is False
            assert any(it.cluster.container in error["message"] for error in machine["errors"])
            assert it.cluster.container in (await it.cluster.replicar("machines")).require().output
        facts = await command.run("process-server", "status", "--directory", it.cluster.process_server_directory)
        assert it.cluster.container in facts.output, facts
