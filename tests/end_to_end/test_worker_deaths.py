"""The recovery worker dies at seeded instants of failing over, committing, failing back and protecting again; run
again, each job ends where it should have, with every byte where it belongs and nothing left over."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from recovery.worker.keeper import SOCKET
from replicar.control.messages import Job, JobKind, JobParameters, LifeState
from replicar.nbd.client import NbdClient
from simulator.cluster import Cluster
from simulator.recovery_host import RecoveryHost
from tests.support.tools import need

pytestmark = [pytest.mark.timeout(600)]

DISK = "data"
DISK_BYTES = 8 << 20
#: Most jobs take about so long when nobody disturbs them.
JOB_SECONDS = 2.5
#: Of the soak: four deaths each.
CIRCLES = 50


class Circle:
    """A machine without a system on its disk: QEMU runs it all the same, and it comes and goes in a second."""

    def __init__(self, cluster: Cluster, host: RecoveryHost, seed: int) -> None:
        self.cluster, self.host, self.draw = cluster, host, random.Random(seed)
        self.home = f"nbd+unix:///{DISK}?socket={cluster.nbd(DISK)}"

    async def turn(self) -> None:
        """Once around, with a death in each job."""
        at_home = await self._write(self.cluster.nbd(DISK), 40)
        over = await self._job(JobKind.FAILOVER, JobParameters(options={"memory_mib": "64"}))
        assert len(list(self.host.processes())) == 2, "one exporter and one machine"
        there = self.host.directory / "disks" / over.result["machine"] / SOCKET
        assert await _content(there) == at_home
        await self._write(there, 20)
        await self._job(JobKind.COMMIT)
        changed = await self._write(there, 20)
        options = {"verify": "all", "shut_down_seconds": "0"}
        await self._job(JobKind.FAILBACK, JobParameters(destination=self.home, options=options))
        assert await _content(self.cluster.nbd(DISK)) == changed
        await self._job(JobKind.REPROTECT)
        assert list(self.host.processes()) == []
        async with self.cluster.control() as control:
            assert (await control.machine(self.cluster.machine)).life is LifeState.PROTECTED
        recovered = self.cluster.directory / "recovered.raw"
        recovered.unlink(missing_ok=True)
        arguments: list[str | Path] = ["--latest", "--disk", DISK, "--raw", recovered]
        (await self.cluster.replicar("recover", self.cluster.machine, *arguments)).require()
        assert recovered.read_bytes() == changed

    async def _job(self, kind: JobKind, parameters: JobParameters | None = None) -> Job:
        async with self.cluster.control() as control:
            made = await control.make_job(self.cluster.machine, kind, parameters)
        await asyncio.sleep(self.draw.uniform(0, JOB_SECONDS))
        self.host.child.kill()
        self.host.child.start()
        return await self.host.ended(made.id)

    async def _write(self, socket: Path, count: int) -> bytes:
        """Writes all over a disk, zeros among them, durable; what the disk holds then."""
        async with await NbdClient.connect(socket, export=DISK) as client:
            for _ in range(count):
                length = 512 * self.draw.randrange(1, 65)
                offset = 512 * self.draw.randrange((DISK_BYTES - length) // 512 + 1)
                if self.draw.random() < 0.2:
                    await client.write_zeroes(offset, length)
                else:
                    await client.write(offset, self.draw.randbytes(length))
            await client.flush()
            return await client.read(0, DISK_BYTES)


async def _content(socket: Path) -> bytes:
    async with await NbdClient.connect(socket, export=DISK) as client:
        return await client.read(0, DISK_BYTES)


async def _turns(directory: Path, count: int, *, seed: int) -> None:
    need("qemu-system-x86_64")
    image = directory / "disk.img"
    image.write_bytes(random.Random(seed).randbytes(DISK_BYTES))
    async with Cluster(directory / "cluster", disks={DISK: image}, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        async with asyncio.timeout(60), cluster.control() as control:
            while (await control.points(cluster.machine)).ordered_from is None:
                await asyncio.sleep(0.1)
        async with RecoveryHost(cluster) as host:
            for number in range(count):
                print(f"circle {number} of seed {seed}")
                await Circle(cluster, host, seed * 1000 + number).turn()


async def test_the_worker_dies_in_every_job_of_a_circle(tmp_path: Path) -> None:
    await _turns(tmp_path, 1, seed=7)


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_the_worker_dies_two_hundred_times(tmp_path: Path) -> None:
    await _turns(tmp_path, CIRCLES, seed=70)
