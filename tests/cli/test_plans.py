"""Recovery plans as commands, against a running config server and a scripted recovery worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from replicar.control.messages import JobKind, JobState, LifeState
from tests.cli.conftest import Operator, operator_settings
from tests.config_server.script import FAULT, Script, life
from tests.config_server.support import Cast

PLAN = """
name = "shop"
[[steps]]
machines = ["db1"]
[[steps]]
pause = "does the database answer?"
[[steps]]
script = "{script}"
"""


@pytest.fixture
def operator(cast: Cast, tmp_path: Path) -> Operator:
    made = operator_settings(cast, tmp_path)
    made.environment["XDG_STATE_HOME"] = str(tmp_path / "state")
    return made


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan whose script notes what it was told, and fails as long as there is a file named `broken`."""
    script = tmp_path / "move-names"
    script.write_text(f"""#!/bin/sh
echo "$REPLICAR_GOAL $REPLICAR_MACHINES" >> {tmp_path}/told
test ! -e {tmp_path}/broken
""")
    script.chmod(0o755)
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.format(script=script))
    return file


@pytest.fixture
async def working(worker: Script) -> AsyncIterator[Script]:
    """A worker that carries out whatever is asked for."""

    async def work() -> None:
        while True:
            if await worker.claim(wait_seconds=20) is not None:
                await worker.do_steps()
                await worker.end(result={"sequence": "60", "address": "10.0.0.4"})

    task = asyncio.create_task(work())
    yield worker
    task.cancel()
    await asyncio.wait({task})


async def only_run(operator: Operator) -> dict[str, object]:
    (found,) = (await operator("plan", "runs", "--json")).json["runs"]
    assert isinstance(found, dict)
    return found


async def test_a_failover_by_plan_pauses_goes_on_and_ends(
    protected: Cast, operator: Operator, working: Script, plan: Path, tmp_path: Path
) -> None:
    looked = await operator("plan", "check", plan)
    assert looked.status == 0, looked.errors
    assert "protected" in looked.output
    paused = await operator("plan", "failover", plan, "--point", "noon")
    assert paused.status == 75
    assert "paused: does the database answer?" in paused.errors
    assert (await life(protected)) is LifeState.FAILED_OVER
    run = await only_run(operator)
    assert run["state"] == "paused"
    assert f"replicar plan resume {run['id']}" in paused.errors
    assert not (tmp_path / "told").exists()
    resumed = await operator("plan", "resume", run["id"])
    assert resumed.status == 0, resumed.errors
    goal, _, machines = (tmp_path / "told").read_text().partition(" ")
    assert goal == "failover"
    assert json.loads(machines)["db1"]["address"] == "10.0.0.4"
    assert (await operator("plan", "resume", run["id"])).status == 5
    assert "all 3 steps are done" in resumed.output
    assert (await operator("plan", "commit", plan, "--notes", "it holds")).status == 0
    assert (await life(protected)) is LifeState.COMMITTED


async def test_a_step_that_fails_stops_the_run_there_and_is_tried_again(
    protected: Cast, operator: Operator, worker: Script, plan: Path, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(operator("plan", "drill", plan))
        await worker.must_claim()
        await worker.end(JobState.FAILED, error=FAULT)
    failed = asked.result()
    assert failed.status == 1
    assert "the hypervisor is away" in failed.errors
    run = await only_run(operator)
    assert (run["state"], run["done"]) == ("stopped", 0)
    assert f"replicar plan resume {run['id']}" in failed.errors
    cleaned = asyncio.create_task(operator("cleanup", "db1"))
    await worker.carry_out(JobKind.CLEAN_UP)
    assert (await cleaned).status == 0
    again = asyncio.create_task(operator("plan", "resume", run["id"]))
    await worker.carry_out(JobKind.TEST_FAILOVER)
    assert (await again).status == 75
    (tmp_path / "broken").touch()
    broken = await operator("plan", "resume", run["id"])
    assert broken.status == 1
    assert "move-names found fault: it ended with status 1" in broken.errors
    skipped = await operator("plan", "resume", run["id"], "--skip")
    assert skipped.status == 0, skipped.errors


async def test_a_run_whose_command_died_goes_on_with_the_same_job(
    protected: Cast, operator: Operator, worker: Script, plan: Path
) -> None:
    command = asyncio.create_task(operator("plan", "drill", plan))
    job = await worker.must_claim()
    run = await only_run(operator)
    taken = await operator("plan", "resume", run["id"])
    assert taken.status == 5
    assert "is under way" in taken.errors
    await worker.do_steps()
    await worker.end()
    assert (await command).status == 75
    # As a command that was killed at that moment left it.
    place = Path(str(operator.environment["XDG_STATE_HOME"])) / "replicar" / "plans" / f"{run['id']}.json"
    place.write_text(json.dumps(run))
    resumed = await operator("plan", "resume", run["id"])
    assert resumed.status == 75, resumed.errors
    assert [made.id for made in (await protected.operator.jobs("db1")).jobs if made.kind is job.kind] == [job.id]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "resume", "x"), "no run's id"),
        (("plan", "resume", "00000000-0000-0000-0000-000000000000"), "can't read a run of a plan"),
        (("plan", "drill", "nowhere.toml"), "can't read the plan"),
    ],
)
async def test_what_is_not_there_is_said(cast: Cast, operator: Operator, words: tuple[str, ...], said: str) -> None:
    ended = await operator(*words)
    assert ended.status == 1
    assert said in ended.errors
