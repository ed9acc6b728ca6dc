"""Jobs as an operator sees them: made, refused, carried out by a scripted worker, cancelled; over TLS."""

from __future__ import annotations

import pytest

from config_server.jobs import book
from replicar.control.messages import (
    DiskReport,
    JobKind,
    JobParameters,
    JobState,
    LifeState,
    MarkReport,
    PointChoice,
    PointKind,
    TargetSettings,
)
from replicar.errors import ConflictError, PermanentError, ReplicarError, TransientError
from tests.config_server.script import FAULT, Script, drill, life
from tests.config_server.support import Cast


async def test_protection_is_two_jobs_that_see_to_themselves(cast: Cast) -> None:
    assert await life(cast) is LifeState.UNPROTECTED
    await cast.protect()
    finalize, enable = (await cast.operator.jobs("db1")).jobs
    assert (enable.kind, finalize.kind) == (JobKind.ENABLE, JobKind.FINALIZE)
    assert enable.state is JobState.SUSPENDED
    assert enable.error is not None
    assert "mobility-agent run" in enable.error.hint
    assert await life(cast) is LifeState.ENABLING
    disk = DiskReport(index=0, name="vda", size_bytes=1000, seed_total_bytes=1000, seed_done_bytes=250)
    copying = cast.house.machine_heartbeat(state="initial-replication", disks=[disk], copy_remaining_seconds=30.0)
    await cast.machine.agent_heartbeat(copying)
    finalize, enable = (await cast.operator.jobs("db1")).jobs
    assert enable.state is JobState.SUCCEEDED
    assert (finalize.state, finalize.steps[0].done, finalize.steps[0].total) == (JobState.IN_PROGRESS, 250, 1000)
    assert (finalize.percent, finalize.estimate_seconds) == (8, 30.0)
    assert await life(cast) is LifeState.INITIAL_REPLICATION
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state="protected"))
    assert await life(cast) is LifeState.WAITING_FOR_POINT
    mark = MarkReport(name="auto-1", sequence=9, time_ns=1)
    await cast.report_stored(9)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=[mark]))
    assert await life(cast) is LifeState.PROTECTED
    assert (await cast.operator.jobs("db1")).jobs[0].state is JobState.SUSPENDED
    await cast.operator.set_target("db1", TargetSettings(compute="qemu"), base_version=0)
    assert (await cast.operator.jobs("db1")).jobs[0].state is JobState.SUCCEEDED
    await cast.operator.protect("db1")
    assert len((await cast.operator.jobs("db1")).jobs) == 2
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state="resynchronising"))
    assert await life(cast) is LifeState.RESYNCHRONISING


async def test_a_job_waits_for_a_worker_and_says_so(protected: Cast, worker: Script) -> None:
    made = await drill(protected)
    assert made.state is JobState.NOT_STARTED
    assert made.error is not None
    assert "no recovery worker is online" in made.error.message
    assert await worker.claim(JobKind.CLEAN_UP) is None
    assert (await protected.operator.job(made.id)).error is not None, "that one does other things"
    claimed = await worker.must_claim()
    assert (claimed.id, claimed.state, claimed.worker) == (made.id, JobState.IN_PROGRESS, "rw1/one")
    assert claimed.parameters.point == PointChoice(kind=PointKind.LATEST_PROCESSED)
    machine = worker.claimed.machine
    assert machine is not None
    assert (machine.id, machine.name, machine.epoch, machine.stored_sequence) == (protected.machine_id, "db1", 1, 100)
    assert (await worker.client.key("db1")).data_key_bytes()
    assert (await protected.operator.job(made.id)).error is None


async def test_a_drill_counts_once_its_clean_up_did(protected: Cast, worker: Script) -> None:
    made = await drill(protected)
    assert await life(protected) is LifeState.TEST_FAILOVER
    await worker.must_claim()
    await worker.say("disks", JobState.IN_PROGRESS, done=50, total=100, message="half")
    seen = await protected.operator.job(made.id)
    assert (seen.percent, seen.steps[3].message) == (8, "half")
    await worker.do_steps()
    protected.house.clock.move(seconds=20)
    await worker.end(result={"sequence": "60", "address": "10.0.0.4"})
    assert await life(protected) is LifeState.CLEAN_UP_PENDING
    assert await protected.operator.drills("db1") == ()
    await protected.operator.make_job("db1", JobKind.CLEAN_UP, JobParameters(notes="the till worked"))
    await worker.must_claim(JobKind.CLEAN_UP)
    assert [job.result for job in worker.claimed.before] == [{"sequence": "60", "address": "10.0.0.4"}]
    await worker.do_steps()
    await worker.end()
    assert await life(protected) is LifeState.PROTECTED
    (counted,) = await protected.operator.drills("db1")
    assert (counted.job, counted.notes, counted.point_sequence) == (made.id, "the till worked", 60)
    assert 20 <= counted.recovery_seconds < 60


