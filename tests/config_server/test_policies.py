"""Policies, target settings, thresholds and drills by the clock, over TLS against the real config server."""

from __future__ import annotations

import sqlite3
from functools import partial

import pytest

from config_server import policies
from config_server.alerts import RPO_EXCEEDED
from replicar.control.messages import (
    DAY,
    MAX_POLICY_VERSIONS,
    JobKind,
    JobState,
    LifeState,
    MarkReport,
    PointSchedule,
    Policy,
    PolicyChange,
    RetentionTier,
    TargetSettings,
)
from replicar.errors import ConflictError, LimitError, PermanentError
from tests.config_server.script import Script, life
from tests.config_server.support import Cast

AZURE = TargetSettings(
    compute="azure",
    storage_account="contosodr",
    resource_group="dr",
    location="westeurope",
    size="Standard_D2s_v5",
    network="dr-net",
    subnet="machines",
    drill_network="drills",
    disk_kind="Premium_LRS",
)


async def test_a_vault_has_a_default_policy_that_can_be_changed(cast: Cast) -> None:
    (default,) = await cast.operator.policies()
    assert default == Policy(name="default")
    assert (default.retention_seconds, default.rpo_threshold_seconds) == (3 * DAY, 3600)
    wanted = default.model_copy(update={"rpo_threshold_seconds": 60})
    changed = await cast.operator.set_policy(wanted, base_version=0)
    assert (changed.version, changed.rpo_threshold_seconds) == (1, 60)
    assert await cast.operator.set_policy(wanted, base_version=0) == changed, "said again: nothing changes"
    assert await cast.operator.machine_policy("db1") == changed


async def test_two_operators_who_change_the_same_hear_of_each_other(cast: Cast) -> None:
    gold = Policy(name="gold", rpo_threshold_seconds=30)
    await cast.operator.set_policy(gold, base_version=0)
    with pytest.raises(ConflictError, match="policy gold has version 1 by now; the change was made from version 0"):
        await cast.operator.set_policy(gold.model_copy(update={"rpo_threshold_seconds": 20}), base_version=0)
    with pytest.raises(ConflictError, match="target settings of machine db1"):
        await cast.operator.set_target("db1", AZURE, base_version=7)


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        (((DAY, 3600), (DAY, 7200)), "tier 2 ends at 86400 s"),
        (((3600, 60),), "tier 1 ends at 3600 s"),
        (((DAY, 7200), (2 * DAY, 3600)), "tier 2 keeps a point every 3600 s"),
    ],
)
async def test_a_retention_that_contradicts_itself_is_refused(
    cast: Cast, tiers: tuple[tuple[int, int], ...], words: str
) -> None:
    made = tuple(RetentionTier(until_seconds=until, every_seconds=every) for until, every in tiers)
    with pytest.raises(PermanentError, match=words):
        await cast.operator.set_policy(Policy(name="odd", tiers=made), base_version=0)
    with pytest.raises(PermanentError, match="no policy named 'odd'"):
        await cast.operator.assign_policy("db1", "odd")


async def test_an_agent_hears_of_its_machines_schedule_at_once(protected: Cast) -> None:
    house = protected.house
    assert (await protected.machine.agent_heartbeat(house.machine_heartbeat())).schedule == PointSchedule()
    fast = Policy(name="fast", crash_point_seconds=60, application_point_seconds=0)
    await protected.operator.set_policy(fast, base_version=0)
    before = await protected.machine.agent_heartbeat(house.machine_heartbeat())
    await protected.operator.assign_policy("db1", "fast")
    # a poll that would be held for long is answered, since there is news
    told = await protected.machine.agent_heartbeat(house.machine_heartbeat(wait_seconds=25))
    assert told.schedule == PointSchedule(crash_seconds=60, application_seconds=0)
    assert told.version != before.version


async def test_a_machine_can_be_protected_by_a_policy_from_the_start(cast: Cast) -> None:
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    with pytest.raises(PermanentError, match="no policy named 'gold'"):
        await cast.operator.protect("db1", policy="gold")
    assert await life(cast) is LifeState.UNPROTECTED
    await cast.operator.set_policy(Policy(name="gold"), base_version=0)
    await cast.operator.protect("db1", policy="gold")
    assert (await cast.operator.machine_policy("db1")).name == "gold"


