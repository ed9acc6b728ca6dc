"""A guest boots from a disk behind the agent, works, and boots again from its recovered copies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from simulator import e2fsprogs
from simulator.cluster import Cluster
from simulator.guest import PARTITION_BYTES, Guest, make_disk, missing

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]

DISK = "system"


def _partition(image: Path, target: Path) -> Path:
    with image.open("rb") as file, target.open("wb") as copy:
        file.seek(PARTITION_BYTES)
        while piece := file.read(1 << 20):
            copy.write(piece)
    return target


async def _recovered(cluster: Cluster, image: Path, *point: str) -> Path:
    (await cluster.replicar("recover", cluster.machine, *point, "--disk", DISK, "--raw", image)).require()
    return image


async def test_a_guest_boots_from_the_agent_and_again_from_what_was_recovered(tmp_path: Path) -> None:
    if words := missing():
        pytest.skip(words)
    image = tmp_path / "system.img"
    make_disk(image)
    async with Cluster(tmp_path / "cluster", disks={DISK: image}, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        async with Guest(f"nbd+unix:///{DISK}?socket={cluster.nbd(DISK)}") as guest:
            await guest.until("record", count=5)
            assert guest.said("boot") == 1
            await _whole(cluster)
            await guest.until("record", count=len(guest.records) + 3)
            before = len(guest.records)
            (await cluster.replicar("tag", cluster.machine, "working", "--wait-stored")).require()
            after = len(guest.records) + 1  # one may have been under way
            await guest.until("record", count=after + 3)
            await guest.quit()
            written = guest.records
        (await cluster.replicar("tag", cluster.machine, "off", "--wait-stored")).require()
        latest = await _recovered(cluster, tmp_path / "latest.raw", "--latest")
        working = await _recovered(cluster, tmp_path / "working.raw", "--point", "working")
    assert latest.read_bytes() == image.read_bytes()
    e2fsprogs.check(_partition(latest, tmp_path / "partition.raw"))

    async with Guest(str(latest)) as again:
        await again.until("record")
        assert (again.said("boot"), again.said("kept")) == (2, len(written))
        await again.quit()
    async with Guest(str(working)) as again:  # as after a power cut at the point: its journal is replayed
        await again.until("record")
        assert again.said("boot") == 2
        assert before <= again.said("kept") <= after
        await again.quit()
    e2fsprogs.check(_partition(working, tmp_path / "partition.raw"))


async def _whole(cluster: Cluster) -> None:
    async with asyncio.timeout(60), cluster.control() as control:
        while (await control.points(cluster.machine)).ordered_from is None:
            await asyncio.sleep(0.1)
