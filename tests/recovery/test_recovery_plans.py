"""Recovery plans: what one may say, in which order it is carried out, and where a run of it stands."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from recovery.recovery_plans import Goal, Plan, Run, RunState, read_plan, told_to_script
from replicar.control.messages import Job, JobKind, JobState
from replicar.errors import PermanentError

TEXT = """
name = "shop"
[[steps]]
machines = ["db"]
[[steps]]
pause = "does the database answer?"
[[steps]]
script = "/etc/replicar/move-names"
[[steps]]
machines = ["web1", "web2"]
[machines.db]
options = { memory_mib = "4096" }
"""


def plan(tmp_path: Path, text: str = TEXT) -> Plan:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    return read_plan(file)


def begun(tmp_path: Path, goal: Goal = Goal.FAILOVER) -> Run:
    return Run(id=uuid.UUID(int=7), plan=plan(tmp_path), goal=goal, begun_ns=1)


def ended(machine: str, state: JobState = JobState.SUCCEEDED, **result: str) -> Job:
    return Job(
        id=str(uuid.UUID(int=1)),
        kind=JobKind.FAILOVER,
        machine=machine,
        machine_id=uuid.UUID(int=2),
        state=state,
        requested_by="ada",
        created_ns=1,
        steps=(),
        result=result,
    )


def test_the_way_there_has_pauses_and_scripts_and_clean_up_goes_backwards(tmp_path: Path) -> None:
    words = {goal: [str(step) for step in plan(tmp_path).steps_to(goal)] for goal in Goal}
    there = ["db", "pause: does the database answer?", "script /etc/replicar/move-names", "web1, web2"]
    assert words == {
        Goal.DRILL: there,
        Goal.FAILOVER: there,
        Goal.COMMIT: ["db", "web1, web2"],
        Goal.CLEAN_UP: ["web1, web2", "db"],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "shop"\nsteps = []', "steps"),
        ('name = "shop"\n[[steps]]\npause = "look"', "no step has machines"),
        ('name = "shop"\n[[steps]]\nmachines = ["db"]\npause = "look"', "either machines, or a pause"),
        ('name = "shop"\n[[steps]]\n', "either machines, or a pause"),
        ('name = "shop"\n[[steps]]\nscript = "move-names"', "named from the root"),
        ('name = "shop"\n[[steps]]\nmachines = ["db"]\nseconds = 3', "only a script has seconds"),
        (
            'name = "shop"\n[[steps]]\nmachines = ["db"]\n[[steps]]\nmachines = ["db"]',
            "db: a machine stands in one step",
        ),
        (TEXT + "[machines.cache]\n", "machines.cache.*no step has that machine"),
        (TEXT.replace("machines = [", "machnies = [", 1), "steps.0.machnies"),
        ("steps = [", "no TOML"),
    ],
)
def test_what_can_not_be_meant_so_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PermanentError, match=said):
        plan(tmp_path, text)


def test_a_run_goes_through_its_steps_to_its_end(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert run.parameters("db").options == {"memory_mib": "4096"}
    assert run.parameters("web1").options == {}
    run = run.heard(ended("db", address="10.0.0.4"), succeeded=True).passed().paused()
    assert (run.state, run.cause) == (RunState.PAUSED, "does the database answer?")
    run = run.taken_up()
    assert (run.state, str(run.step)) == (RunState.GOING, "script /etc/replicar/move-names")
    assert json.loads(told_to_script(run)["REPLICAR_MACHINES"]) == {"db": {"address": "10.0.0.4"}}
    assert run.passed().passed().state is RunState.ENDED


def test_a_job_is_the_same_one_until_it_has_failed(tmp_path: Path) -> None:
    run = begun(tmp_path)
    first = run.job_id("db")
    assert Run.model_validate_json(run.model_dump_json()).job_id("db") == first
    again = run.heard(ended("db", JobState.FAILED), succeeded=False)
    assert again.job_id("db") != first
    assert again.job_id("web1") == run.job_id("web1") != first
    stopped = again.stopped("the hypervisor is away")
    assert (stopped.taken_up().state, stopped.taken_up().done) == (RunState.GOING, 0)
