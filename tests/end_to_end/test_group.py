"""Two machines at one instant: what one of them has because of the other, the other one has."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from replicar.nbd.client import NbdClient
from simulator import command
from simulator.child import Child
from simulator.cluster import READY_SECONDS, Cluster, write_toml
from simulator.command import Result

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
DISK = "data"
COUNTER = struct.Struct("<Q")


@dataclass
class Second:
    """Another machine of the cluster's vault."""

    agent: Child
    socket: Path
    name: str = "db"


@asynccontextmanager
async def two_machines(directory: Path) -> AsyncIterator[tuple[Cluster, Second]]:
    """Both protected and in order."""
    images = [directory / f"{name}.img" for name in ("shop", "db")]
    for image in images:
        with image.open("wb") as file:
            file.truncate(8 * MIB)
    async with Cluster(directory / "cluster", disks={DISK: images[0]}, in_memory=True) as cluster:
        await cluster.start()
        second = await _second(cluster, directory / "db", images[1])
        try:
            for name in (cluster.machine, second.name):
                (await cluster.replicar("protect", name)).require()
            async with cluster.control() as control, asyncio.timeout(60):
                for name in (cluster.machine, second.name):
                    while (await control.points(name)).ordered_from is None:
                        await asyncio.sleep(0.1)
            yield cluster, second
        finally:
            second.agent.kill()


async def _second(cluster: Cluster, directory: Path, image: Path) -> Second:
    directory.mkdir()
    socket = cluster.nbd(DISK).with_name("db.sock")
    program: list[str | Path] = [*command.program("mobility-agent"), "run", "--settings", directory / "s.toml"]
    second = Second(Child("db", program, directory / "said.txt"), socket)
    passphrase = ("--passphrase-file", cluster.vault / "passphrase")
    where = ("--config-server", cluster.config_server_address, "--directory", directory, "--name", second.name)
    (await command.run("mobility-agent", "enrol", *where, *passphrase)).require()
    settings: dict[str, Any] = {"directory": str(directory), "journal_bytes": 256 * MIB, "mark_every_seconds": 0}
    write_toml(directory / "s.toml", settings | {"disks": [{"name": DISK, "path": str(image), "nbd": str(socket)}]})
    second.agent.start()
    await second.agent.until("serving its disk", socket.exists, READY_SECONDS)
    return second


@asynccontextmanager
async def counting(cluster: Cluster, second: Second) -> AsyncIterator[None]:
    """An application that counts on the first machine, and then, because that was acknowledged, on the second."""

    async def count() -> None:
        async with (
            await NbdClient.connect(cluster.nbd(DISK), export=DISK) as first,
            await NbdClient.connect(second.socket, export=DISK) as other,
        ):
            number = 0
            while True:
                number += 1
                await first.write(0, COUNTER.pack(number).ljust(512, b"\0"))
                await other.write(0, COUNTER.pack(number).ljust(512, b"\0"))

    task = asyncio.create_task(count())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def tag(cluster: Cluster, second: Second, name: str, *options: str) -> Result:
    return await cluster.replicar("tag", cluster.machine, name, "--with", second.name, "--json", *options)


async def counted(cluster: Cluster, machine: str, point: str) -> int:
    """How far the count is on a machine's recovered disk."""
    path = cluster.directory / "recovered.raw"
    path.unlink(missing_ok=True)
    (await cluster.replicar("recover", machine, "--point", point, "--disk", DISK, "--raw", path)).require()
    (number,) = COUNTER.unpack_from(path.read_bytes())
    return int(number)


async def _story(directory: Path, groups: int) -> None:
    async with two_machines(directory) as (cluster, second):
        async with counting(cluster, second):
            for number in range(groups):
                made = (await tag(cluster, second, f"group-{number}", "--wait-stored")).require().json()
                assert [member["machine"] for member in made["members"]] == [cluster.machine, second.name]
                assert all(0 < member["held_seconds"] < 2 for member in made["members"])
        last = 0
        for number in range(groups):
            first = await counted(cluster, cluster.machine, f"group-{number}")
            other = await counted(cluster, second.name, f"group-{number}")
            assert first - 1 <= other <= first  # the effect is never there without its cause
            assert other > last
            last = other
        listed = (await cluster.replicar("points", second.name, "--json")).require().json()["points"]
        assert {point["kind"] for point in listed} == {"group"}


async def test_no_group_point_has_an_effect_without_its_cause(tmp_path: Path) -> None:
    await _story(tmp_path, 2)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_fifty_group_points(tmp_path: Path) -> None:
    await _story(tmp_path, 50)


async def test_a_machine_that_hangs_holds_nobody_for_long_and_is_named(tmp_path: Path) -> None:
    async with two_machines(tmp_path) as (cluster, second), counting(cluster, second):
        process = second.agent.process_id
        assert process is not None
        os.kill(process, signal.SIGSTOP)
        try:
            refused = await tag(cluster, second, "never", "--hold-seconds", "1")
        finally:
            os.kill(process, signal.SIGCONT)
        assert refused.status != 0
        assert "db did not say in time" in json.loads(refused.output)["message"]
        async with asyncio.timeout(30):  # and writers of both go on
            while await _captured(cluster) == await _captured(cluster):
                pass
        (await tag(cluster, second, "afterwards")).require()
        listed = (await cluster.replicar("points", cluster.machine, "--json")).require().json()["points"]
        assert [point["name"] for point in listed] == ["afterwards"]


async def _captured(cluster: Cluster) -> int:
    await asyncio.sleep(1.5)
    async with cluster.control() as control:
        return (await control.machine(cluster.machine)).captured_sequence
