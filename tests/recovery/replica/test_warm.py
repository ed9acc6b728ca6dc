"""A warm replica holds the point it says, whenever its writer dies and however late its requests arrive."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from recovery.extents import ExtentMap, Ints
from recovery.points import Named
from recovery.replica.journal import Phase
from recovery.replica.ranges import between, joined
from recovery.replica.warm import FILL_BYTES, WarmReplica, read_journal
from replicar.clock import SystemClock
from replicar.errors import ConflictError, CorruptionError, FencedError, PermanentError, TransientError
from replicar.formats import vhd
from replicar.formats.record import DiskAction
from replicar.storage import MemoryStore
from replicar.storage.store import Pages
from tests.recovery.log_builder import LogBuilder

SECTOR = 512
SIZES = (700 * SECTOR, 90 * SECTOR)


class KilledError(Exception):
    """The process is gone."""


class Weather(MemoryStore):
    """A store in memory whose user dies after so many writes, and whose time-outs land later, if they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.life = -1  # writes until death; -1: for ever
        self.lost_share = 0.0
        self.late: list[Callable[[], Awaitable[None]]] = []
        self.refused = 0

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        content = bytes(data)

        async def land() -> None:
            await super(Weather, self).put_pages(
                name, offset, content, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt
            )

        if not name.startswith("replicas/"):
            await land()
            return
        if self.life == 0:
            if self.random.random() < 0.5:  # it is on its way, or was just done
                self.late.append(land)
            elif self.random.random() < 0.5:
                await land()
            raise KilledError
        self.life -= self.life > 0
        if self.random.random() < self.lost_share:
            self.late.append(land)
            raise TransientError("no answer", outcome_certain=False)
        await land()
        if self.late and self.random.random() < 0.3:
            await self.let_land()

    async def let_land(self) -> None:
        """One request that was thought lost arrives."""
        land = self.late.pop(self.random.randrange(len(self.late)))
        try:
            await land()
        except (FencedError, PermanentError):
            self.refused += 1


@pytest.fixture
async def store() -> Weather:
    weather = Weather()
    await weather.ensure_container()
    return weather


@pytest.fixture
async def builder(store: Weather) -> LogBuilder:
    return LogBuilder(store)


def replica(builder: LogBuilder, *, fill_bytes: int = FILL_BYTES) -> WarmReplica:
    return WarmReplica(builder.log, builder.store, clock=SystemClock(), random=os.urandom, fill_bytes=fill_bytes)


