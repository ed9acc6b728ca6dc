"""A second process server takes a machine over: after a death with the first one's disk gone, by hand, by itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from simulator.child import Child
from tests.end_to_end.stage import Stage, stage

SECOND = "ps-2"
TAKEOVER_SECONDS = 90.0


@pytest.mark.soak
async def test_a_server_dead_with_its_disk_is_replaced_by_hand_and_nothing_is_missing(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        second = await it.cluster.add_process_server(SECOND)
        async with it.writing() as application:
            await asyncio.sleep(1.0)
            _die(it)
            await asyncio.sleep(0.5)
            await _online(it)
            moved = (await it.cluster.replicar("move", "--all-from", "ps-1", "--json")).require().json()
            assert [(each["process_server"], each["epoch"]) for each in moved["machines"]] == [(SECOND, 2)]
            await asyncio.sleep(1.0)
            assert application.tally.changes_lost == 0
        await it.settle()
        await _whole_and_sound(it)
        assert second.process_id is not None


async def test_a_server_that_was_left_while_it_hung_is_shut_out_when_it_goes_on(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        await it.cluster.add_process_server(SECOND)
        await _online(it)
        hung = it.cluster.process_server.process_id
        assert hung is not None
        async with it.writing(bytes_per_second=8e6) as application:
            await asyncio.sleep(0.7)
            os.kill(hung, signal.SIGSTOP)  # in the middle of uploads, believing that the machine is its own
            (await it.cluster.replicar("move", it.cluster.machine, "--to", SECOND)).require()
            await asyncio.sleep(1.0)
            os.kill(hung, signal.SIGCONT)
            await asyncio.sleep(1.0)
            assert application.tally.changes_lost == 0
        await it.settle()
        assert (await _machine(it))["epoch"] == 2
        await _whole_and_sound(it)


async def test_a_dead_servers_machine_is_taken_over_without_anybody_asking(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        await it.cluster.add_process_server(SECOND)
        await it.cluster.config_server.stop()
        with (it.cluster.vault / "config-server.toml").open("a") as settings:
            settings.write("takeover_seconds = 2\n")
        await it.cluster.start_config_server()
        async with it.writing():
            await asyncio.sleep(1.0)
            _die(it)
            async with asyncio.timeout(TAKEOVER_SECONDS):
                while (await _machine(it))["process_server"] != SECOND:
                    await asyncio.sleep(0.5)
            await asyncio.sleep(0.5)
        await it.settle()
        await _whole_and_sound(it)


def _die(it: Stage) -> None:
    """SIGKILL, and its directory with cache, keys and certificate is gone for good."""
    server: Child = it.cluster.process_server
    server.kill()
    shutil.rmtree(it.cluster.process_server_directory)


async def _online(it: Stage) -> None:
    """Wait until the config server knows of both, but for whoever was killed."""
    wanted = {SECOND} | ({"ps-1"} if it.cluster.process_server.process_id is not None else set())
    async with asyncio.timeout(60), it.cluster.control() as control:
        while not wanted <= {each.name for each in (await control.status()).process_servers if each.online}:
            await asyncio.sleep(0.1)


async def _machine(it: Stage) -> dict[str, Any]:
    return (await it.cluster.replicar("machines", it.cluster.machine, "--json")).require().json()


async def _whole_and_sound(it: Stage) -> None:
    comparison = await it.recover("--latest")
    assert comparison.equal, str(comparison)
    (await it.cluster.replicar("verify", it.cluster.machine)).require()
