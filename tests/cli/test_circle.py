"""The operator's circle as commands, against a running config server and a scripted recovery worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from replicar.cli import watched
from replicar.control.messages import JobKind, JobState, MarkReport, TargetSettings
from tests.cli.conftest import Ended, Operator, operator_settings
from tests.config_server.script import FAULT, Script, life
from tests.config_server.support import Cast


@pytest.fixture
def operator(cast: Cast, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """An operator without a storage account: nothing here reads storage."""
    return operator_settings(cast, tmp_path_factory.mktemp("operator"))


@pytest.fixture
async def working(worker: Script) -> AsyncIterator[Script]:
    """A worker that carries out whatever is asked for."""

    async def work() -> None:
        while True:
            if await worker.claim(wait_seconds=20) is not None:
                await worker.do_steps()
                await worker.end(result={"sequence": "60", "address": "10.0.0.4"})

    working = asyncio.create_task(work())
    yield worker
    working.cancel()
    await asyncio.wait({working})


async def test_the_circle_as_an_operator_goes_it(protected: Cast, operator: Operator, working: Script) -> None:
    async def done(*words: str) -> Ended:
        ended = await operator(*words)
        assert ended.status == 0, ended.errors
        return ended

    shown = await done("drill", "db1", "--point", "noon", "--option", "memory=2G")
    for word in ("test-failover", "succeeded", "10.0.0.4", "named noon", "see that it runs"):
        assert word in shown.output
    assert (await life(protected)) == "clean-up-pending"
    assert "clean-up-pending" in (await done("machines", "db1")).output
    await done("cleanup", "db1", "--notes", "the till worked")
    (drill,) = (await done("jobs", "drills", "db1", "--json")).json["drills"]
    assert (drill["notes"], drill["point_sequence"]) == ("the till worked", 60)
    assert "the till worked" in (await done("jobs", "drills", "db1")).output
    assert (await done("failover", "db1", "--json")).json["parameters"]["point"]["kind"] == "latest"
    await done("failover", "db1", "--change-point", "--latest-application")
    await done("cancel", "db1")
    await done("failover", "db1", "--leave-source")
    await done("commit", "db1")
    twice = await operator("commit", "db1")
    assert twice.status == 5
    assert "it is committed" in twice.errors
    assert "replicar failback db1" in twice.errors
    await done("failback", "db1", "--to", "stack")
    await done("reprotect", "db1")
    listed = (await done("jobs", "list", "--machine", "db1", "--json")).json["jobs"]
    assert {job["state"] for job in listed} == {"succeeded"}
    shown = await done("jobs", "show", listed[0]["id"])
    assert "re-protect" in shown.output
    assert "re-protect" in (await done("jobs", "list")).output
    await done("disable", "db1")
    assert "There are no jobs" in (await done("jobs", "list", "--going")).output


async def test_a_job_that_no_worker_takes_says_so_and_goes_on(protected: Cast, operator: Operator) -> None:
    ended = await operator("drill", "db1", "--timeout", "1")
    assert ended.status == 75
    assert "no recovery worker is online" in ended.errors
    assert "replicar jobs follow" in ended.errors
    (job,) = (await protected.operator.jobs("db1", going_only=True)).jobs
    assert job.state is JobState.NOT_STARTED
    made = await operator("jobs", "cancel", job.id, "--json")
    assert (made.status, made.json["state"]) == (0, "cancelled")
    followed = await operator("jobs", "follow", job.id)
    assert followed.status == 1
    assert "was cancelled" in followed.errors


async def test_the_exit_status_and_the_cause_are_those_of_the_job(
    protected: Cast, operator: Operator, worker: Script
) -> None:
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(operator("drill", "db1", "--json"))
        await worker.must_claim()
        await worker.end(JobState.FAILED, error=FAULT)
    ended = asked.result()
    assert ended.status == 1
    assert "the hypervisor is away" in ended.output
    assert "start it" in ended.output


async def test_protection_that_waits_for_a_decision_says_which_command_makes_it(cast: Cast, operator: Operator) -> None:
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    shown = await operator("protect", "db1")
    assert "replicar target set db1" in " ".join(shown.output.split())
    await cast.report_stored(9)
    mark = MarkReport(name="auto-1", sequence=9, time_ns=1)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=[mark]))
    late = await operator("protect", "db1", "--wait", "--timeout", "1")
    assert late.status == 75
    assert "`replicar target set db1 --compute qemu`" in " ".join(late.errors.split())
    assert (await operator("target", "set", "db1", "--compute", "azure", "--location", "westeurope")).status == 0
    late = await operator("protect", "db1", "--wait", "--timeout", "1")
    assert "replicar target set db1 --storage-account ... --resource-group ... --size ..." in " ".join(
        late.errors.split()
    )
    version = (await cast.operator.target("db1")).version
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(operator("protect", "db1", "--wait", "--timeout", "120"))
        await cast.operator.set_target("db1", TargetSettings(compute="qemu"), base_version=version)
    assert waiting.result().status == 0


async def test_a_job_is_followed_by_what_the_server_tells_and_not_by_asking(
    protected: Cast, operator: Operator, working: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 3600.0)
    assert (await operator("drill", "db1", "--timeout", "120")).status == 0


async def test_a_job_is_followed_by_asking_while_nothing_is_told(
    protected: Cast, operator: Operator, worker: Script
) -> None:
    protected.house.server.bells.close()  # every line ends at once
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(operator("drill", "db1", "--timeout", "120"))
        while await worker.claim() is None:
            await asyncio.sleep(0.05)
        await worker.do_steps()
        await worker.end()
    assert asked.result().status == 0


async def test_cancelling_a_failover_that_runs_leaves_the_machine_protected(
    protected: Cast, operator: Operator, worker: Script
) -> None:
    made = await operator("failover", "db1", "--no-wait", "--json")
    assert made.json["state"] == "not-started"
    await worker.must_claim()
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(operator("cancel", "db1"))
        while not await worker.say("prerequisites", JobState.SUCCEEDED):
            await asyncio.sleep(0.05)
        await worker.end(JobState.CANCELLED)
        await worker.carry_out(JobKind.CANCEL_FAILOVER)
    assert asked.result().status == 0
    assert (await life(protected)) == "protected"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("failover", "db1", "--point", "lost"), 1, "lies in a gap"),
        (("failover", "db1", "--point", "noon", "--latest"), 1, "more than one point"),
        (("failover", "db1", "--change-point"), 2, "which point to change to"),
        (("cleanup", "db1"), 5, "can't be cleaned up after now: it is protected"),
        (("cancel", "db1"), 5, "can't be taken back from a failover now"),
        (("failback", "db1"), 5, "can't be failed back now"),
        (("drill", "nobody"), 1, "no machine named"),
        (("drill", "db1", "--option", "memory"), 1, "no option"),
        (("jobs", "show", "00000000-0000-0000-0000-000000000000"), 1, "no job with id"),
    ],
)
async def test_what_can_not_be_done_is_refused_with_a_next_step(
    protected: Cast, operator: Operator, words: tuple[str, ...], status: int, said: str
) -> None:
    ended = await operator(*words)
    assert ended.status == status
    assert said in " ".join(ended.errors.split())
    if status != 2:
        assert "next step" in ended.errors
    assert (await protected.operator.jobs(going_only=True)).jobs == ()
