"""Recovery plans: several machines in an order, with pauses and scripts between them; and where a run of one stands.

    name = "shop"

    [[steps]]
    machines = ["db"]                       # those of one step begin together

    [[steps]]
    pause = "Does the till's database answer?"

    [[steps]]
    script = "/etc/replicar/move-names"     # a program; status 0 means that it is done
    seconds = 120

    [[steps]]
    machines = ["web1", "web2"]

    [machines.db]                           # what differs from the machine's target settings
    options = { memory_mib = "4096" }

A run is data: what was asked for, how many steps are done, and which try of which machine's job is under way. It is
kept before anything is done, and the ids of its jobs follow from it, so whoever takes it up after a death asks for the
same jobs again and gets the ones that there are. A script can't be told apart so: it may be run twice.
"""

from __future__ import annotations

import json
import tomllib
import uuid
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from replicar.control.message import Name, Text
from replicar.control.messages import Job, JobKind, JobParameters, PointChoice
from replicar.control.messages.jobs import Notes, Options
from replicar.errors import PermanentError

MAX_STEPS: Final = 64
MAX_MACHINES: Final = 256
#: What a script may take unless its step says otherwise, and at most.
SCRIPT_SECONDS: Final = 300.0
MAX_SCRIPT_SECONDS: Final = 86400.0
#: A plan is some lines a machine.
MAX_PLAN_BYTES: Final = 1 << 20


class Goal(StrEnum):
    """What a run brings all machines of its plan to."""

    DRILL = "drill"
    CLEAN_UP = "cleanup"
    FAILOVER = "failover"
    COMMIT = "commit"


JOBS: Final = {
    Goal.DRILL: JobKind.TEST_FAILOVER,
    Goal.CLEAN_UP: JobKind.CLEAN_UP,
    Goal.FAILOVER: JobKind.FAILOVER,
    Goal.COMMIT: JobKind.COMMIT,
}


class RunState(StrEnum):
    """How it stands with a run. Where it is `going` and nobody is at it, its driver died."""

    GOING = "going"
    PAUSED = "paused"
    STOPPED = "stopped"
    ENDED = "ended"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(_Frozen):
    """One of: machines that begin together, a pause with what is to be looked at, or a script."""

    machines: Annotated[tuple[Name, ...], Field(max_length=MAX_MACHINES)] = ()
    pause: Annotated[Text, StringConstraints(strip_whitespace=True)] = ""
    script: Path | None = None
    seconds: Annotated[float | None, Field(gt=0, le=MAX_SCRIPT_SECONDS)] = None

    @model_validator(mode="after")
    def _be_one_thing(self) -> Self:
        if sum((bool(self.machines), bool(self.pause), self.script is not None)) != 1:
            raise ValueError("a step has either machines, or a pause with what is to be looked at, or a script")
        if self.script is not None and not self.script.is_absolute():
            raise ValueError(f"a script is named from the root, and {self.script} is not")
        if self.seconds is not None and self.script is None:
            raise ValueError("only a script has seconds")
        return self

    def __str__(self) -> str:
        if self.script is not None:
            return f"script {self.script}"
        return f"pause: {self.pause}" if self.pause else ", ".join(self.machines)


class Particulars(_Frozen):
    """What one machine is made with; what is not said, its target settings say."""

    compute: str = ""
    network: str = ""
    shut_down_source: bool = True
    options: Options = Field(default_factory=dict)


class Plan(_Frozen):
    """See the module."""

    name: Name
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=MAX_STEPS)]
    machines: dict[Name, Particulars] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _name_each_once(self) -> Self:
        named = [machine for step in self.steps for machine in step.machines]
        if not named:
            raise ValueError("no step has machines")
        if twice := sorted({machine for machine in named if named.count(machine) > 1}):
            raise ValueError(f"{', '.join(twice)}: a machine stands in one step only")
        if strangers := sorted(self.machines.keys() - set(named)):
            raise ValueError(f"[machines.{strangers[0]}]: no step has that machine")
        return self

    def steps_to(self, goal: Goal) -> tuple[Step, ...]:
        """What a run does, in order. Pauses and scripts belong to the way there; clean-up goes backwards."""
        if goal in (Goal.DRILL, Goal.FAILOVER):
            return self.steps
        machines = tuple(step for step in self.steps if step.machines)
        return machines[::-1] if goal is Goal.CLEAN_UP else machines