async def test_a_drill_that_failed_has_to_be_cleaned_up_and_does_not_count(protected: Cast, worker: Script) -> None:
    await drill(protected)
    await worker.must_claim()
    await worker.say("disks", JobState.FAILED)
    ended = await worker.end(JobState.FAILED, error=FAULT)
    assert (ended.state, ended.error) == (JobState.FAILED, FAULT)
    assert await life(protected) is LifeState.CLEAN_UP_PENDING
    await protected.operator.make_job("db1", JobKind.CLEAN_UP)
    await worker.carry_out(JobKind.CLEAN_UP)
    assert await life(protected) is LifeState.PROTECTED
    assert await protected.operator.drills("db1") == ()


async def test_the_circle(protected: Cast, worker: Script) -> None:
    async def go(kind: JobKind, life_after: LifeState) -> None:
        await protected.operator.make_job("db1", kind)
        await worker.carry_out(kind)
        assert await life(protected) is life_after

    await go(JobKind.FAILOVER, LifeState.FAILED_OVER)
    await go(JobKind.CHANGE_POINT, LifeState.FAILED_OVER)
    await go(JobKind.COMMIT, LifeState.COMMITTED)
    assert [job.kind for job in worker.claimed.before] == [JobKind.CHANGE_POINT, JobKind.FAILOVER]
    with pytest.raises(ConflictError, match="can't be committed now: it is committed") as refusal:
        await protected.operator.make_job("db1", JobKind.COMMIT)
    assert "replicar failback db1" in refusal.value.hint
    await go(JobKind.FAILBACK, LifeState.FAILED_BACK)
    await go(JobKind.REPROTECT, LifeState.PROTECTED)
    await go(JobKind.FAILOVER, LifeState.FAILED_OVER)
    assert worker.claimed.before == (), "a new circle knows nothing of the last one"


async def test_a_failover_holds_the_stream_and_its_cancel_leaves_the_machine_protected(
    protected: Cast, worker: Script
) -> None:
    house = protected.house
    made = await protected.operator.make_job("db1", JobKind.FAILOVER)
    await worker.must_claim()
    fence = worker.claimed.fence
    held = await worker.client.hold(made.id, fence)
    assert (held.epoch, held.held) == (2, True)
    assert await worker.client.hold(made.id, fence) == held
    assert (await protected.machine.agent_heartbeat(house.machine_heartbeat())).assignment is None
    assert (await protected.server.process_server_heartbeat(house.server_heartbeat())).assignments == ()
    asked = await protected.operator.cancel_job(made.id)
    assert (asked.cancel_requested, asked.state) == (True, JobState.IN_PROGRESS)
    assert await worker.say("point", JobState.SUCCEEDED), "its worker learns of it with the next report"
    await worker.end(JobState.CANCELLED)
    assert await life(protected) is LifeState.FAILOVER_STOPPED
    undoing = await worker.must_claim()
    assert undoing.kind is JobKind.CANCEL_FAILOVER
    assert [job.id for job in worker.claimed.before] == [made.id]
    assert worker.claimed.machine is not None
    assert worker.claimed.machine.held
    released = await worker.client.release(undoing.id, worker.claimed.fence)
    assert (released.epoch, released.held) == (3, False)
    assert await worker.client.release(undoing.id, worker.claimed.fence) == released
    await worker.do_steps()
    await worker.end()
    assert await life(protected) is LifeState.PROTECTED
    assignment = (await protected.machine.agent_heartbeat(house.machine_heartbeat())).assignment
    assert assignment is not None
    assert assignment.epoch == 3


async def test_a_failed_over_machine_can_be_taken_back(protected: Cast, worker: Script) -> None:
    await protected.operator.make_job("db1", JobKind.FAILOVER)
    await worker.carry_out(JobKind.FAILOVER)
    await protected.operator.make_job("db1", JobKind.CANCEL_FAILOVER)
    await worker.carry_out(JobKind.CANCEL_FAILOVER)
    assert await life(protected) is LifeState.PROTECTED


async def test_a_job_that_nobody_has_claimed_is_cancelled_as_if_it_had_not_been(protected: Cast) -> None:
    made = await protected.operator.make_job("db1", JobKind.FAILOVER)
    assert await life(protected) is LifeState.FAILING_OVER
    assert (await protected.operator.cancel_job(made.id)).state is JobState.CANCELLED
    assert await life(protected) is LifeState.PROTECTED
    assert (await protected.operator.cancel_job(made.id)).state is JobState.CANCELLED
    assert [job.kind for job in (await protected.operator.jobs("db1", going_only=True)).jobs] == []


