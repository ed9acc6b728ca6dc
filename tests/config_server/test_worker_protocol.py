"""The protocol between recovery workers and the real config server, over TLS: who has a job, and who has it no more."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from config_server.foundation import new_identity
from config_server.registry import Registry
from config_server.vault import REGISTRY_FILE
from replicar.control.identity import Identity, Role
from replicar.control.messages import (
    LEASE_SECONDS,
    MAX_CLAIMS,
    JobKind,
    JobReport,
    JobState,
    LifeState,
    MarkReport,
)
from replicar.errors import ConflictError, FencedError, LimitError, PermanentError
from tests.config_server.script import FAULT, Script, drill, life
from tests.config_server.support import Cast, SetClock, running


async def test_a_worker_that_was_away_can_not_report_into_a_job_that_another_has(
    protected: Cast, worker: Script, tmp_path: Path
) -> None:
    identity = await protected.house.enrol(tmp_path / "second", "rw2", Role.RECOVERY)
    async with protected.house.client(identity) as client:
        second = Script(client)
        made = await drill(protected)
        await worker.must_claim()
        await worker.say("prerequisites", JobState.SUCCEEDED)
        assert await second.claim() is None
        protected.house.clock.move(seconds=LEASE_SECONDS + 1)
        # late, but nobody else has it: the report counts, and renews the lease
        await worker.say("point", JobState.SUCCEEDED)
        assert await second.claim() is None
        protected.house.clock.move(seconds=LEASE_SECONDS + 1)
        taken = await second.claim()
        assert taken is not None
        assert (taken.id, taken.fence, taken.worker) == (made.id, 2, "rw2/one")
        done = [step.name for step in taken.steps if step.state is JobState.SUCCEEDED]
        assert done == ["prerequisites", "point"], "it goes on where the other one was"
        for said in (worker.say("network", JobState.SUCCEEDED), worker.end(JobState.FAILED, error=FAULT)):
            with pytest.raises(FencedError, match="is with rw2/one now"):
                await said
        with pytest.raises(FencedError):
            await worker.client.hold(made.id, worker.claimed.fence)
        await second.do_steps()
        assert (await second.end()).state is JobState.SUCCEEDED
        assert (await second.end()).state is JobState.SUCCEEDED, "the answer was lost, so it says it again"
        with pytest.raises(FencedError, match="it succeeded"):
            await second.say("check", JobState.FAILED)
        with pytest.raises(FencedError):
            await second.end(JobState.FAILED, error=FAULT)


async def test_a_suspended_job_goes_on_when_it_is_time(protected: Cast, worker: Script) -> None:
    made = await drill(protected)
    await worker.must_claim()
    await worker.end(JobState.SUSPENDED, error=FAULT, retry_seconds=600)
    seen = await protected.operator.job(made.id)
    assert (seen.state, seen.error) == (JobState.SUSPENDED, FAULT)
    assert await worker.claim() is None
    protected.house.clock.move(seconds=601)
    assert (await worker.must_claim()).fence == 2
    await worker.end(JobState.SUSPENDED, error=FAULT, retry_seconds=600)
    assert (await protected.operator.cancel_job(made.id)).state is JobState.CANCELLED
    assert await life(protected) is LifeState.CLEAN_UP_PENDING


async def test_an_end_that_the_steps_do_not_bear_out_is_refused(protected: Cast, worker: Script) -> None:
    made = await drill(protected)
    await worker.must_claim()
    with pytest.raises(PermanentError, match="can't have succeeded: prerequisites has not"):
        await worker.end()
    with pytest.raises(ConflictError, match="nobody asked to cancel"):
        await worker.end(JobState.CANCELLED)
    with pytest.raises(PermanentError, match="says why"):
        await worker.end(JobState.FAILED)
    with pytest.raises(PermanentError, match="no end of a job"):
        await worker.end(JobState.IN_PROGRESS)
    with pytest.raises(PermanentError, match="has no step 'dance'"):
        await worker.say("dance", JobState.SUCCEEDED)
    some, more = ({f"{prefix}{number}": "x" for number in range(20)} for prefix in "ab")
    await worker.client.report(made.id, JobReport(fence=worker.claimed.fence, result=some))
    with pytest.raises(LimitError, match="32 values at most"):
        await worker.client.report(made.id, JobReport(fence=worker.claimed.fence, result=more))


async def test_a_job_that_its_workers_die_of_ends_as_failed(protected: Cast, worker: Script) -> None:
    made = await drill(protected)
    for _ in range(MAX_CLAIMS):
        await worker.must_claim()
        protected.house.clock.move(seconds=LEASE_SECONDS + 1)
    assert await worker.claim() is None
    ended = await protected.operator.job(made.id)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert "came to no end" in ended.error.message


async def test_a_waiting_claim_is_answered_when_a_job_is_made(protected: Cast, worker: Script) -> None:
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(worker.claim(wait_seconds=25))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        made = await drill(protected)
    job = waiting.result()
    assert job is not None
    assert job.id == made.id


async def test_an_operators_command_may_be_its_own_worker_and_claim_the_one_job(protected: Cast) -> None:
    async with protected.house.operator() as client:
        here = Script(client, "here")
        assert await here.claim(job=str(uuid.uuid4())) is None
        made = await drill(protected)
        job = await here.claim(job=made.id)
        assert job is not None
        assert job.worker == "operator/here"


async def test_only_recovery_workers_and_operators_claim_and_readers_only_read(protected: Cast, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="a machine may not POST"):
        await Script(protected.machine).claim()
    with pytest.raises(PermanentError, match="a process-server may not"):
        await protected.server.make_job("db1", JobKind.FAILOVER)
    vault, registry = protected.house.server.vault, Registry(protected.house.directory / REGISTRY_FILE)
    identity = new_identity(
        vault, registry, Role.READER, "eve", tmp_path / "eve", address=protected.house.address, clock=SetClock()
    )
    registry.close()
    async with protected.house.client(identity) as reader:
        assert (await reader.machine("db1")).name == "db1"
        assert len((await reader.jobs()).jobs) == 2
        for refused in (reader.make_job("db1", JobKind.FAILOVER), reader.key("db1"), reader.protect("db1")):
            with pytest.raises(PermanentError, match="a reader may not"):
                await refused


async def test_jobs_outlive_the_config_server(vault_directory: Path, tmp_path: Path, clock: SetClock) -> None:
    async with running(vault_directory, clock) as house:
        identities = (
            Identity.load(vault_directory / "operator"),
            await house.enrol(tmp_path / "db1", "db1"),
            await house.enrol(tmp_path / "ps1", "ps1", Role.PROCESS_SERVER),
        )
        recovery = await house.enrol(tmp_path / "rw1", "rw1", Role.RECOVERY)
        async with (
            house.client(identities[0]) as operator,
            house.client(identities[1]) as machine,
            house.client(identities[2]) as server,
            house.client(recovery) as client,
        ):
            cast, script = Cast(house, operator, machine, server), Script(client)
            await cast.protect()
            await cast.report_stored(9)
            await machine.agent_heartbeat(
                house.machine_heartbeat(marks=[MarkReport(name="one", sequence=9, time_ns=1)])
            )
            made = await drill(cast)
            await script.must_claim()
            await script.say("prerequisites", JobState.SUCCEEDED)
    async with running(vault_directory, clock) as house, house.client(recovery) as client, house.operator() as operator:
        script.client = client
        await script.do_steps()
        await script.end()
        seen = await operator.job(made.id)
        assert seen.state is JobState.SUCCEEDED
        assert (await operator.machine("db1")).life is LifeState.CLEAN_UP_PENDING
