"""Upkeep over TLS against the real config server: who has which machine, what fails, what of the past is offered."""

from __future__ import annotations

from pathlib import Path

import pytest

from config_server.upkeep import OVERDUE, OVERDUE_SECONDS, TRIES, UNWANTED_SECONDS
from replicar.control.client import ControlClient
from replicar.control.identity import Role
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    UPKEEP_LEASE_SECONDS,
    JobKind,
    JobParameters,
    KeptState,
    PointChoice,
    PointKind,
    Policy,
    Retention,
    UpkeepClaim,
    UpkeepKind,
    UpkeepRenewal,
    UpkeepReport,
)
from replicar.errors import FencedError, PermanentError
from tests.config_server.script import Script, drill
from tests.config_server.support import Cast

FOLD, REPLICA, REMOVAL = UpkeepKind.FOLD, UpkeepKind.REPLICA, UpkeepKind.REPLICA_REMOVAL
#: noon (50) is given up, app (60) is kept, everything is there from 90 on.
LEFT = Retention(
    generation=3,
    floor_sequence=90,
    floor_time_ns=3_900,
    kept=(KeptState(sequence=40, time_ns=900, reason="old"), KeptState(sequence=60, time_ns=2_000, reason="app")),
)
AWAY = ErrorReport(error="TransientError", message="storage is away")
DAMAGED = ErrorReport(error="CorruptionError", message="a checkpoint is damaged", hint="run `replicar verify`")


@pytest.fixture
async def hands(protected: Cast, worker: Script) -> ControlClient:
    await protected.report_stored(100, stored_segment=7, stored_digest="ab" * 32)
    return worker.client


async def claimed(client: ControlClient, instance: str = "one", kind: UpkeepKind = FOLD) -> str | None:
    task = await client.upkeep(UpkeepClaim(kind=kind, instance=instance))
    return task.machine.name if task.machine is not None else None


def said(cast: Cast, *, again_seconds: float = 900.0, instance: str = "one", **fields: object) -> UpkeepReport:
    values = {"kind": FOLD, "instance": instance, "machine_id": cast.machine_id, "again_seconds": again_seconds}
    return UpkeepReport.model_validate({**values, **fields})


async def test_a_machine_is_one_workers_until_it_has_told_or_died(protected: Cast, hands: ControlClient) -> None:
    task = await hands.upkeep(UpkeepClaim(kind=FOLD, instance="one"))
    assert task.machine is not None
    assert (task.machine.name, task.machine.stored_segment, task.policy) == ("db1", 7, Policy(name="default"))
    assert await claimed(hands, "two") is None
    assert await claimed(hands, "one") == "db1", "whoever died has it back at once"
    await hands.report_upkeep(said(protected))
    assert await claimed(hands, "two") is None, "it is not due"
    protected.house.clock.move(seconds=901)
    assert await claimed(hands, "two") == "db1"
    renewal = UpkeepRenewal(kind=FOLD, instance="two", machine_id=protected.machine_id)
    for _ in range(3):
        protected.house.clock.move(seconds=UPKEEP_LEASE_SECONDS - 1)
        await hands.renew_upkeep(renewal)
        assert await claimed(hands, "one") is None
    protected.house.clock.move(seconds=UPKEEP_LEASE_SECONDS + 1)
    assert await claimed(hands, "one") == "db1"
    with pytest.raises(FencedError, match="is not this worker's"):
        await hands.renew_upkeep(renewal)


async def test_only_machines_that_replicate_and_have_a_log_are_kept_up(
    cast: Cast, worker: Script, tmp_path: Path
) -> None:
    await cast.house.enrol(tmp_path / "idle", "idle")
    assert await claimed(worker.client) is None
    await cast.protect()
    assert await claimed(worker.client) is None, "nothing is in storage"
    await cast.report_stored(9, stored_segment=1)
    assert await claimed(worker.client, kind=REPLICA) is None, "its policy wants none"
    await cast.operator.set_policy(Policy(name="default", replica="warm"), base_version=0)
    assert await claimed(worker.client, kind=REPLICA) is None, "there is no point yet"
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(ordered_from=(1, 1)))
    assert await claimed(worker.client, kind=REPLICA) == "db1"
    assert await claimed(worker.client) == "db1"
    await cast.operator.remove("db1")
    cast.house.clock.move(days=1)
    assert await claimed(worker.client) is None