async def test_a_second_job_is_refused_and_both_are_named(protected: Cast, worker: Script) -> None:
    first = await protected.operator.make_job("db1", JobKind.FAILOVER)
    again = await protected.operator.make_job("db1", JobKind.FAILOVER, job_id=first.id)
    assert again.id == first.id
    for kind in (JobKind.FAILOVER, JobKind.TEST_FAILOVER, JobKind.COMMIT, JobKind.DISABLE):
        with pytest.raises(ConflictError) as refusal:
            await protected.operator.make_job("db1", kind)
        assert str(refusal.value.theirs) == f"failover {first.id}"
        assert str(refusal.value.ours).startswith(kind)
    with pytest.raises(ConflictError, match="belongs to the failover job of machine db1"):
        await protected.operator.make_job("db1", JobKind.COMMIT, job_id=first.id)
    await worker.carry_out(JobKind.FAILOVER)
    with pytest.raises(ConflictError, match="can't be failed over now: it is failed over, commit pending"):
        await protected.operator.make_job("db1", JobKind.FAILOVER)


@pytest.mark.parametrize(
    ("point", "words", "error"),
    [
        ({"kind": "named", "name": "never"}, "has no point 'never'", PermanentError),
        ({"kind": "named", "name": "lost"}, "lies in a gap", PermanentError),
        ({"kind": "named", "name": "soon"}, "storage does not hold", TransientError),
        ({"kind": "named"}, "chosen by name", PermanentError),
        ({"kind": "latest", "sequence": 4}, "chosen by nothing else, not by sequence", PermanentError),
        ({"kind": "sequence", "sequence": 70}, "lies in a gap that began at 65", PermanentError),
        ({"kind": "sequence", "sequence": 5000}, "beyond what storage holds", PermanentError),
        ({"kind": "instant", "time_ns": 2**62}, "in the future", PermanentError),
    ],
)
async def test_a_point_that_is_none_is_refused_before_anything_is_done(
    protected: Cast, point: dict[str, object], words: str, error: type[ReplicarError]
) -> None:
    with pytest.raises(error, match=words) as refusal:
        await drill(protected, point=point)
    assert refusal.value.hint
    assert await life(protected) is LifeState.PROTECTED
    assert [job.kind for job in (await protected.operator.jobs("db1", going_only=True)).jobs] == []


async def test_the_points_that_are_there_can_be_chosen(protected: Cast) -> None:
    for point in (
        PointChoice(kind=PointKind.NAMED, name="noon"),
        PointChoice(kind=PointKind.LATEST_APPLICATION),
        PointChoice(kind=PointKind.SEQUENCE, sequence=90),
        PointChoice(kind=PointKind.INSTANT, time_ns=3_600),
    ):
        made = await drill(protected, point=point)
        assert made.parameters.point == point
        await protected.operator.cancel_job(made.id)


async def test_a_parameter_that_a_job_does_not_read_is_refused_never_ignored(protected: Cast) -> None:
    with pytest.raises(PermanentError, match="knows nothing of destination, notes"):
        await drill(protected, destination="home", notes="x")


async def test_a_machine_that_is_disabled_or_removed_has_no_jobs_left_and_can_come_back(protected: Cast) -> None:
    made = await protected.operator.make_job("db1", JobKind.DISABLE)
    assert made.state is JobState.SUCCEEDED
    assert await life(protected) is LifeState.DISABLED
    assert (await protected.operator.machine("db1")).process_server is None
    assert (await protected.operator.protect("db1")).process_server == "ps1"
    await drill(protected)
    await protected.operator.remove("db1")
    (newest, *_) = (await protected.operator.jobs("db1")).jobs
    assert (newest.kind, newest.state) == (JobKind.TEST_FAILOVER, JobState.CANCELLED)
    assert (await protected.operator.jobs(going_only=True)).jobs == ()
    with pytest.raises(PermanentError, match="was removed from the vault"):
        await drill(protected)


async def test_history_is_bounded_and_keeps_the_newest(protected: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "MAX_ENDED_JOBS", 3)
    made = []
    for _ in range(5):
        made.append((await drill(protected)).id)
        await protected.operator.cancel_job(made[-1])
    assert [job.id for job in (await protected.operator.jobs("db1")).jobs] == made[:1:-1]
    with pytest.raises(PermanentError, match="no job with id"):
        await protected.operator.job(made[0])
