"""`replicar plan`: several machines drilled, failed over, committed, cleaned up in an order, with pauses and scripts.

A run is kept in a file before each of its steps; the command may be killed at any time, and `replicar plan resume`
goes on. A pause ends the command: whoever has looked resumes it. docs/operating.md tells the whole of it.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from recovery.compute.check import run_check
from recovery.recovery_plans import JOBS, SCRIPT_SECONDS, Goal, Run, RunState, Step, read_plan, told_to_script
from replicar.cli.circle import (
    Application,
    At,
    Newest,
    Notes,
    PointName,
    Processed,
    chosen,
)
from replicar.cli.console import Json, SettingsFile, Telling, row, run, table
from replicar.cli.following import follow, raise_if_unreached
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.files import make_directory, read_file, write_file
from replicar.errors import ConflictError, PermanentError, ReplicarError, TransientError
from replicar.moments import format_moment

#: Runs that `runs` shows, newest first.
SHOWN_RUNS: Final = 50

app = typer.Typer(
    name="plan",
    help="Several machines in an order, with pauses and scripts: drill, failover, commit, cleanup, resume.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
PlanFile = Annotated[Path, typer.Argument(help="The plan, a TOML file: docs/operating.md.")]


def runs_directory() -> Path:
    """Where runs are kept."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "replicar" / "plans"


@app.command()
def check(plan: PlanFile, settings: SettingsFile = None, as_json: Json = False) -> None:
    """See that a plan can be read, that its machines are there, and what it would do."""

    async def work(telling: Telling) -> None:
        found = read_plan(plan)
        async with load_settings(settings).control() as control:
            lives = {name: (await control.machine(name)).life for step in found.steps for name in step.machines}
        data = {"plan": found.model_dump(mode="json"), "machines": {name: str(life) for name, life in lives.items()}}
        telling.result(data, lambda console: _show_steps(console, found.steps, lives))

    run(as_json, work)