async def test_a_replica_that_is_not_wanted_any_more_is_removed_once_and_after_a_while(
    protected: Cast, hands: ControlClient
) -> None:
    operator, clock = protected.operator, protected.house.clock
    assert await claimed(hands, kind=REMOVAL) is None, "there never was one"
    warm = await operator.set_policy(Policy(name="default", replica="warm"), base_version=0)
    assert await claimed(hands, kind=REPLICA) == "db1"
    await operator.set_policy(Policy(name="default", replica="sealed"), base_version=warm.version)
    clock.move(seconds=UNWANTED_SECONDS - 10)
    assert await claimed(hands, kind=REMOVAL) is None, "the operator may think better of it"
    clock.move(seconds=11)
    assert await claimed(hands, kind=REPLICA) is None
    assert await claimed(hands, kind=REMOVAL) == "db1"
    await hands.report_upkeep(said(protected, kind=REMOVAL, elsewhere=True, again_seconds=60))
    clock.move(seconds=61)
    assert await claimed(hands, kind=REMOVAL) == "db1", "somebody still read from it"
    await hands.report_upkeep(said(protected, kind=REMOVAL))
    clock.move(days=1)
    assert await claimed(hands, kind=REMOVAL) is None, "there is none any more"


async def test_a_replica_of_a_machine_that_is_failed_over_stays_and_of_one_that_is_disabled_goes(
    protected: Cast, hands: ControlClient
) -> None:
    operator, clock = protected.operator, protected.house.clock
    await operator.set_policy(Policy(name="default", replica="warm"), base_version=0)
    assert await claimed(hands, kind=REPLICA) == "db1"
    await hands.report_upkeep(said(protected, kind=REPLICA))
    script = Script(hands)
    await operator.make_job("db1", JobKind.FAILOVER, JobParameters(compute="qemu"))
    await script.carry_out(JobKind.FAILOVER)
    clock.move(days=1)
    assert await claimed(hands, kind=REMOVAL) is None
    await operator.make_job("db1", JobKind.COMMIT)
    await script.carry_out(JobKind.COMMIT)
    assert await claimed(hands, kind=REMOVAL) is None
    await operator.make_job("db1", JobKind.DISABLE)
    await protected.house.server.rounds().go()
    assert await claimed(hands, kind=REMOVAL) == "db1"


async def test_a_failure_is_an_alert_until_it_went_well(protected: Cast, hands: ControlClient) -> None:
    async def codes() -> list[str]:
        return [alert.code for alert in await protected.operator.alerts(lasting_only=True)]

    for attempt in range(TRIES):
        assert await codes() == [], f"the world was in the way {attempt} times"
        assert await claimed(hands) == "db1"
        await hands.report_upkeep(said(protected, again_seconds=60, error=AWAY))
        protected.house.clock.move(seconds=61)
    assert await codes() == ["fold-failing"]
    assert await claimed(hands) == "db1", "it is tried again soon"
    await hands.report_upkeep(said(protected, elsewhere=True))
    assert await codes() == ["fold-failing"], "that somebody else is at it proves nothing"
    protected.house.clock.move(seconds=901)
    assert await claimed(hands) == "db1"
    await hands.report_upkeep(said(protected, retention=LEFT))
    assert await codes() == []
    protected.house.clock.move(seconds=901)
    assert await claimed(hands) == "db1"
    await hands.report_upkeep(said(protected, error=DAMAGED))
    (alert,) = await protected.operator.alerts(lasting_only=True)
    assert alert.message == "folding the log failed: a checkpoint is damaged"
    assert alert.hint == "run `replicar verify`"


