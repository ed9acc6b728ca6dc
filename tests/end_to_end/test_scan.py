"""A disk that is scanned, through the real processes: what was tagged comes back, and a busy disk has no point."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from simulator.cluster import Cluster

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
DISK = "data"
#: A pass takes half a second, so that a disk which is written every few milliseconds is still for none.
SETTINGS = {"capture": "scan", "scan_every_seconds": 1.0, "journal_bytes": 256 * MIB, "seed_bytes_per_second": 40 * MIB}


def status(cluster: Cluster) -> dict[str, Any]:
    path = cluster.agent_directory / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


async def whole(cluster: Cluster) -> None:
    """Wait until the agent that runs now has been over the disk."""
    async with asyncio.timeout(60):
        while True:
            found = status(cluster)
            if found.get("process") == cluster.agent.process_id and found["capture"]["is_whole"]:
                return
            await asyncio.sleep(0.1)


def write(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def test_a_scanned_disk_comes_back_as_it_was_at_every_tag(tmp_path: Path) -> None:
    draw, image = random.Random(6), tmp_path / "disk.img"
    image.write_bytes(draw.randbytes(12 * MIB) + bytes(8 * MIB + 512))
    async with Cluster(tmp_path / "cluster", disks={DISK: image}, agent_settings=SETTINGS, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        await whole(cluster)
        states = []
        for number in range(3):
            write(image, draw.randrange(19 * MIB), draw.randbytes(100_000))
            if number == 2:
                cluster.agent.kill()
                write(image, 15 * MIB, b"while no agent ran")
                await cluster.start_agent()
                await whole(cluster)
                assert status(cluster)["capture"]["copied_bytes"] <= 4 * (64 << 10)
            states.append(image.read_bytes())
            (await cluster.replicar("tag", cluster.machine, f"tag-{number}", "--wait-stored")).require()
        for number, state in enumerate(states):
            target = tmp_path / f"{number}.raw"
            point = ("--point", f"tag-{number}", "--disk", DISK, "--raw", target)
            (await cluster.replicar("recover", cluster.machine, *point)).require()
            assert target.read_bytes() == state

        report = (await cluster.replicar("verify", cluster.machine, "--json")).require().json()
        assert report["audits"] > 0
        assert report["audits_failed"] == 0

        busy = asyncio.create_task(_never_still(image))
        refused = await cluster.replicar("tag", cluster.machine, "busy", "--wait-stored")
        busy.cancel()
        assert refused.status != 0
        assert "passes found changes" in refused.errors
        now = status(cluster)
        assert (now["state"], now["rung"]) == ("protected", "per-pass")
        assert await cluster.agent.stop() == 0


async def _never_still(image: Path) -> None:
    count = 0
    while True:
        count += 1
        write(image, 3 * MIB, count.to_bytes(8, "little"))
        await asyncio.sleep(0.002)
