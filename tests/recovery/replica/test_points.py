"""A warm replica's earlier points: snapshots that hold what they say, whoever dies or arrives late."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from itertools import pairwise

import pytest

from recovery.replica.points import (
    MAX_POINTS,
    DiskSnapshot,
    plan_points,
    points_of,
    read_snapshot_info,
    snapshot_metadata,
)
from recovery.replica.warm import Kept, WarmReplica, points_kept
from recovery.retention import Policy, Rule
from replicar.clock import SystemClock
from replicar.errors import FencedError, TransientError
from replicar.storage import BlobInfo, MemoryStore, PageBlobStore
from tests.recovery.faults import Stopped, StoppingStore
from tests.recovery.log_builder import LogBuilder

SECTOR = 512
SIZES = (120 * SECTOR, 40 * SECTOR)
NS = 1_000_000_000
MINUTE, HOUR, DAY = 60 * NS, 3600 * NS, 86_400 * NS
#: All of two hours, then one of every hour up to six.
POLICY = Policy(2 * HOUR, (Rule(6 * HOUR, HOUR),))
#: So little that every point is due.
ALWAYS = 1e-9
#: More operations than there are in keeping a point.
MOST_STEPS = 60


def replica(builder: LogBuilder, store: PageBlobStore | None = None) -> WarmReplica:
    log = builder.log if store is None else dataclasses.replace(builder.log, store=store)
    return WarmReplica(log, log.store, clock=SystemClock(), random=os.urandom)


async def busy(builder: LogBuilder, random_: random.Random) -> None:
    """Something new on every disk."""
    for disk, size in enumerate(SIZES):
        for _ in range(3):
            builder.write(disk, SECTOR * random_.randrange(size // SECTOR - 4), random_.randbytes(4 * SECTOR))
    await builder.seal()


async def check(builder: LogBuilder) -> list[int]:
    """Every point holds what it says, on every disk; returns their sequences."""
    store = builder.store
    points = await points_kept(builder.log, store)
    for point in points:
        assert [each.disk for each in point.snapshots] == sorted(builder.expected[point.sequence])
        for each in point.snapshots:
            content = builder.expected[point.sequence][each.disk]
            held = await store.read_snapshot(each.blob, each.snapshot, 0, len(content))
            assert held == content, f"disk {each.disk} at {point.sequence}"
    return [point.sequence for point in points]


def of(sequence: int, time_ns: int, *disks: int, among: int = 2, snapshot: str = "") -> list[DiskSnapshot]:
    return [DiskSnapshot(sequence, time_ns, disk, among, f"{disk}.vhd", snapshot or f"s{sequence}") for disk in disks]


NOW = 100 * HOUR
WHOLE = of(5, NOW - HOUR, 0, 1)
HALF = of(5, NOW - HOUR, 0)


@pytest.mark.parametrize(
    ("there", "held", "every_ns", "take", "removed"),
    [
        pytest.param([], (9, NOW), HOUR, True, [], id="the first is due"),
        pytest.param([], (9, NOW), 0, False, [], id="none are wanted"),
        pytest.param(WHOLE, (9, NOW), HOUR, True, [], id="the next is due"),
        pytest.param(WHOLE, (9, NOW - 1), HOUR, False, [], id="not yet"),
        pytest.param(WHOLE, (5, NOW - HOUR), 1, False, [], id="it is there already"),
        pytest.param(HALF, (5, NOW - HOUR), HOUR, True, HALF, id="half a point is taken anew"),
        pytest.param(HALF, (9, NOW - HOUR + 1), HOUR, True, HALF, id="half a point makes nothing wait"),
        pytest.param(HALF, (5, NOW - HOUR), 0, False, HALF, id="half a point goes though none are wanted"),
        pytest.param(
            [*WHOLE, *of(5, NOW - HOUR, 1, snapshot="twice")],
            *((9, NOW - 1), HOUR, False, of(5, NOW - HOUR, 1, snapshot="twice")),
            id="one that was taken twice",
        ),
        pytest.param(
            [*of(1, NOW - 5 * HOUR + 1, 0, 1), *of(2, NOW - 5 * HOUR + 2, 0, 1), *of(4, NOW - 3, 0, 1)],
            *((9, NOW), HOUR, False, of(1, NOW - 5 * HOUR + 1, 0, 1)),
            id="of a stretch the latest stays",
        ),
        pytest.param(
            [*of(1, NOW - 7 * HOUR, 0, 1), *of(2, NOW - 2, 0, 1), *of(3, NOW - 1, 0, 1)],
            *((9, NOW), HOUR, False, of(1, NOW - 7 * HOUR, 0, 1)),
            id="beyond the last rule none stays, in the window all",
        ),
        pytest.param(
            [*of(1, NOW - 4, 0, 1), *of(2, NOW - 3, 0, 1), *of(3, NOW - 2, 0, 1)],
            *((9, NOW), 1, True, of(1, NOW - 4, 0, 1)),
            id="for the one that is taken the oldest goes",
        ),
    ],
)
def test_what_is_taken_and_what_goes(
    there: list[DiskSnapshot], held: tuple[int, int], every_ns: int, take: bool, removed: list[DiskSnapshot]
) -> None:
    sequence, time_ns = held
    plan = plan_points(there, POLICY, sequence=sequence, time_ns=time_ns, now_ns=NOW + DAY, every_ns=every_ns, most=3)
    assert (plan.take, list(plan.remove)) == (take, removed)


def test_a_clock_that_is_behind_gives_nothing_up() -> None:
    there = of(1, NOW - 7 * HOUR, 0, 1)
    told = partial(plan_points, there, POLICY, sequence=1, time_ns=NOW, every_ns=0)
    assert told(now_ns=NOW - 6 * HOUR).remove == ()
    assert told(now_ns=NOW).remove == tuple(there)


def test_a_point_that_somebody_reads_stays_whatever_the_policy_says() -> None:
    there = [*of(1, NOW - 7 * HOUR, 0, 1), *of(2, NOW - 6 * HOUR - 1, 0, 1)]
    told = partial(plan_points, there, POLICY, sequence=9, time_ns=NOW, now_ns=NOW, every_ns=0)
    assert told().remove == tuple(there)
    assert told(read={2}).remove == tuple(of(1, NOW - 7 * HOUR, 0, 1))


def test_weeks_of_points_stay_within_the_limit_and_thin_out_as_the_policy_says() -> None:
    policy, kept, now = Policy(), list[DiskSnapshot](), 0
    for number in range(24 * 20):
        now = 1000 * DAY + number * HOUR
        plan = plan_points(kept, policy, sequence=number, time_ns=now, now_ns=now, every_ns=HOUR)
        assert plan.take
        kept = [each for each in kept if each not in plan.remove] + of(number, now, 0, 1)
        assert len(kept) <= 2 * MAX_POINTS
    points, strays = points_of(kept)
    assert strays == []
    ages = [(now - point.time_ns) // HOUR for point in reversed(points)]
    assert ages[:20] == list(range(20))
    assert 130 < len(ages) < MAX_POINTS
    assert 15 * 24 - 8 <= ages[-1] <= 15 * 24 + 4
    assert all(later - age in (2, 3) for age, later in pairwise(ages) if 36 < age < 6 * 24)


def test_a_snapshot_says_what_it_is_of_and_one_by_hand_is_nobodys() -> None:
    info = BlobInfo("replicas/m/1.vhd", 512, snapshot_metadata(7, 8, 1, 2), snapshot="now")
    assert read_snapshot_info(info) == DiskSnapshot(7, 8, 1, 2, "replicas/m/1.vhd", "now")
    assert read_snapshot_info(dataclasses.replace(info, metadata={"replicar_replica": "m"})) is None
    assert read_snapshot_info(dataclasses.replace(info, metadata={**info.metadata, "replicar_disk": "-1"})) is None


async def test_points_hold_what_the_disks_held_whatever_came_since(builder: LogBuilder) -> None:
    random_ = random.Random(1)
    builder.begin(*SIZES)
    sequences = []
    async with replica(builder) as it:
        for _ in range(5):
            await busy(builder, random_)
            sequences.append((await it.advance()).sequence)
            assert await it.keep_points(POLICY, ALWAYS) == Kept(taken=True, removed=0)
            assert await it.keep_points(POLICY, ALWAYS) == Kept(taken=False, removed=0)
        await busy(builder, random_)
        await it.advance()
        assert await it.keep_points(POLICY, 3600) == Kept(taken=False, removed=0)
    async with replica(builder) as it:  # a new round to which there is nothing to write
        last = await it.advance()
        assert (await it.keep_points(POLICY, ALWAYS)).taken
    assert await check(builder) == [*sequences, last.sequence]


async def test_before_the_blobs_hold_a_point_none_is_kept(builder: LogBuilder) -> None:
    builder.begin(*SIZES)
    await builder.seal()
    async with replica(builder) as it:
        assert await it.keep_points(POLICY, ALWAYS) == Kept(taken=False, removed=0)


@pytest.mark.parametrize("applied", [False, True])
async def test_killed_at_any_operation_a_point_is_whole_or_none_and_the_next_round_puts_it_right(
    builder: LogBuilder, applied: bool
) -> None:
    random_ = random.Random(2)
    builder.begin(*SIZES)
    await busy(builder, random_)
    async with replica(builder) as it:
        await it.advance()
        await it.keep_points(POLICY, ALWAYS)
    halves = 0
    for step in range(MOST_STEPS):
        # Of one point a snapshot is lost, so that there is a removal to die in.
        last = (await points_kept(builder.log, builder.store))[-1].snapshots[1]
        await builder.store.delete_snapshot(last.blob, last.snapshot)
        await busy(builder, random_)
        async with replica(builder) as it:
            await it.advance()
        try:
            async with replica(builder, StoppingStore(builder.store, step, applied=applied)) as it:
                await it.keep_points(POLICY, ALWAYS)
            break
        except Stopped:
            pass
        await check(builder)
        found = [read_snapshot_info(info) for info in await builder.store.snapshots("replicas/")]
        halves += any(each.sequence > last.sequence for each in points_of(filter(None, found))[1])
        if step % 2:
            await busy(builder, random_)
        async with replica(builder) as it:
            await it.advance()
            await it.keep_points(POLICY, ALWAYS)
        sequences = await check(builder)
        assert sequences[-1] == builder.sequence - 1
        assert len(await builder.store.snapshots("replicas/")) == 2 * len(sequences)
    assert 10 < step < MOST_STEPS - 1
    assert halves > 0, "it was never killed between two disks"


class Late(MemoryStore):
    """Snapshots get no answer, and are taken when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_late = False
        self.late: list[Callable[[], Awaitable[str]]] = []

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        async def land() -> str:
            return await super(Late, self).snapshot(name, metadata=metadata, lease_id=lease_id, if_etag=if_etag)

        if self.is_late:
            self.late.append(land)
            raise TransientError("no answer", outcome_certain=False)
        return await land()


