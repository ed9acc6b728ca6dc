"""The agent runs with no more rights than its unit leaves it, and is gone from a machine that does not want it."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from mobility_agent.install import unit
from mobility_agent.settings import load_settings
from replicar.nbd.client import NbdClient
from simulator import command
from simulator.cluster import Cluster
from simulator.command import Result
from tests.end_to_end.stage import DISK, make_image, stage
from tests.mobility_agent.trace.rig import loop_disk

pytestmark = pytest.mark.needs_root


def confined(capabilities: tuple[str, ...]) -> list[str]:
    """The agent's command under what the unit's CapabilityBoundingSet and NoNewPrivileges amount to for root."""
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)
    return [
        "setpriv",
        "--no-new-privs",
        "--inh-caps=-all",
        f"--bounding-set=-all,{kept}",
        *command.program("mobility-agent"),
    ]


async def uninstall(cluster: Cluster, *options: str) -> Result:
    settings: list[str | Path] = ["--settings", cluster.agent_directory / "settings.toml"]
    units: list[str | Path] = ["--units", cluster.directory / "units"]
    return await command.run("mobility-agent", "uninstall", *settings, *units, *options)


async def install(cluster: Cluster, *options: str) -> Result:
    settings: list[str | Path] = ["--settings", cluster.agent_directory / "settings.toml"]
    units: list[str | Path] = ["--units", cluster.directory / "units"]
    return await command.run("mobility-agent", "install", *settings, *units, "--no-start", "--json", *options)


async def test_a_served_disk_is_replicated_with_the_units_rights(tmp_path: Path) -> None:
    async with stage(tmp_path, agent_program=confined(unit.BASE_CAPABILITIES)) as running:
        async with running.writing():
            await asyncio.sleep(1.0)
        await running.settle()
        assert (await running.recover("--latest")).equal


async def test_a_mounted_disk_is_followed_and_frozen_with_the_units_rights(tmp_path: Path) -> None:
    program = confined((*unit.BASE_CAPABILITIES, *unit.HOST_CAPABILITIES))
    fields: dict[str, Any] = {"capture": "trace", "journal_bytes": 256 << 20, "freeze_budget_seconds": 2.0}
    with loop_disk(tmp_path, "a", filesystem="ext4") as disk:
        cluster = Cluster(
            tmp_path / "cluster",
            disks={DISK: disk.device},
            agent_settings=fields,
            in_memory=True,
            agent_program=program,
        )
        async with cluster:
            await cluster.start()
            assert unit.capabilities(load_settings(cluster.agent_directory / "settings.toml")) == (
                *unit.BASE_CAPABILITIES,
                *unit.HOST_CAPABILITIES,
            )
            (await cluster.replicar("protect", cluster.machine)).require()
            (disk.mountpoint / "file").write_bytes(b"kept" * 10_000)
            await _tagged(cluster)
            recovered = tmp_path / "recovered.raw"
            (
                await cluster.replicar("recover", cluster.machine, "--latest", "--disk", DISK, "--raw", recovered)
            ).require()
            assert b"kept" * 1024 in recovered.read_bytes()


async def _tagged(cluster: Cluster) -> None:
    async with asyncio.timeout(60):
        while True:  # refused while the first copy is under way
            done = await cluster.replicar("tag", cluster.machine, "a-point", "--wait-stored")
            if done.status == 0:
                return
            await asyncio.sleep(0.3)


async def test_an_agent_that_is_uninstalled_leaves_the_disk_and_nothing_else(tmp_path: Path) -> None:
    async with stage(tmp_path) as running:
        cluster = running.cluster
        found = (await install(cluster)).require().json()
        assert {finding["verdict"] for finding in found["findings"]} <= {"good", "doubtful"}
        async with running.writing():
            await asyncio.sleep(1.0)
        await running.settle()
        disk = hashlib.sha256(running.image.path.read_bytes()).digest()

        async with await NbdClient.connect(cluster.nbd(DISK), export=DISK):
            refused = await uninstall(cluster, "--purge")
        assert refused.status != 0
        assert "1 client" in refused.errors

        assert "stop it" in (await uninstall(cluster, "--purge")).errors  # no unit of this machine's runs it
        await cluster.agent.stop()
        (await uninstall(cluster, "--purge")).require()
        assert hashlib.sha256(running.image.path.read_bytes()).digest() == disk
        assert not cluster.agent_directory.exists()
        assert not cluster.nbd(DISK).exists()
        assert not list((tmp_path / "units").iterdir())


async def test_a_machine_that_is_not_enrolled_is_told_so_and_nothing_is_changed(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image")
    options: list[str | Path] = [
        "--settings",
        tmp_path / "agent.toml",
        "--disk",
        f"data={image.path}",
        "--directory",
        tmp_path / "state",
    ]
    refused = await command.run("mobility-agent", "install", *options, "--units", tmp_path / "units", "--no-start")
    assert refused.status != 0
    assert "mobility-agent enrol" in refused.errors
    assert "inline" in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image"]
