"""A machine with two disks is one stream: at every instant they come back as they were together."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

from replicar.errors import ReplicarError
from replicar.nbd.client import NbdClient
from simulator.application import Application
from simulator.cluster import Cluster
from simulator.demo.story import moment
from simulator.oracle import LATEST_NS, FileImage, Oracle
from simulator.workload import paced, whole_disk
from simulator.workloads import Kind, Workload

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


async def test_disks_come_grow_and_go_and_every_point_has_those_of_its_time(tmp_path: Path) -> None:
    """Each point of the story has the disks, sizes and bytes of its time, whatever came later."""
    images = {name: tmp_path / f"{name}.img" for name in ("system", "data")}
    for name, image in images.items():
        image.write_bytes(random.Random(name).randbytes(4 * MIB))
    kept: dict[str, dict[str, bytes]] = {}

    async def point(cluster: Cluster, name: str) -> None:
        for number, disk in enumerate(sorted(cluster.disks)):
            async with await NbdClient.connect(cluster.nbd(disk), export=disk) as client:
                await client.write(65536 * (len(kept) + number), random.Random(name).randbytes(4096), fua=True)
                size = cluster.disks[disk].stat().st_size
                await client.write(size - 512, name.encode().ljust(512, b"."), fua=True)
        (await cluster.replicar("tag", cluster.machine, name, "--wait-stored")).require()
        kept[name] = {disk: image.read_bytes() for disk, image in cluster.disks.items()}

    async with Cluster(tmp_path / "cluster", disks={"system": images["system"]}, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        await _protected(cluster)
        await point(cluster, "one-disk")
        await cluster.change_disks(images)
        cluster.agent.kill()  # while the new one is copied
        await cluster.start_agent()
        await _protected(cluster)
        await point(cluster, "a-second-one")
        with images["data"].open("r+b") as file:
            file.truncate(9 * MIB + 512)
        async with asyncio.timeout(20):
            while not any(disk["grown_bytes"] == 5 * MIB + 512 for disk in cluster.agent_status()["disks"]):
                await asyncio.sleep(0.2)
        await cluster.change_disks(images)
        await _protected(cluster)
        await point(cluster, "that-grew")
        await cluster.change_disks({"data": images["data"]})
        await point(cluster, "alone")
        (listed,) = (await cluster.replicar("machines", "--json")).require().json()["machines"]
        assert [disk["name"] for disk in listed["disks"]] == ["data"]
        for name, disks in kept.items():
            target = tmp_path / name
            target.mkdir()
            arguments: list[str | Path] = ["--point", name, "--all", "--raw", target / "{disk}"]
            (await cluster.replicar("recover", cluster.machine, *arguments)).require()
            assert {path.name: path.read_bytes() for path in target.iterdir()} == disks
        (await cluster.replicar("verify", cluster.machine)).require()


async def test_settings_that_can_not_be_used_change_nothing_and_are_said(tmp_path: Path) -> None:
    image = tmp_path / "system.img"
    image.write_bytes(bytes(MIB))
    async with Cluster(tmp_path / "cluster", disks={"system": image}) as cluster:
        await cluster.make_vault()
        await cluster.start_config_server()
        await cluster.enrol_agent()
        await cluster.start_agent()
        path, process_id = cluster.agent_directory / "settings.toml", cluster.agent.process_id
        assert process_id is not None
        sound = path.read_text()
        for broken, said in (
            (sound + "jurnal_bytes = 1\n", "are not reloaded"),
            (sound.replace("system.img", "missing.img"), "can't be used"),
        ):
            path.write_text(broken)
            os.kill(process_id, signal.SIGHUP)
            async with asyncio.timeout(20):
                while said not in cluster.agent.said():
                    await asyncio.sleep(0.1)
                while True:
                    try:
                        async with await NbdClient.connect(cluster.nbd("system"), export="system") as client:
                            await client.write(0, b"still".ljust(512, b"!"), fua=True)
                        break
                    except ReplicarError:
                        await asyncio.sleep(0.1)
        assert cluster.agent.process_id == process_id


async def _protected(cluster: Cluster) -> None:
    async with asyncio.timeout(60), cluster.control() as control:
        while (await control.points(cluster.machine)).ordered_from is None:
            await asyncio.sleep(0.1)


async def _write(cluster: Cluster, oracles: dict[str, Oracle]) -> list[int]:
    """Write to both disks at once; gives instants (whole microseconds) at which both were busy."""
    applications = []
    for name, oracle in oracles.items():
        space = whole_disk(oracle.size_bytes // 4096 * 4096)
        writes = Workload(Kind.UNIFORM, block_bytes=(4096,)).on(space, random.Random(name))
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