async def test_it_is_an_alert_when_nobody_keeps_a_machine_up_any_more(protected: Cast, hands: ControlClient) -> None:
    rounds = protected.house.server.rounds()
    assert await claimed(hands) == "db1"
    await hands.report_upkeep(said(protected))
    await rounds.go()
    protected.house.clock.move(seconds=OVERDUE_SECONDS[FOLD] + 1)
    await rounds.go()
    codes = {alert.code for alert in await protected.operator.alerts(lasting_only=True)}
    assert OVERDUE[FOLD] in codes
    assert await claimed(hands) == "db1"
    await rounds.go()
    codes = {alert.code for alert in await protected.operator.alerts(lasting_only=True)}
    assert OVERDUE[FOLD] not in codes, "somebody is at it, for as long as it takes"
    await hands.report_upkeep(said(protected))
    await rounds.go()
    codes = {alert.code for alert in await protected.operator.alerts(lasting_only=True)}
    assert OVERDUE[FOLD] not in codes


async def test_what_was_thinned_is_not_offered_and_what_is_left_is_told(protected: Cast, hands: ControlClient) -> None:
    before = await protected.operator.points("db1")
    assert [point.name for point in before.points] == ["soon", "app", "noon"]
    assert (before.retention, before.thinned, before.ordered_from) == (None, (), (80, 3_500))
    await hands.report_upkeep(said(protected, retention=LEFT))
    found = await protected.operator.points("db1")
    assert [point.name for point in found.points] == ["soon", "app"]
    assert [point.name for point in found.thinned] == ["noon"]
    assert found.retention == LEFT
    assert found.ordered_from == (90, 3_900)


async def test_an_older_account_does_not_bring_back_what_is_gone(protected: Cast, hands: ControlClient) -> None:
    await hands.report_upkeep(said(protected, retention=LEFT))
    older = Retention(generation=2, floor_sequence=50, floor_time_ns=1_000)
    await hands.report_upkeep(said(protected, retention=older))
    assert (await protected.operator.points("db1")).retention == LEFT


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (PointChoice(kind=PointKind.NAMED, name="noon"), "the point 'noon' was thinned"),
        (PointChoice(kind=PointKind.SEQUENCE, sequence=55), "sequence 55 was thinned"),
        (PointChoice(kind=PointKind.INSTANT, time_ns=1_500), "the instant 1970-01-01T00:00:00.000001500Z was thinned"),
    ],
)
async def test_a_drill_of_a_thinned_point_is_refused_with_the_nearest_two(
    protected: Cast, hands: ControlClient, choice: PointChoice, words: str
) -> None:
    await hands.report_upkeep(said(protected, retention=LEFT))
    with pytest.raises(PermanentError, match=words) as refused:
        await protected.operator.make_job("db1", JobKind.TEST_FAILOVER, JobParameters(point=choice))
    assert "nearest to it are --sequence 40 (" in refused.value.hint
    assert "and --sequence 60 (" in refused.value.hint


async def test_a_drill_of_a_kept_point_is_taken(protected: Cast, hands: ControlClient) -> None:
    await hands.report_upkeep(said(protected, retention=LEFT))
    made = await drill(protected, point=PointChoice(kind=PointKind.NAMED, name="app"))
    assert made.parameters.point is not None


async def test_a_point_that_is_gone_is_not_the_latest_application_consistent_one(
    protected: Cast, hands: ControlClient
) -> None:
    without = LEFT.model_copy(update={"kept": ()})
    await hands.report_upkeep(said(protected, retention=without))
    with pytest.raises(PermanentError, match="no application-consistent point"):
        await drill(protected, point=PointChoice(kind=PointKind.LATEST_APPLICATION))


async def test_a_machine_may_not_say_what_is_left_of_another(protected: Cast) -> None:
    assert protected.machine.identity.role is Role.MACHINE
    with pytest.raises(PermanentError, match="may not POST"):
        await protected.machine.report_upkeep(said(protected, retention=LEFT))