def read_plan(file: Path) -> Plan:
    """The plan in a TOML file.

    Raises:
        PermanentError: it is missing, no TOML, or no plan.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_PLAN_BYTES + 1)
    except OSError as error:
        raise PermanentError(f"can't read the plan {file}: {error.strerror}", hint="check the path") from None
    if len(text) > MAX_PLAN_BYTES:
        raise PermanentError(f"{file} is too long for a plan", hint=f"{MAX_PLAN_BYTES} bytes are the most")
    try:
        fields: dict[str, Any] = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PermanentError(f"the plan {file} is no TOML: {error}", hint="look at that line") from None
    try:
        return Plan.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PermanentError(
            f"{file} is no plan: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}",
            hint="see `replicar plan --help` (steps are counted from 0)",
        ) from None


class Run(_Frozen):
    """A run of a plan: what was asked for, and where it stands.

    Attributes:
        done: of `plan.steps_to(goal)`, the first so many are behind it.
        tries: by machine, how many of its jobs have ended without success.
        found: by machine, what its job said (docs/jobs.md, `result`).
        cause: why it stopped, or what a pause asks.
    """

    id: uuid.UUID
    plan: Plan
    goal: Goal
    begun_ns: int
    point: PointChoice | None = None
    notes: Notes = ""
    done: int = 0
    state: RunState = RunState.GOING
    tries: dict[str, int] = Field(default_factory=dict)
    found: dict[str, dict[str, str]] = Field(default_factory=dict)
    cause: str = ""

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.plan.steps_to(self.goal)

    @property
    def step(self) -> Step | None:
        """The one it is at; None: all are done."""
        return self.steps[self.done] if self.done < len(self.steps) else None

    def job_id(self, machine: str) -> str:
        """Of the job that this run has, or will have, for a machine."""
        return str(uuid.uuid5(self.id, f"{machine}/{self.tries.get(machine, 0)}"))

    def parameters(self, machine: str) -> JobParameters:
        if self.goal in (Goal.CLEAN_UP, Goal.COMMIT):
            return JobParameters(notes=self.notes)
        fields = self.plan.machines.get(machine, Particulars()).model_dump()
        if self.goal is Goal.DRILL:
            del fields["shut_down_source"]
        return JobParameters(point=self.point, **fields)

    def taken_up(self) -> Run:
        """Somebody is at it again; a pause is over by that."""
        is_paused = self.state is RunState.PAUSED
        return self._with(state=RunState.GOING, cause="", done=self.done + is_paused)

    def passed(self) -> Run:
        """The step it is at is done."""
        going = self._with(done=self.done + 1, state=RunState.GOING, cause="")
        return going if going.step is not None else going._with(state=RunState.ENDED)

    def paused(self) -> Run:
        return self._with(state=RunState.PAUSED, cause=self.step.pause if self.step is not None else "")

    def stopped(self, cause: str) -> Run:
        return self._with(state=RunState.STOPPED, cause=cause)

    def heard(self, job: Job, *, succeeded: bool) -> Run:
        """A job of the step has ended; one that failed is asked for anew the next time."""
        if succeeded:
            return self._with(found={**self.found, job.machine: dict(job.result)})
        return self._with(tries={**self.tries, job.machine: self.tries.get(job.machine, 0) + 1})

    def _with(self, **changes: Any) -> Run:
        return self.model_copy(update=changes)


def told_to_script(run: Run) -> Mapping[str, str]:
    """The environment of a script: which run it serves, and as JSON what the machines so far have become."""
    return {
        "REPLICAR_PLAN": run.plan.name,
        "REPLICAR_RUN": str(run.id),
        "REPLICAR_GOAL": run.goal.value,
        "REPLICAR_MACHINES": json.dumps(run.found, sort_keys=True),
    }