async def busy(builder: LogBuilder, random_: random.Random, segments: int = 1, *, sectors: int = 700) -> None:
    """Writes, to the first so many sectors of the disks."""
    for _ in range(segments):
        for _ in range(random_.randrange(1, 9)):
            disk = random_.randrange(2)
            length = random_.choice((1, 4, 8))
            offset = SECTOR * random_.randrange(min(sectors, SIZES[disk] // SECTOR) - length)
            if random_.random() < 0.3:
                builder.zero(disk, offset, length * SECTOR)
            else:
                builder.write(disk, offset, random_.randbytes(length * SECTOR))
        await builder.seal()


async def held(builder: LogBuilder, disk: int) -> bytes:
    """What a disk's blob holds; it is a VHD."""
    name = f"replicas/{builder.machine_id}/{disk}.vhd"
    size = (await builder.store.properties(name)).size_bytes
    data = await builder.store.read(name, 0, size)
    assert vhd.read_footer(data[-512:]).virtual_bytes == size - 512
    return data[: len(builder.disks[disk])]


async def check(builder: LogBuilder, sequence: int) -> None:
    for disk, content in builder.expected[sequence].items():
        assert await held(builder, disk) == content, f"disk {disk} at {sequence}"


async def test_round_by_round_it_holds_the_latest_point_and_writes_what_changed(builder: LogBuilder) -> None:
    random_ = random.Random(1)
    builder.begin(*SIZES)
    await busy(builder, random_, 5)
    async with replica(builder) as it:
        first = await it.advance()
        assert first.full
        for _ in range(6):
            await busy(builder, random_, 2)
            round_ = await it.advance()
            assert not round_.full
            assert round_.sequence == builder.sequence - 1
            assert round_.written_bytes < 300 * SECTOR
            await check(builder, round_.sequence)
        assert (await it.advance()).written_bytes == 0


async def test_a_page_that_is_written_over_and_over_is_written_once(builder: LogBuilder) -> None:
    builder.begin(*SIZES)
    await builder.seal()
    async with replica(builder) as it:
        await it.advance()
        for number in range(200):
            builder.write(0, 8 * SECTOR, bytes([number]) * SECTOR)
            if number % 50 == 0:
                await builder.seal()
        await builder.seal()
        assert (await it.advance()).written_bytes == SECTOR


async def test_another_point_ahead_may_be_asked_for_and_none_behind(builder: LogBuilder) -> None:
    random_ = random.Random(2)
    builder.begin(*SIZES)
    await busy(builder, random_)
    builder.mark("early")
    await busy(builder, random_)
    point = builder.mark("later")
    builder.write(0, 0, b"\1" * SECTOR)
    await builder.seal()
    async with replica(builder) as it:
        assert (await it.advance(Named("later"))).sequence == point
        await check(builder, point)
        with pytest.raises(ConflictError, match="already"):
            await it.advance(Named("early"))
        await it.advance()
        await check(builder, builder.sequence - 1)


async def test_who_was_replaced_is_refused_by_the_store(builder: LogBuilder) -> None:
    random_ = random.Random(3)
    builder.begin(*SIZES)
    await busy(builder, random_)
    old = await replica(builder).__aenter__()
    await old.advance()
    async with replica(builder) as new:
        await busy(builder, random_)
        with pytest.raises(FencedError):
            await old.advance()
        await new.advance()
        await check(builder, builder.sequence - 1)


async def test_a_disk_that_grew_or_came_has_it_made_anew(builder: LogBuilder) -> None:
    random_ = random.Random(4)
    builder.begin(*SIZES)
    await busy(builder, random_, 2)
    async with replica(builder) as it:
        await it.advance()
        builder.disk(1, "disk1", 120 * SECTOR)
        builder.disk(2, "new", 50 * SECTOR)
        builder.write(2, 0, b"\2" * SECTOR)
        await builder.seal()
        assert (await it.advance()).full
        await check(builder, builder.sequence - 1)
        builder.disk(2, "new", 50 * SECTOR, DiskAction.REMOVED)
        await builder.seal()
        assert (await it.advance()).full
        await check(builder, builder.sequence - 1)
        names = [info.name for info in await builder.store.list("replicas/")]
        assert len(names) == 3


@pytest.mark.parametrize("seed", range(60))
async def test_killed_at_any_write_it_goes_on_to_a_point_and_late_writes_do_no_harm(
    builder: LogBuilder, store: Weather, seed: int
) -> None:
    random_ = random.Random(seed)
    store.random = random.Random(seed + 1000)
    store.lost_share = random_.choice((0.0, 0.3))
    fill_bytes = random_.choice((FILL_BYTES, 100 * SECTOR))
    hot = 12  # so that what lands late lands on what was written since
    builder.begin(*SIZES)
    await busy(builder, random_, 3, sectors=hot)
    for _ in range(5):
        store.life = random_.randrange(0, 20)
        try:
            async with replica(builder, fill_bytes=fill_bytes) as it:
                for _ in range(3):
                    await it.advance()
                    await check(builder, builder.sequence - 1)
                    await busy(builder, random_, sectors=hot)
        except KilledError:
            pass
        store.life = -1
        if random_.random() < 0.5:
            await busy(builder, random_, sectors=hot)
        while store.late and random_.random() < 0.5:
            await store.let_land()
        said = await read_journal(builder.log, store)
        if said is not None and said.phase is Phase.APPLIED:  # then the blobs hold that, whoever died meanwhile
            await check(builder, said.sequence)
    async with replica(builder, fill_bytes=fill_bytes) as it:
        await it.advance()
        while store.late:
            await store.let_land()
        await check(builder, builder.sequence - 1)


async def test_a_fill_that_was_killed_goes_on_where_it_was_and_then_follows(
    builder: LogBuilder, store: Weather
) -> None:
    builder.begin(*SIZES)
    for disk, size in enumerate(SIZES):
        builder.write(disk, 0, random.Random(disk).randbytes(size))
    await builder.seal()
    part = 100 * SECTOR
    for life in (8, 8):  # a journal's record and a part of a disk at a time
        store.life = life
        with pytest.raises(KilledError):
            async with replica(builder, fill_bytes=part) as it:
                await it.advance()
    store.life = -1
    said = await read_journal(builder.log, store)
    assert said is not None
    assert said.filled is not None
    done = sum(said.filled.values())
    assert 3 * part <= done < sum(SIZES)
    await busy(builder, random.Random(1))
    async with replica(builder, fill_bytes=part) as it:
        finished = await it.advance()
    assert finished.full
    assert finished.written_bytes <= sum(SIZES) - done + 100 * SECTOR
    assert finished.sequence == builder.sequence - 1
    await check(builder, builder.sequence - 1)


async def test_a_fill_whose_point_was_given_up_begins_anew(builder: LogBuilder, store: Weather) -> None:
    builder.begin(*SIZES)
    builder.write(0, 0, b"\7" * 300 * SECTOR)
    await builder.seal()
    store.life = 7
    with pytest.raises(KilledError):
        async with replica(builder, fill_bytes=100 * SECTOR) as it:
            await it.advance()
    store.life = -1
    builder.disk(1, "disk1", 120 * SECTOR)
    builder.write(1, 100 * SECTOR, b"\1" * SECTOR)
    await builder.seal()
    async with replica(builder, fill_bytes=100 * SECTOR) as it:
        assert (await it.advance()).full
    await check(builder, builder.sequence - 1)


async def test_a_log_that_was_put_back_is_not_what_a_replica_follows(builder: LogBuilder) -> None:
    builder.begin(*SIZES)
    await builder.seal()
    async with replica(builder) as it:
        await it.advance(stored_number=1, stored_digest=builder.previous)
        with pytest.raises(CorruptionError):
            await it.advance(stored_number=2, stored_digest=builder.previous)


async def test_before_there_is_a_point_it_says_so(builder: LogBuilder) -> None:
    builder.disk(0, "disk0", SIZES[0])
    builder.gap_begin()
    await builder.seal()
    async with replica(builder) as it:
        with pytest.raises(PermanentError, match="no point yet"):
            await it.advance()


def ints(*values: int) -> Ints:
    return np.array(values, dtype=np.int64)


def test_ranges_are_joined_and_what_lies_between_is_told() -> None:
    near, far = 8 << 10, 1 << 20
    found = joined([(ints(far, 0), ints(far + 512, 512)), (ints(near, 0), ints(near + 512, 1024))])
    assert found == [(0, near + 512), (far, 512)]
    data = ExtentMap(ints(512, 2048), ints(1024, 4096), ints(1, 1), ints(0, 0))
    assert list(between(data, 0, 8192)) == [(0, 512), (1024, 2048), (4096, 8192)]
