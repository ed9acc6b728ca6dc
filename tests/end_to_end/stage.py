"""A small disk under a database's writes on a whole cluster, and its recovery held against the oracle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from simulator import command, disk_image, e2fsprogs
from simulator.application import Application
from simulator.cluster import Cluster
from simulator.disk_image import DiskImage
from simulator.oracle import LATEST_NS, Comparison, FileImage, Oracle
from simulator.workload import Space, paced
from simulator.workloads import Kind, Workload
from tests.support.tools import need

DISK = "data"
DISK_BYTES = (24 << 20) - 12288
REPLICATION_SECONDS = 60.0


class Stage:
    """A cluster with one machine and one disk, everything running; `write` makes it busy."""

    def __init__(self, cluster: Cluster, image: DiskImage, oracle: Oracle) -> None:
        self.cluster = cluster
        self.image = image
        self.oracle = oracle
        self._seed = 0

    @asynccontextmanager
    async def writing(self, *, bytes_per_second: float = 4e6, seed: int = 1) -> AsyncIterator[Application]:
        """Writes go on while the block runs; they survive an agent that is away for a while."""
        *tables, log = self.image.database_extents().values()
        space = Space([extent for extents in tables for extent in extents])
        self._seed += 1
        operations = Workload(Kind.OLTP).on(space, random.Random(seed), log=Space(log))
        application = Application(
            self.cluster.nbd(DISK),
            self.oracle,
            paced(operations, bytes_per_second=bytes_per_second),
            export=DISK,
            seed=self._seed,
            reconnect_seconds=30.0,
        )
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(application.run())
            yield application
            async with application.quiet():
                await application.flush()
            application.stop()
            await running

    async def protect(self) -> None:
        """Enable protection and wait until points are offered."""
        (await self.cluster.replicar("protect", self.cluster.machine)).require()
        await self.whole()

    async def whole(self) -> None:
        """Wait until the stream is in no gap: from then on every write is a point again."""
        async with asyncio.timeout(REPLICATION_SECONDS), self.cluster.control() as control:
            while (await control.points(self.cluster.machine)).ordered_from is None:
                await asyncio.sleep(0.1)

    async def tag(self, name: str, *options: str) -> dict[str, Any]:
        """Make a named point; what the command printed."""
        return (await self.cluster.replicar("tag", self.cluster.machine, name, *options, "--json")).require().json()

    async def settle(self, name: str = "settled") -> None:
        """Return when everything written so far is in storage."""
        await self.tag(name, "--wait-stored")

    async def recover(
        self, *point: str, at_ns: int = LATEST_NS, limit_seconds: float = command.LIMIT_SECONDS
    ) -> Comparison:
        """Recover a point as a raw file and hold it against the oracle; the file system is checked as well."""
        path = self.cluster.directory / "recovered.raw"
        path.unlink(missing_ok=True)
        machine = self.cluster.machine
        words = ("recover", machine, *point, "--disk", DISK, "--raw", str(path))
        (await self.cluster.replicar(*words, limit_seconds=limit_seconds)).require()
        e2fsprogs.check(path)
        return await asyncio.to_thread(self.oracle.compare, FileImage(path), "recovered", at_ns)

    def recovered(self) -> Path:
        """The file that `recover` made last."""
        return self.cluster.directory / "recovered.raw"


def make_image(directory: Path) -> DiskImage:
    """A small disk of real files and a database."""
    need("mkfs.ext4")
    return disk_image.make(
        directory,
        size_bytes=DISK_BYTES,
        files_bytes=3 << 20,
        database_bytes=(4 << 20, 2 << 20),
        randomness=random.Random(11),
    )


@asynccontextmanager
async def stage(directory: Path, **settings: Any) -> AsyncIterator[Stage]:
    """Everything started and protected."""
    image = make_image(directory / "image")
    async with Cluster(directory, disks={DISK: image.path}, in_memory=True, **settings) as cluster:
        await cluster.start()
        made = Stage(cluster, image, Oracle(image.path, directory / "oracle"))
        await made.protect()
        yield made
