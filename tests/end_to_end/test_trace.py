"""A disk that stays mounted as it is, through the real processes: what was tagged comes back, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from simulator import command, e2fsprogs
from simulator.cluster import Cluster
from simulator.command import Result
from simulator.demo.story import moment
from tests.mobility_agent.trace.rig import Churn, LoopDisk, loop_disk, run

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]

MIB = 1 << 20
DISK = "data"
#: A budget that two shared cores keep under churn.
SETTINGS = {
    "capture": "trace",
    "journal_bytes": 256 * MIB,
    "freeze_budget_seconds": 2.0,
    "audit_bytes_per_second": 64 * MIB,
}


@asynccontextmanager
async def machine(directory: Path, disk: LoopDisk, **settings: Any) -> AsyncIterator[Cluster]:
    """A cluster whose machine has this mounted disk, protected, its first copy done."""
    disks = {DISK: disk.device}
    async with Cluster(directory, disks=disks, agent_settings={**SETTINGS, **settings}, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        await whole(cluster)
        yield cluster


async def status(cluster: Cluster) -> dict[str, Any]:
    path = cluster.agent_directory / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


async def whole(cluster: Cluster) -> None:
    """Wait until the agent that runs now has copied the disk."""
    async with asyncio.timeout(60):
        while True:
            found = await status(cluster)
            if found.get("process") == cluster.agent.process_id and found["capture"]["is_whole"]:
                return
            await asyncio.sleep(0.1)


async def tag(cluster: Cluster, name: str) -> dict[str, Any]:
    return (await cluster.replicar("tag", cluster.machine, name, "--wait-stored", "--json")).require().json()


async def recover(cluster: Cluster, target: Path, *point: str) -> Result:
    return await cluster.replicar("recover", cluster.machine, *point, "--disk", DISK, "--raw", target)


def put(disk: LoopDisk, seed: int) -> dict[str, str]:
    """Write some files; name to digest of all that are to be there."""
    draw, root = random.Random(seed), disk.mountpoint / "kept"
    root.mkdir(exist_ok=True)
    for number in range(12):
        (root / f"{draw.randrange(20)}").write_bytes(draw.randbytes(number * 20_000))
    return digests(root)


def digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


def held_by(image: Path, directory: Path) -> dict[str, str]:
    """The same of a recovered image, read without mounting it."""
    directory.mkdir()
    e2fsprogs.run("debugfs", "-R", f"rdump /kept {directory}", str(image))
    return digests(directory / "kept")


@asynccontextmanager
async def quiet(disk: LoopDisk) -> AsyncIterator[bytes]:
    """What is on the disk, which nothing changes in the block: not even the time of a freeze is noted on it."""
    run("mount", "-o", "remount,ro", disk.mountpoint)
    try:
        yield disk.image.read_bytes()
    finally:
        run("mount", "-o", "remount,rw", disk.mountpoint)


async def test_a_mounted_disk_comes_back_as_it_was_at_every_tag_and_at_no_other_time(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as disk:
        async with machine(tmp_path / "cluster", disk) as cluster:
            assert (await status(cluster))["state"] != "protected"  # all is copied, but there is no point yet
            made, kept = [], []
            with Churn([disk.mountpoint], seed=5):
                for number in range(2):
                    kept.append(put(disk, number))
                    made.append(await tag(cluster, f"tag-{number}"))
                    await asyncio.sleep(1.0)
            for number in range(2):
                image = tmp_path / f"{number}.raw"
                (await recover(cluster, image, "--point", f"tag-{number}")).require()
                e2fsprogs.check(image)
                assert held_by(image, tmp_path / f"files-{number}") == kept[number]
            between = (made[0]["time_ns"] + made[1]["time_ns"]) // 2000 * 1000
            refused = await recover(cluster, tmp_path / "no.raw", "--at", moment(between))
            assert refused.status != 0
            assert "trace capture orders per mark" in refused.errors
            (await recover(cluster, tmp_path / "latest.raw", "--latest")).require()
            assert (tmp_path / "latest.raw").read_bytes() == (tmp_path / "1.raw").read_bytes()

            report = (await cluster.replicar("verify", cluster.machine, "--json")).require().json()
            assert report["audits"] > 0
            assert report["audits_failed"] == 0

            now = await status(cluster)
            assert (now["state"], now["rung"]) == ("protected", "per-mark")
            assert now["capture"]["method"] in ("bpf", "tracefs")
            assert now["capture"]["points"] == 2
            assert 0 < now["capture"]["last_freeze_seconds"] <= SETTINGS["freeze_budget_seconds"]
            assert now["capture"]["compared_in_full"] == 0
            assert now["disks"][0]["nbd"] == ""
            (listed,) = (await cluster.replicar("machines", "--json")).require().json()["machines"]
            assert listed["capture"].startswith("trace by ")
            assert "last freeze" in listed["capture"]
            assert await cluster.agent.stop() == 0
            assert (await status(cluster))["state"] == "stopped"


async def test_a_quiet_disk_comes_back_to_the_byte_also_after_the_agent_was_killed(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as disk:
        put(disk, 1)
        async with machine(tmp_path / "cluster", disk) as cluster:
            async with quiet(disk) as before:
                await tag(cluster, "before")
            put(disk, 2)
            cluster.agent.kill()
            put(disk, 3)  # nobody sees this
            await cluster.start_agent()
            await whole(cluster)
            compared = (await status(cluster))["capture"]
            assert compared["equal_bytes"] > 64 * MIB  # what the replica had already was not sent again
            assert compared["copied_bytes"] < 24 * MIB
            async with quiet(disk) as after:
                await tag(cluster, "after")
            for name, content in (("before", before), ("after", after)):
                image = tmp_path / f"{name}.raw"
                (await recover(cluster, image, "--point", name)).require()
                assert image.read_bytes() == content
            assert before != after


async def test_a_tag_before_all_is_copied_is_refused_with_the_reason(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as disk:
        (disk.mountpoint / "much").write_bytes(random.Random(1).randbytes(48 * MIB))
        run("sync", "-f", disk.mountpoint)
        settings = {**SETTINGS, "seed_bytes_per_second": MIB}
        disks = {DISK: disk.device}
        async with Cluster(tmp_path / "cluster", disks=disks, agent_settings=settings, in_memory=True) as cluster:
            await cluster.start()
            (await cluster.replicar("protect", cluster.machine)).require()
            refused = await cluster.replicar("tag", cluster.machine, "early")
            assert refused.status != 0
            assert "have to be copied first" in refused.errors
            await asyncio.sleep(1.5)  # the status is written every second
            shown = await command.run("mobility-agent", "status", "--directory", cluster.agent_directory)
            assert "trace" in shown.output
            assert "have to be copied first" in shown.output


async def test_a_disk_that_can_not_be_traced_is_refused_by_name(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as disk:
        inside, settings = disk.mountpoint / "cluster", {**SETTINGS, "journal_bytes": "16 MiB"}
        settings["journal_file_bytes"] = "8 MiB"
        async with Cluster(inside, disks={DISK: disk.device}, agent_settings=settings) as cluster:
            await cluster.make_vault()
            await cluster.start_config_server()
            await cluster.enrol_agent()
            cluster.agent.start()
            assert await cluster.agent.ended(20) == 1
            assert f"disk {DISK} can't be captured by trace" in cluster.agent.said()
            assert "lies on" in cluster.agent.said()