async def test_finalizing_tells_what_is_missing_and_ends_when_it_is_there(cast: Cast, worker: Script) -> None:
    await cast.protect()
    await cast.report_stored(9)
    mark = MarkReport(name="one", sequence=9, time_ns=1)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=[mark]))

    async def finalizing() -> tuple[JobState, str]:
        (job,) = [job for job in (await cast.operator.jobs("db1")).jobs if job.kind is JobKind.FINALIZE]
        return job.state, job.error.message if job.error is not None else ""

    state, message = await finalizing()
    assert state is JobState.SUSPENDED
    assert message.endswith("made of: compute")
    part = AZURE.model_copy(update={"subnet": "", "size": ""})
    await cast.operator.set_target("db1", part, base_version=0)
    state, message = await finalizing()
    assert message.endswith("made of: size, subnet")
    assert (await cast.operator.set_target("db1", AZURE, base_version=1)).version == 2
    assert await finalizing() == (JobState.SUCCEEDED, "")
    made = await cast.operator.make_job("db1", JobKind.TEST_FAILOVER)
    assert (made.parameters.compute, made.parameters.network) == ("azure", "drills")
    await worker.must_claim()
    assert worker.claimed.target == AZURE.model_copy(update={"version": 2})
    assert worker.claimed.policy == Policy(name="default")


async def test_an_alert_is_raised_once_and_cleared(protected: Cast) -> None:
    house = protected.house
    rounds = house.server.rounds()
    await protected.machine.agent_heartbeat(house.machine_heartbeat(rpo_seconds=4000.0))
    await rounds.go()
    await rounds.go()
    (alert,) = await protected.operator.alerts(lasting_only=True)
    assert (alert.machine, alert.code, alert.cleared_ns) == ("db1", RPO_EXCEEDED, None)
    assert "threshold is 3600 s" in alert.message
    await protected.machine.agent_heartbeat(house.machine_heartbeat(rpo_seconds=1.0))
    await rounds.go()
    assert await protected.operator.alerts(lasting_only=True) == ()
    house.clock.move(seconds=3700)  # silent ever since: nobody knows what changed there
    await rounds.go()
    assert [alert.cleared_ns is None for alert in await protected.operator.alerts()] == [True, False]


async def test_a_drill_that_is_due_is_begun_once(protected: Cast, worker: Script) -> None:
    house = protected.house
    rounds = house.server.rounds()
    await protected.operator.set_policy(Policy(name="default", drill_days=30), base_version=0)
    assert await rounds.go() == []
    house.clock.move(days=31)
    (drill,) = await rounds.go()
    assert (drill.kind, drill.requested_by) == (JobKind.TEST_FAILOVER, "schedule")
    assert await rounds.go() == []
    await worker.carry_out(JobKind.TEST_FAILOVER)
    house.clock.move(days=31)
    assert await rounds.go() == [], "what it made has to be cleaned up first"
    await protected.operator.make_job("db1", JobKind.CLEAN_UP)
    await worker.carry_out(JobKind.CLEAN_UP)
    assert len(await rounds.go()) == 1


async def test_versions_and_policies_are_bounded(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "MAX_POLICIES", 2)

    def change(connection: sqlite3.Connection, seconds: int) -> int:
        request = PolicyChange(policy=Policy(name="gold", rpo_threshold_seconds=seconds), base_version=seconds - 1)
        return policies.change(connection, "gold", request, seconds).version

    run = cast.house.server.registry.run
    for seconds in range(1, MAX_POLICY_VERSIONS + 10):
        assert await run(partial(change, seconds=seconds)) == seconds
    assert await run(lambda c: c.execute("SELECT count(*) FROM policies").fetchone()[0]) == MAX_POLICY_VERSIONS
    with pytest.raises(LimitError, match="2 is the limit"):
        await cast.operator.set_policy(Policy(name="silver"), base_version=0)