@app.command()
def drill(
    plan: PlanFile,
    point: PointName = None,
    at: At = None,
    latest: Newest = False,
    latest_processed: Processed = False,
    latest_application: Application = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Drill all machines of a plan, in its order; `replicar plan cleanup` afterwards."""
    _begin(plan, Goal.DRILL, settings, as_json, point=(point, at, latest, latest_processed, latest_application))


@app.command()
def failover(
    plan: PlanFile,
    point: PointName = None,
    at: At = None,
    latest: Newest = False,
    latest_processed: Processed = False,
    latest_application: Application = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Fail all machines of a plan over, in its order.

    With `--point` a point that all of them have, such as one that `replicar tag --with` made of all at one instant.
    """
    _begin(plan, Goal.FAILOVER, settings, as_json, point=(point, at, latest, latest_processed, latest_application))


@app.command()
def commit(plan: PlanFile, notes: Notes = "", settings: SettingsFile = None, as_json: Json = False) -> None:
    """Commit the failover of all machines of a plan."""
    _begin(plan, Goal.COMMIT, settings, as_json, notes=notes)


@app.command()
def cleanup(plan: PlanFile, notes: Notes = "", settings: SettingsFile = None, as_json: Json = False) -> None:
    """Clean up the drills of all machines of a plan, last ones first."""
    _begin(plan, Goal.CLEAN_UP, settings, as_json, notes=notes)


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `replicar plan runs` shows it.")],
    skip: Annotated[
        bool, typer.Option("--skip", help="Pass over the step that it stopped at: it was done by hand.")
    ] = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that paused, stopped or was killed: at the step it had reached."""

    async def work(telling: Telling) -> None:
        _load(_place(run_id))  # before a lock is made for what is not there
        with _held(_place(run_id)) as place:
            found = _load(place)
            if found.state is RunState.ENDED:
                raise ConflictError(f"run {found.id} has ended", hint="begin another one")
            if skip and found.state is not RunState.STOPPED:
                raise ConflictError(f"run {found.id} is {found.state}, and only a stopped one's step can be skipped")
            await _drive(telling, place, found.passed() if skip else found.taken_up(), settings)

    run(as_json, work)


@app.command()
def runs(as_json: Json = False) -> None:
    """List runs, newest first."""

    async def work(telling: Telling) -> None:
        places = list(runs_directory().glob("*.json"))
        found = sorted(map(_load, places), key=lambda run: run.begun_ns, reverse=True)[:SHOWN_RUNS]
        data = {"runs": [one.model_dump(mode="json") for one in found]}
        telling.result(data, lambda console: _show_runs(console, found))

    run(as_json, work)


def _begin(
    file: Path,
    goal: Goal,
    settings: Path | None,
    as_json: bool,
    *,
    point: tuple[str | None, str | None, bool, bool, bool] = (None, None, False, False, False),
    notes: str = "",
) -> None:
    async def work(telling: Telling) -> None:
        name, at, latest, processed, application = point
        wanted = chosen(name, at, None, latest, processed, application)
        begun = Run(
            id=uuid.uuid4(), plan=read_plan(file), goal=goal, begun_ns=time.time_ns(), point=wanted, notes=notes
        )
        make_directory(runs_directory())
        with _held(_place(str(begun.id))) as place:
            await _drive(telling, place, begun, settings)

    run(as_json, work)


async def _drive(telling: Telling, place: Path, going: Run, settings: Path | None) -> None:
    """Carry a run on from where it stands; it is kept before each step and after each job.

    Raises:
        TransientError: it came to a pause.
        ReplicarError: a step failed; the run stopped there.
    """
    _keep(place, going)
    async with load_settings(settings).control() as control:
        while (step := going.step) is not None:
            telling.err.print(f"step {going.done + 1} of {len(going.steps)}: {escape(str(step))}", soft_wrap=True)
            if step.pause:
                _keep(place, going.paused())
                raise TransientError(
                    f"paused: {step.pause}", hint=f"to go on: replicar plan resume {going.id}", run=str(going.id)
                )
            try:
                if step.script is not None:
                    await run_check(step.script, told_to_script(going), step.seconds or SCRIPT_SECONDS, what="script")
                else:
                    going = await _reach(telling, control, place, going, step)
            except ReplicarError as error:
                _keep(place, (stopped := _load(place)).stopped(error.message))
                error.hint = _and_then(error.hint, stopped)
                raise
            going = going.passed()
            _keep(place, going)
    telling.result(going.model_dump(mode="json"), lambda console: _show_run(console, going))


async def _reach(telling: Telling, control: ControlClient, place: Path, going: Run, step: Step) -> Run:
    """Have all machines of a step brought to the goal: they begin together, and each is followed to its end.

    Raises:
        ReplicarError: that of the first one that failed, once all have ended.
    """
    failure: ReplicarError | None = None
    jobs = []
    for machine in step.machines:
        if machine in going.found:
            continue
        try:
            parameters = going.parameters(machine)
            jobs.append(await control.make_job(machine, JOBS[going.goal], parameters, job_id=going.job_id(machine)))
        except ReplicarError as error:
            failure = failure or error
    for made in jobs:
        ended = await follow(telling, control, made)
        try:
            raise_if_unreached(ended)
            going = going.heard(ended, succeeded=True)
        except ReplicarError as error:
            failure = failure or error
            going = going.heard(ended, succeeded=False)
        _keep(place, going)
    if failure is not None:
        raise failure
    return going


def _and_then(hint: str, stopped: Run) -> str:
    again = f"then: replicar plan resume {stopped.id} (--skip: the step was done by hand)"
    return f"{hint}; {again}" if hint else again


def _place(run_id: str) -> Path:
    try:
        return runs_directory() / f"{uuid.UUID(run_id)}.json"
    except ValueError:
        raise PermanentError(f"{run_id!r} is no run's id", hint="see `replicar plan runs`") from None


@contextmanager
def _held(place: Path) -> Iterator[Path]:
    """Nobody else drives this run meanwhile.

    Raises:
        PermanentError: there is no such run.
        ConflictError: somebody does.
    """
    try:
        fd = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PermanentError(
            f"can't take up the run at {place}: {error.strerror}", hint="`replicar plan runs`"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield place
    except BlockingIOError:
        raise ConflictError(f"run {place.stem} is under way", hint="let that command end first") from None
    finally:
        os.close(fd)


def _keep(place: Path, going: Run) -> None:
    write_file(place, going.model_dump_json(indent=2).encode())


def _load(place: Path) -> Run:
    """Raises:
    PermanentError: there is no such run, or it can't be read.
    """
    data = read_file(place, what="a run of a plan", hint="see `replicar plan runs`")
    try:
        return Run.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise PermanentError(
            f"the run at {place} can't be read: {first['msg']}", hint="take it away and begin another one"
        ) from None


def _show_steps(console: Console, steps: tuple[Step, ...], lives: Mapping[str, str]) -> None:
    made = table(">step", "~what", "~now")
    for number, step in enumerate(steps, 1):
        row(made, number, step, ", ".join(lives[machine] for machine in step.machines))
    console.print(made)


def _show_run(console: Console, ended: Run) -> None:
    made = table("machine", "~found")
    for step in ended.steps:
        for machine in step.machines:
            facts = ended.found.get(machine)
            told = "skipped" if facts is None else " ".join(f"{name}={value}" for name, value in facts.items())
            row(made, machine, told)
    console.print(made)
    console.print(f"{ended.goal} of plan {escape(ended.plan.name)}: all {len(ended.steps)} steps are done")


def _show_runs(console: Console, found: list[Run]) -> None:
    if not found:
        console.print("There are no runs.")
        return
    made = table("run", "plan", "goal", "state", ">steps done", "begun", "~cause")
    for one in found:
        steps = f"{one.done} of {len(one.steps)}"
        row(made, one.id, one.plan.name, one.goal, one.state, steps, format_moment(one.begun_ns), one.cause)
    console.print(made)
