"""A warm replica that nobody wants is removed whole, whoever dies on the way; never while somebody reads from it."""

from __future__ import annotations

import dataclasses
import os
import random
from contextlib import AsyncExitStack
from typing import cast

import pytest

from recovery.pins import holding
from recovery.points import AtSequence, locate
from recovery.replica.removal import RemovalPlan, plan_removal, remove_replica
from recovery.replica.warm import WarmReplica, points_kept
from replicar.clock import SystemClock
from replicar.errors import FencedError
from replicar.storage import BlobInfo, MemoryStore, PageBlobStore
from tests.recovery.faults import Stopped, StoppingStore
from tests.recovery.log_builder import LogBuilder
from tests.recovery.replica.test_warm import SIZES, busy

CLOCK = SystemClock()
#: More operations than there are in removing one.
MOST_STEPS = 60


async def _warm(builder: LogBuilder) -> None:
    async with WarmReplica(builder.log, builder.store, clock=CLOCK, random=os.urandom) as replica:
        await replica.advance()
        await replica.keep_held()


@pytest.fixture
async def builder() -> LogBuilder:
    store = MemoryStore()
    await store.ensure_container()
    made, draw = LogBuilder(store), random.Random(1)
    made.begin(*SIZES)
    for _ in range(2):
        await busy(made, draw, 2)
        await _warm(made)
    return made


async def _left(builder: LogBuilder) -> list[str]:
    return [info.name for info in await builder.store.list("replicas/")]


def test_snapshots_go_before_blobs_and_the_journal_before_what_it_tells_of() -> None:
    blobs = [BlobInfo(name, 512) for name in ("r/journal", "r/1.vhd", "r/0.vhd")]
    metadata = {"replicar_sequence": "7", "replicar_time_ns": "7", "replicar_disk": "0", "replicar_disks": "1"}
    snapshots = [BlobInfo("r/0.vhd", 512, metadata, snapshot="s2"), BlobInfo("r/0.vhd", 512, snapshot="by hand")]
    assert plan_removal(blobs, snapshots, {9}, "r/journal") == RemovalPlan(
        (("r/0.vhd", "by hand"), ("r/0.vhd", "s2")), ("r/journal", "r/0.vhd", "r/1.vhd")
    )
    assert plan_removal(blobs, snapshots, {7}, "r/journal") == RemovalPlan(read=(7,))


async def test_nothing_is_left_of_it_and_the_log_is_not_touched(builder: LogBuilder) -> None:
    before = [info.name for info in await builder.store.list("machines/")]
    plan = await remove_replica(builder.log, clock=CLOCK)
    assert len(plan.snapshots) == 4
    assert await _left(builder) == []
    assert await builder.store.snapshots("") == []
    assert [info.name for info in await builder.store.list("machines/")] == before
    assert await remove_replica(builder.log, clock=CLOCK) == RemovalPlan()


async def test_while_one_of_its_points_is_read_it_stays_and_can_be_brought_on(builder: LogBuilder) -> None:
    point = (await points_kept(builder.log, builder.store))[0]
    state = await locate(builder.log, AtSequence(point.sequence))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(holding(builder.log, state, clock=CLOCK, random=os.urandom))
        with pytest.raises(FencedError, match="is being read"):
            await remove_replica(builder.log, clock=CLOCK)
        assert len(await points_kept(builder.log, builder.store)) == 2
        await _warm(builder)
    await remove_replica(builder.log, clock=CLOCK)
    assert await _left(builder) == []


@pytest.mark.parametrize("applied", [False, True])
async def test_killed_at_any_operation_it_ends_the_next_time_or_is_made_anew(
    builder: LogBuilder, applied: bool
) -> None:
    for step in range(MOST_STEPS):
        log = dataclasses.replace(
            builder.log, store=cast("PageBlobStore", StoppingStore(builder.store, step, applied=applied))
        )
        try:
            await remove_replica(log, clock=CLOCK)
        except Stopped:
            if step % 2:
                await remove_replica(builder.log, clock=CLOCK)
                assert await _left(builder) == []
            await _warm(builder)
            assert (await points_kept(builder.log, builder.store))[-1].sequence == builder.sequence - 1
        else:
            assert await _left(builder) == []
            return
    raise AssertionError("it did not end")
