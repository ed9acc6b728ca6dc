"""The world's own parts: time that costs nothing, disks that forget, connections that keep order, final deaths."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mobility_agent.mapped import MappedFile
from replicar.errors import ReplicarError
from simulator.world.blobs import BlobClient, Weather
from simulator.world.calls import Device
from simulator.world.cast import MACHINES, SERVERS
from simulator.world.files import PAGE
from simulator.world.loop import StuckError, VirtualLoop
from simulator.world.network import VirtualNetwork
from simulator.world.processes import Process
from simulator.world.truth import Truth, make
from simulator.world.world import World, standing

DB, PS = MACHINES[0], SERVERS[0]


@pytest.fixture
def world() -> Iterator[World]:
    with standing(1) as made:
        yield made


def test_a_virtual_hour_takes_no_time() -> None:
    loop, began = VirtualLoop(random.Random(1)), time.monotonic()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.time() >= 3600
    assert time.monotonic() - began < 30
    loop.close()


def test_time_passes_for_those_who_wait_for_less_than_a_float_can_say() -> None:
    """A server with a deadline 1e-16 seconds ahead looked at the clock for ever (seed 2013 of that day)."""
    loop = VirtualLoop(random.Random(1))

    async def wait() -> None:
        await asyncio.sleep(60)
        deadline = loop.time() + 1e-13
        while deadline > loop.time():
            with suppress(TimeoutError):
                async with asyncio.timeout(1e-17):
                    await loop.create_future()

    loop.run_until_complete(wait())
    loop.close()


def test_a_loop_in_which_nothing_can_happen_says_so() -> None:
    loop = VirtualLoop(random.Random(1))
    with pytest.raises(StuckError):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_a_thread_s_work_is_done_once_and_answered_later() -> None:
    loop = VirtualLoop(random.Random(1))
    done: list[int] = []

    async def story() -> None:
        await asyncio.to_thread(done.append, 1)

    loop.run_until_complete(story())
    assert done == [1]
    assert loop.time() > 0
    loop.close()


def _write(path: Path, data: bytes, *, sync: bool) -> Callable[[Process], object]:
    async def main(process: Process) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(descriptor, data, 0)
        if sync:
            os.fsync(descriptor)
        await asyncio.sleep(1000)

    return main


@pytest.mark.parametrize("sync", [True, False])
def test_a_power_cut_keeps_what_was_synced(sync: bool) -> None:
    lost = 0
    for seed in range(20):
        with standing(seed) as world:
            path = world.machines[DB].directory / "file"
            world.start(DB, "writer", _write(path, b"x" * 3 * PAGE, sync=sync))  # type: ignore[arg-type]
            world.loop.run_until_complete(asyncio.sleep(1))
            world.power_off(DB)
            whole = path.exists() and path.read_bytes() == b"x" * 3 * PAGE
            lost += not whole
    assert lost == 0 if sync else lost > 5


def test_a_killed_process_leaves_its_writes_and_runs_nothing_more(world: World) -> None:
    path, after = world.machines[DB].directory / "file", []

    async def main(process: Process) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(descriptor, b"one", 0)
        try:
            await asyncio.sleep(5)
        finally:
            after.append(1)

    process = world.start(DB, "writer", main)
    world.loop.run_until_complete(asyncio.sleep(1))
    world.kill(process)
    world.loop.run_until_complete(asyncio.sleep(10))
    assert path.read_bytes() == b"one"
    assert not after


def test_a_process_can_die_within_any_call(world: World) -> None:
    path, reached = world.machines[DB].directory / "file", []

    async def main(process: Process) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        for number in range(10):
            os.pwrite(descriptor, bytes([number]), number)
            reached.append(number)

    process = world.start(DB, "writer", main)
    process.dies_in = 6
    world.loop.run_until_complete(asyncio.sleep(1))
    assert not process.alive
    assert reached == [0, 1, 2, 3]


class _Collector(asyncio.Protocol):
    def __init__(self, got: bytearray) -> None:
        self._got = got

    def data_received(self, data: bytes) -> None:
        self._got += data


def test_a_connection_keeps_order_through_cuts(world: World) -> None:
    got, sent = bytearray(), random.Random(2).randbytes(600_000)

    async def listen(process: Process) -> None:
        await world.loop.create_server(lambda: _Collector(got), "", 1)
        await asyncio.sleep(1000)

    async def send(process: Process) -> None:
        transport, _ = await world.loop.create_connection(asyncio.Protocol, PS, 1)
        for start in range(0, len(sent), 10_000):
            transport.write(sent[start : start + 10_000])
            await asyncio.sleep(0.01)
        await asyncio.sleep(1000)  # a process that ends takes along what it had not sent

    world.start(PS, "listener", listen)
    world.start(DB, "sender", send)
    world.loop.run_until_complete(asyncio.sleep(0.3))
    world.network.shut(DB, PS)
    world.loop.run_until_complete(asyncio.sleep(5))
    assert 0 < len(got) < len(sent)
    world.network.reopen(DB, PS)
    world.loop.run_until_complete(asyncio.sleep(5))
    assert bytes(got) == sent


def test_there_is_no_other_network() -> None:
    assert VirtualLoop.create_connection is not asyncio.BaseEventLoop.create_connection
    assert VirtualNetwork.connect is not None


def test_a_write_that_timed_out_may_land_later(world: World) -> None:
    failed = []

    async def main(process: Process) -> None:
        client = BlobClient(world.blobs)
        await client.ensure_container()
        await client.create("blob", 4096)
        world.blobs.weather = Weather(late=1.0, late_seconds=50.0)
        try:
            await client.put_pages("blob", 0, b"z" * 512)
        except ReplicarError as error:
            failed.append(error)

    world.start(PS, "writer", main)
    world.loop.run_until_complete(asyncio.sleep(100))
    assert failed
    assert world.blobs.carry_out(lambda: world.blobs.inner.read("blob", 0, 512))[0] == b"z" * 512


def test_the_truth_tells_lost_misplaced_and_too_new_apart() -> None:
    truth = Truth(9, bytes(16 * 512))
    first = truth.issue(0, 4, 1, 10)
    truth.acknowledge(first, 12)
    second = truth.issue(2, 4, 2, 20)
    truth.acknowledge(second, 22)
    old, new = make(9, 1, 0, 0, 4), make(9, 2, 0, 2, 4)
    rest = bytes(12 * 512)
    assert not truth.differences(old + rest, 15)
    assert not truth.differences(old[:1024] + new + rest, 30)
    assert "zeros" in truth.differences(bytes(16 * 512), 15)[0]
    assert "write 2" in truth.differences(old[:1024] + new + rest, 15)[0]
    assert "another place" in truth.differences(bytes(512) + old + bytes(11 * 512), 15)[1]
    assert "damaged" in truth.differences(old[:100] + b"!" + old[101:] + rest, 15)[0]


@pytest.mark.parametrize("again", ["nothing", "the same bytes", "other bytes"])
def test_what_a_failed_sync_dropped_is_written_when_it_is_stored_again_whatever_it_holds(again: str) -> None:
    lost = 0
    for seed in range(10):
        with standing(seed) as world:
            path, content = world.machines[DB].directory / "file", b"x" * PAGE

            async def main(process: Process, path: Path = path, content: bytes = content) -> None:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                os.ftruncate(descriptor, PAGE)
                os.fsync(descriptor)
                with mmap.mmap(descriptor, PAGE) as mapping:
                    mapping[:] = content
                    world.calls.devices[DB] = _FailingSyncs()
                    with pytest.raises(OSError, match="Input/output error"):
                        os.fsync(descriptor)
                    world.calls.devices[DB] = Device()
                    if again != "nothing":
                        mapping[100:200] = (b"x" if again == "the same bytes" else b"y") * 100
                    os.fsync(descriptor)
                    await asyncio.sleep(1000)

            world.start(DB, "writer", main)
            world.loop.run_until_complete(asyncio.sleep(1))
            world.power_off(DB)
            assert len(path.read_bytes()) == PAGE
            lost += path.read_bytes()[:100] != content[:100]
    assert lost == (10 if again == "nothing" else 0)


class _FailingSyncs(Device):
    def before(self, call: str, path: str, offset: int, length: int) -> None:
        if call == "sync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("is_mended", [True, False])
def test_a_map_of_which_a_sync_failed_is_stored_again_before_the_next(is_mended: bool) -> None:
    with standing(3) as world:
        path = world.machines[DB].directory / "map"

        async def main(process: Process) -> None:
            file = MappedFile(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), _sized(path, 3 * PAGE))
            file.sync()
            view = memoryview(file.mapping)  # as a map's array does: the world can't see what is stored there
            view[PAGE : PAGE + 4] = b"mark"
            world.calls.devices[DB] = _FailingSyncs()
            with pytest.raises(OSError, match="Input/output error"):
                await file.sync_aside()
            world.calls.devices[DB] = Device()
            if is_mended:
                await file.sync_aside()
            else:
                os.fdatasync(file.fd)
            await asyncio.sleep(1000)

        world.start(DB, "agent", main)
        world.loop.run_until_complete(asyncio.sleep(5))
        world.power_off(DB)
        assert (path.read_bytes()[PAGE : PAGE + 4] == b"mark") == is_mended


def _sized(path: Path, size: int) -> int:
    os.truncate(path, size)
    return size
