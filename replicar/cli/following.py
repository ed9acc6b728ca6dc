"""Following a job to its end: what is done, what it waits for, and an exit status that says whether it was reached.

A config server that is away is told apart from a job that failed: the job goes on without whoever looks (`watched`).
Ctrl-C ends the looking and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from replicar import errors
from replicar.cli.console import Telling, duration, row, size, table
from replicar.cli.watched import watched
from replicar.control.client import ControlClient
from replicar.control.message import ErrorReport
from replicar.control.messages import Drill, Job, JobState, JobStep
from replicar.errors import PermanentError, ReplicarError, TransientError
from replicar.moments import format_moment

Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds to follow it, at most; it goes on afterwards.", min=0.1, show_default=False),
]


async def carried_out(
    telling: Telling, control: ControlClient, job: Job, *, wait: bool = True, timeout: float | None = None
) -> None:
    """Follow a job that was made, and tell what became of it; without `wait`, tell that it was made.

    Raises:
        ReplicarError: it failed (as the error that it failed with), was cancelled, or has not ended in time.
    """
    if wait:
        job = await follow(telling, control, job, timeout)
    telling.result(job.model_dump(mode="json"), lambda console: show_job(console, job))
    if wait:
        raise_if_unreached(job)


async def follow(telling: Telling, control: ControlClient, job: Job, timeout: float | None = None) -> Job:
    """The job once it has ended.

    Raises:
        TransientError: it has not, in time; or the config server has been away for five minutes.
    """
    last, told, limit = job, "", asyncio.timeout(timeout)
    try:
        async with limit:
            with _bar(telling) as show:
                async for last in watched(control, job):
                    told = told if last.state.has_ended else _tell_waiting(telling, last, told)
                    show(last)
    except TimeoutError:
        if timeout is None or not limit.expired():
            raise
        raise _not_in_time(last, timeout) from None
    return last


def raise_if_unreached(job: Job) -> None:
    """Raises:
    ReplicarError: the job failed or was cancelled.
    """
    if job.state is JobState.SUCCEEDED:
        return
    what = f"the {job.kind} job of machine {job.machine}"
    if job.error is not None:
        kind = getattr(errors, job.error.error, PermanentError)
        cls = kind if isinstance(kind, type) and issubclass(kind, ReplicarError) else PermanentError
        raise cls(f"{what} {job.state}: {job.error.message}", hint=job.error.hint, job=job.id)
    raise PermanentError(
        f"{what} was cancelled", hint=f"see where that leaves it: `replicar machines {job.machine}`", job=job.id
    )


def show_job(console: Console, job: Job) -> None:
    """Everything about one job."""
    made = table("", "~")
    row(made, "job", job.id)
    row(made, "kind", job.kind)
    row(made, "machine", job.machine)
    row(made, "state", f"{job.state}, {job.percent} %" if not job.state.has_ended else job.state)
    row(made, "asked for by", f"{job.requested_by}, {format_moment(job.created_ns)}")
    if job.worker is not None:
        row(made, "worker", job.worker)
    if job.started_ns is not None and job.ended_ns is not None:
        row(made, "took", duration((job.ended_ns - job.started_ns) / 1e9))
    if job.parameters.point is not None:
        row(made, "point", " ".join(str(value) for _, value in job.parameters.point if value not in ("", None)))
    for name, value in job.result.items():
        row(made, name, value)
    console.print(made)
    steps = table("step", "state", "~")
    for step in job.steps:
        row(steps, step.title, step.state, " ".join(word for word in (_count(step), step.message) if word))
    console.print(steps)
    if job.error is not None:
        _show_cause(console, job.error)


def show_jobs(console: Console, jobs: tuple[Job, ...]) -> None:
    """A list of jobs."""
    if not jobs:
        console.print("There are no jobs.")
        return
    made = table("job", "machine", "kind", "state", ">%", "made")
    for job in jobs:
        row(made, job.id, job.machine, job.kind, job.state, job.percent, format_moment(job.created_ns))
    console.print(made)


def show_drills(console: Console, drills: tuple[Drill, ...]) -> None:
    """The drills of a machine that count."""
    if not drills:
        console.print("No drill counts yet: one does when it succeeded and was cleaned up.")
        return
    made = table("cleaned up", ">recovery took", ">sequence", "~notes")
    for drill in drills:
        row(made, format_moment(drill.ended_ns), duration(drill.recovery_seconds), drill.point_sequence, drill.notes)
    console.print(made)


def _tell_waiting(telling: Telling, job: Job, told: str) -> str:
    """Say once what a job waits for; returns what was said last."""
    message = job.error.message if job.error is not None else ""
    if job.error is not None and message != told:
        telling.err.print(f"[bold yellow]waiting[/] ({job.state}): {escape(message)}", soft_wrap=True)
        if job.error.hint:
            telling.err.print(f"next step: {escape(job.error.hint)}", soft_wrap=True)
    return message


def _show_cause(console: Console, error: ErrorReport) -> None:
    console.print(f"\n[bold red]cause[/]: {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"next step: {escape(error.hint)}", soft_wrap=True)


def _not_in_time(job: Job, seconds: float) -> TransientError:
    cause = f": {job.error.message}" if job.error is not None else ""
    return TransientError(
        f"the {job.kind} job of machine {job.machine} has not ended within {seconds:.0f} s "
        f"({job.state}, {job.percent} %){cause}",
        hint=f"it goes on: `replicar jobs follow {job.id}`; to end it: `replicar jobs cancel {job.id}`",
        job=job.id,
    )


def _count(step: JobStep) -> str:
    if not step.total:
        return ""
    if step.unit == "bytes":
        return f"{size(step.done)} of {size(step.total)}"
    return f"{step.done} of {step.total}"


@contextmanager
def _bar(telling: Telling) -> Iterator[Callable[[Job], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=telling.err, transient=True, disable=not telling.err.is_terminal) as progress:
        task = progress.add_task("", total=100)

        def show(job: Job) -> None:
            step = job.step
            doing = f"{step.title} {_count(step)}".rstrip() if step is not None else "done"
            progress.update(task, completed=job.percent, description=escape(f"{job.machine}: {doing}"))

        yield show
