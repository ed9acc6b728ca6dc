"""The application on a disk served by others: what it did is on the disk, and what it saw is what the oracle knows."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from pathlib import Path

import pytest

from replicar.errors import PermanentError, TransientError
from simulator.application import Application
from simulator.oracle import LATEST_NS, FileImage, Oracle
from simulator.workload import Action, Extent, Operation, Space, oltp, paced, uniform, whole_disk
from tests.nbd.nbd_servers import nbdkit, qemu_nbd

DISK_BYTES = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return path


@pytest.fixture
def oracle(image: Path, tmp_path: Path) -> Oracle:
    return Oracle(image, tmp_path / "oracle")


def _database(seed: int = 3) -> itertools.chain[Operation]:
    tables, log = Space([Extent(0, 3 << 20)]), Space([Extent(3 << 20, 1 << 20)])
    return itertools.chain(oltp(tables, log, random.Random(seed)))


async def test_the_disk_holds_what_the_oracle_expects(image: Path, oracle: Oracle) -> None:
    operations = (op for op in itertools.islice(_database(), 2000) if op.action is not Action.TRIM)
    async with qemu_nbd(image) as (socket, _):
        application = Application(socket, oracle, paced(operations), seed=9, depth=16)
        await application.run()
    comparison = oracle.compare(FileImage(image), "end")
    assert comparison.equal, str(comparison)
    assert comparison.changes_required == len(oracle.changes) > 1000
    assert application.tally.bytes_written + application.tally.bytes_zeroed == oracle.bytes_acknowledged
    assert application.tally.operations > application.tally.flushes > 0


async def test_at_a_quiet_instant_nothing_is_in_flight_and_the_disk_says_so(image: Path, oracle: Oracle) -> None:
    writes = paced(uniform(whole_disk(DISK_BYTES), random.Random(4)), operations_per_second=2000)
    async with qemu_nbd(image) as (socket, _):
        application = Application(socket, oracle, writes, depth=8)
        instant = 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(application.run())
            for round_number in range(3):
                await asyncio.sleep(0.1)
                async with application.quiet() as instant:
                    assert oracle.in_flight == 0
                    assert oracle.last_acknowledged_ns < instant
                    known = len(oracle.changes)
                    await application.flush()
                    await asyncio.sleep(0.1)
                    assert len(oracle.changes) == known
                    comparison = oracle.compare(FileImage(image), f"quiet-{round_number}", instant)
                    assert comparison.equal, str(comparison)
                    assert comparison.changes_undecided == 0
            await asyncio.sleep(0.1)
            application.stop()
    assert oracle.changes[-1].issued_ns > instant


async def test_overlapping_operations_wait_for_each_other(tmp_path: Path, oracle: Oracle) -> None:
    same = [(0.0, Operation(Action.WRITE, 4096, 4096)) for _ in range(4)]
    slow = ("--filter=delay", "memory", str(DISK_BYTES), "wdelay=50ms")
    async with nbdkit(tmp_path / "nbd", *slow) as (socket, _):
        began = time.monotonic()
        await Application(socket, oracle, iter(same), depth=8).run()
        assert time.monotonic() - began > 0.2
    for change, following in itertools.pairwise(oracle.changes):
        assert change.acknowledged_ns is not None
        assert change.acknowledged_ns <= following.issued_ns


async def test_a_killed_server_loses_what_was_in_flight_and_no_more(image: Path, oracle: Oracle) -> None:
    writes = paced(uniform(whole_disk(DISK_BYTES), random.Random(5), (4096, 16384)), operations_per_second=3000)
    application = Application(image.with_suffix(".sock"), oracle, writes, depth=8, reconnect_seconds=10)
    async with asyncio.TaskGroup() as tasks:
        running: asyncio.Task[None] | None = None
        for _ in range(3):
            async with qemu_nbd(image) as (_, process):
                running = running or tasks.create_task(application.run())
                await asyncio.sleep(0.3)
                process.kill()
                await process.wait()
        async with qemu_nbd(image):
            await asyncio.sleep(0.3)
            application.stop()
            assert running is not None
            await running
    assert application.tally.reconnects == 3
    assert 0 < application.tally.changes_lost <= 3 * 8
    comparison = oracle.compare(FileImage(image), "after", LATEST_NS)
    assert comparison.equal, str(comparison)


async def test_without_patience_a_lost_server_ends_the_run_with_its_error(image: Path, oracle: Oracle) -> None:
    writes = paced(uniform(whole_disk(DISK_BYTES), random.Random(6)), operations_per_second=500)
    with pytest.raises(TransientError, match="no NBD server answers"):
        await Application(image.with_suffix(".sock"), oracle, writes).run()
    async with qemu_nbd(image) as (socket, process):
        running = asyncio.create_task(Application(socket, oracle, writes).run())
        await asyncio.sleep(0.2)
        process.kill()
        with pytest.raises(TransientError):
            await running


async def test_a_disk_that_refuses_ends_the_run_with_what_it_said(tmp_path: Path, oracle: Oracle) -> None:
    full = ("--filter=error", "memory", str(DISK_BYTES), "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    writes = paced(uniform(whole_disk(DISK_BYTES), random.Random(7)))
    async with nbdkit(tmp_path / "nbd", *full) as (socket, _):
        with pytest.raises(PermanentError, match="No space left"):
            await Application(socket, oracle, writes).run()
