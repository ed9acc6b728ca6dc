"""A machine with two disks is one stream: at every instant they come back as they were together."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from simulator.application import Application
from simulator.cluster import Cluster
from simulator.demo.story import moment
from simulator.oracle import LATEST_NS, FileImage, Oracle
from simulator.workload import paced, uniform, whole_disk

MIB = 1 << 20
SIZES = {"system": 8 * MIB, "data": 12 * MIB - 512}


async def test_two_disks_of_a_machine_agree_at_every_instant(tmp_path: Path) -> None:
    images = {name: tmp_path / f"{name}.img" for name in SIZES}
    for name, size in SIZES.items():
        images[name].write_bytes(random.Random(name).randbytes(size))
    oracles = {name: Oracle(image, tmp_path / f"oracle-{name}") for name, image in images.items()}
    async with Cluster(tmp_path / "cluster", disks=images, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        await _protected(cluster)
        instants = await _write(cluster, oracles)
        (await cluster.replicar("tag", cluster.machine, "settled", "--wait-stored")).require()
        for number, instant in enumerate([*instants, LATEST_NS]):
            target = tmp_path / f"{number}"
            target.mkdir()
            point = ["--latest"] if instant == LATEST_NS else ["--at", moment(instant)]
            recovering = await cluster.replicar(
                "recover", cluster.machine, *point, "--all", "--raw", target / "{disk}.raw"
            )
            recovering.require()
            for name, oracle in oracles.items():
                comparison = oracle.compare(FileImage(target / f"{name}.raw"), f"{number}", instant)
                assert comparison.equal, f"{name} at {instant}: {comparison}"
                assert comparison.changes_required > 0


async def _protected(cluster: Cluster) -> None:
    async with asyncio.timeout(60), cluster.control() as control:
        while (await control.points(cluster.machine)).ordered_from is None:
            await asyncio.sleep(0.1)


async def _write(cluster: Cluster, oracles: dict[str, Oracle]) -> list[int]:
    """Write to both disks at once; gives instants (whole microseconds) at which both were busy."""
    applications = []
    for name, oracle in oracles.items():
        writes = uniform(whole_disk(oracle.size_bytes // 4096 * 4096), random.Random(name))
        paced_writes = paced(writes, operations_per_second=600)
        applications.append(Application(cluster.nbd(name), oracle, paced_writes, export=name))
    instants: list[int] = []
    async with asyncio.TaskGroup() as tasks:
        for application in applications:
            tasks.create_task(application.run())
        for _ in range(2):
            await asyncio.sleep(0.7)
            instants.append(max(oracle.changes[-1].issued_ns for oracle in oracles.values()) // 1000 * 1000)
        await asyncio.sleep(0.3)
        for application in applications:
            application.stop()
    return instants
