"""The process server as users run it: its own process, a real config server, real TLS, a real Azurite, and SIGKILL."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import uuid
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from process_server.cli import app
from replicar.control.identity import Identity, Role
from replicar.errors import CorruptionError
from replicar.storage.target import open_store
from simulator.azurite import Azurite
from tests.process_server.processes import COMMAND, Server, container, world


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


async def test_sigkill_in_mid_upload_and_torn_pages_lose_nothing_and_take_no_count_back(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    """What the emulator writes whole is torn here after the death, and only where nobody was told that it is stored."""
    random = Random(20261123)
    torn = 0
    async with (
        world(azurite, container_name, key_file, tmp_path) as here,
        here.house.operator() as operator,
        open_store(here.target) as store,
    ):
        agent = here.agent
        agent.begin()
        await here.run_agent(agent.fill(3))
        shown = (0, 0)
        for _ in range(6):
            while shown == (0, 0) or agent.stored < agent.next_sequence - 1:
                await here.run_agent(agent.next_sequence - 1)
                summary = await operator.machine("m1")
                shown = summary.bytes_received, summary.bytes_stored
            last = agent.fill(40, size=900_000)
            sending = asyncio.create_task(here.run_agent(last))
            stored = agent.stored
            while agent.stored == stored:
                await asyncio.sleep(0.002)
            await asyncio.sleep(random.uniform(0.05, 0.3))
            here.server.kill()
            sending.cancel()
            await asyncio.wait([sending])
            summary = await operator.machine("m1")
            known = max(summary.stored_sequence, agent.stored, here.server.status()["machines"][0]["stored_sequence"])
            torn += await here.tear(store, known)
            await here.server.start()
            await here.run_agent(last)
            summary = await operator.machine("m1")
            assert summary.bytes_received >= shown[0]
            assert summary.bytes_stored >= shown[1]
            assert await here.stored() == agent.everything
            if torn:
                break
        assert torn, "no death left anything that nobody had been told of"


async def test_a_log_cut_short_while_the_servers_disk_is_lost_is_found_by_what_the_config_server_knows(
    azurite: Azurite, container_name: str, key_file: Path, tmp_path: Path
) -> None:
    async with world(azurite, container_name, key_file, tmp_path) as here, here.house.operator() as operator:
        agent = here.agent
        agent.begin()
        last = agent.fill(6)
        await here.run_agent(last)
        while (summary := await operator.machine("m1")).stored_sequence < last:
            await asyncio.sleep(0.1)
        assert await here.server.stopped() == 0
        for name in ("cache", "status.json", "assignments.json"):
            (here.server.directory / name).unlink()
        with container(azurite, container_name) as service:
            for blob in service.get_container_client(container_name).list_blobs():
                await asyncio.to_thread(service.get_container_client(container_name).delete_blob, blob.name)
        await here.server.start()
        while not (here.server.directory / "status.json").exists():
            await asyncio.sleep(0.05)
        error = (await here.server.machine(state="refusing"))["error"]
        assert error["error"] == "ConflictError"
        assert f"segment {summary.stored_segment} was stored" in error["message"]


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