async def test_a_snapshot_that_lands_late_is_of_what_it_says_or_refused() -> None:
    random_, store = random.Random(3), Late()
    await store.ensure_container()
    builder = LogBuilder(store)
    builder.begin(*SIZES)
    await busy(builder, random_)
    async with replica(builder) as it:
        await it.advance()
        store.is_late = True
        for _ in range(2):
            with pytest.raises(TransientError):
                await it.keep_points(POLICY, ALWAYS)
        await store.late.pop()()  # nothing was written since: it is right, and half a point
        assert await check(builder) == []
        store.is_late = False
        await busy(builder, random_)
        held = await it.advance()
        with pytest.raises(FencedError):
            await store.late.pop()()
        assert await it.keep_points(POLICY, ALWAYS) == Kept(taken=True, removed=1)
    assert await check(builder) == [held.sequence]


async def test_who_was_replaced_keeps_no_point_of_what_the_other_writes(builder: LogBuilder) -> None:
    random_ = random.Random(4)
    builder.begin(*SIZES)
    await busy(builder, random_)
    async with replica(builder) as it:
        await it.advance()
    old = await replica(builder).__aenter__()
    await old.advance()  # nothing to write, so the blobs are not taken yet
    async with replica(builder) as new:
        await busy(builder, random_)
        await new.advance()
    with pytest.raises(FencedError):
        await old.keep_points(POLICY, ALWAYS)
    assert await builder.store.snapshots("replicas/") == []


async def test_blobs_that_are_made_anew_begin_without_points(builder: LogBuilder) -> None:
    random_ = random.Random(5)
    builder.begin(*SIZES)
    await busy(builder, random_)
    async with replica(builder) as it:
        await it.advance()
        await it.keep_points(POLICY, ALWAYS)
        await builder.store.snapshot(f"replicas/{builder.machine_id}/1.vhd")  # somebody's, by hand
        assert await it.keep_points(POLICY, ALWAYS) == Kept(taken=False, removed=0)
        assert len(await builder.store.snapshots("replicas/")) == 3
        builder.disk(1, "disk1", 60 * SECTOR)
        await builder.seal()
        round_ = await it.advance()
        assert round_.full
        assert await builder.store.snapshots("replicas/") == []
        assert (await it.keep_points(POLICY, ALWAYS)).taken
    assert await check(builder) == [round_.sequence]
