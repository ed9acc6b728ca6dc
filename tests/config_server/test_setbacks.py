"""The host's clock was ahead and is set right: nothing waits for a time that lies as far ahead as it was."""

from __future__ import annotations

import pytest

from config_server.machines import LIVE_SECONDS
from replicar.control.messages import (
    LEASE_SECONDS,
    UPKEEP_LEASE_SECONDS,
    JobKind,
    JobState,
    Policy,
    UpkeepClaim,
    UpkeepKind,
    UpkeepReport,
)
from tests.config_server.script import FAULT, Script, drill
from tests.config_server.support import Cast

AHEAD_DAYS = 30
FOLD_SECONDS = 900.0


@pytest.fixture
async def hands(protected: Cast, worker: Script) -> Script:
    """A recovery worker, of a time that is still to come."""
    protected.house.clock.move(days=AHEAD_DAYS)
    await protected.report_stored(100, stored_segment=7, stored_digest="ab" * 32)
    return worker


async def claimed(worker: Script, instance: str = "one") -> bool:
    task = await worker.client.upkeep(UpkeepClaim(kind=UpkeepKind.FOLD, instance=instance))
    return task.machine is not None


async def folded(cast: Cast, worker: Script, again_seconds: float = FOLD_SECONDS) -> None:
    assert await claimed(worker)
    report = UpkeepReport(kind=UpkeepKind.FOLD, instance="one", machine_id=cast.machine_id, again_seconds=again_seconds)
    await worker.client.report_upkeep(report)


@pytest.mark.parametrize("how", ["running", "down"])
async def test_upkeep_is_due_as_soon_as_it_would_have_been(protected: Cast, hands: Script, how: str) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    if how == "running":
        await rounds.go()
    await folded(protected, hands)
    clock.move(days=-AHEAD_DAYS)
    await rounds.go()
    assert not await claimed(hands), "it was just done"
    clock.move(seconds=FOLD_SECONDS + 1)
    assert await claimed(hands)


async def test_what_is_due_soon_does_not_wait_for_a_leases_time_that_nobody_has(protected: Cast, hands: Script) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    await folded(protected, hands, again_seconds=8.0)
    clock.move(days=-AHEAD_DAYS)
    await rounds.go()
    clock.move(seconds=9.0)
    assert await claimed(hands)


async def test_what_a_dead_worker_had_is_anothers_after_a_lease(protected: Cast, hands: Script) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    second = Script(hands.client, "another")
    assert await claimed(hands)
    await drill(protected)
    await hands.must_claim()
    await rounds.go()
    clock.move(days=-AHEAD_DAYS)
    await rounds.go()
    assert await second.claim() is None
    clock.move(seconds=max(UPKEEP_LEASE_SECONDS, LEASE_SECONDS) + 1)
    assert await claimed(hands, "another")
    assert await second.claim() is not None


async def test_what_was_leased_since_by_the_clock_as_it_is_stays_whose_it_is(protected: Cast, hands: Script) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    await drill(protected)
    await hands.must_claim()
    await rounds.go()
    clock.move(days=-AHEAD_DAYS)
    await hands.say("prerequisites", JobState.SUCCEEDED)
    await rounds.go()
    assert await Script(hands.client, "another").claim() is None
    await hands.say("point", JobState.SUCCEEDED)


async def test_a_suspended_job_goes_on_when_it_would_have(protected: Cast, hands: Script) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    await drill(protected)
    await hands.must_claim()
    await hands.end(JobState.SUSPENDED, error=FAULT, retry_seconds=600)
    await rounds.go()
    clock.move(days=-AHEAD_DAYS)
    await rounds.go()
    assert await hands.claim() is None
    clock.move(seconds=601)
    assert await hands.claim() is not None


async def test_the_next_drill_is_due_by_the_clock_as_it_is(protected: Cast, hands: Script) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    await protected.operator.set_policy(Policy(name="default", drill_days=7), base_version=0)
    (made,) = await rounds.go()
    assert made.kind is JobKind.TEST_FAILOVER
    await hands.carry_out(JobKind.TEST_FAILOVER)
    await protected.operator.make_job("db1", JobKind.CLEAN_UP)
    await hands.carry_out(JobKind.CLEAN_UP)
    clock.move(days=-AHEAD_DAYS)
    assert await rounds.go() == []
    clock.move(days=8)
    assert len(await rounds.go()) == 1


async def test_who_was_heard_of_then_is_not_alive_for_that_long(protected: Cast, hands: Script) -> None:
    rounds, clock = protected.house.server.rounds(), protected.house.clock
    await protected.server.process_server_heartbeat(protected.house.server_heartbeat())
    clock.move(days=-AHEAD_DAYS)
    await rounds.go()
    clock.move(seconds=LIVE_SECONDS + 1)
    (server,) = (await protected.operator.status()).process_servers
    assert not server.online
