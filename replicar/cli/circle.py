"""The operator's circle: `drill`, `cleanup`, `failover`, `commit`, `cancel`, `failback`, `reprotect`, `disable`.

Each makes a job and follows it. What carries it out is a recovery worker (docs/jobs.md); while none is online the job
waits, and so does the command, which says so. `--no-wait` leaves the job to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from replicar.cli.console import Json, Machine, SettingsFile, Telling, run
from replicar.cli.following import Timeout, Wait, carried_out, follow
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.messages import (
    Job,
    JobKind,
    JobParameters,
    JobState,
    PointChoice,
    PointKind,
)
from replicar.errors import PermanentError
from replicar.moments import parse_moment

PointName = Annotated[str | None, typer.Option("--point", help="A named point.", show_default=False)]
At = Annotated[
    str | None,
    typer.Option(
        "--at", help="An instant: 2026-11-22T10:00:00.123456Z, or nanoseconds since 1970.", show_default=False
    ),
]
Sequence = Annotated[int | None, typer.Option("--sequence", help="A sequence number.", min=1, show_default=False)]
Newest = Annotated[bool, typer.Option("--latest", help="Everything, once what is still under way has been read.")]
Processed = Annotated[bool, typer.Option("--latest-processed", help="What storage holds now.")]
Application = Annotated[bool, typer.Option("--latest-application", help="The latest application-consistent point.")]
Compute = Annotated[
    str | None,
    typer.Option(help="What makes the machine: qemu or azure.  \\[default: its target settings]", show_default=False),
]
Network = Annotated[str, typer.Option(help="The network it is put into, as the compute names it.")]
OptionsOfHands = Annotated[
    list[str] | None,
    typer.Option("--option", help="For the compute, as name=value; may be given several times.", show_default=False),
]
Notes = Annotated[str, typer.Option(help="Kept with it.")]


def drill(
    machine: Machine,
    point: PointName = None,
    at: At = None,
    sequence: Sequence = None,
    latest: Newest = False,
    latest_processed: Processed = False,
    latest_application: Application = False,
    compute: Compute = None,
    network: Network = "",
    option: OptionsOfHands = None,
    wait: Wait = True,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Try a failover: boot the machine in an isolated network, without touching the one that runs.

    Takes the latest processed point unless another is chosen. Clean it up afterwards (`replicar cleanup`): a drill
    counts only then.
    """
    choose = partial(chosen, point, at, sequence, latest, latest_processed, latest_application)
    parameters = partial(_parameters, choose, option, compute=compute or "", network=network)
    _make(machine, JobKind.TEST_FAILOVER, parameters, settings, as_json, wait=wait, timeout=timeout)


def cleanup(
    machine: Machine,
    notes: Notes = "",
    wait: Wait = True,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Remove what a drill made; the drill counts from then on, with these notes."""
    parameters = partial(_parameters, notes=notes)
    _make(machine, JobKind.CLEAN_UP, parameters, settings, as_json, wait=wait, timeout=timeout)


def failover(
    machine: Machine,
    point: PointName = None,
    at: At = None,
    sequence: Sequence = None,
    latest: Newest = False,
    latest_processed: Processed = False,
    latest_application: Application = False,
    change_point: Annotated[
        bool, typer.Option("--change-point", help="It is failed over already: go to another point; what it wrote goes.")
    ] = False,
    shut_down_source: Annotated[
        bool,
        typer.Option("--shut-down-source/--leave-source", help="Try to shut the source down first; go on if it fails."),
    ] = True,
    compute: Compute = None,
    network: Network = "",
    option: OptionsOfHands = None,
    wait: Wait = True,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Let the machine live on the other side, from a point: the latest unless another is chosen.

    Another point may be chosen until `replicar commit`, and `replicar cancel` takes all of it back.
    """
    if change_point and not any((point, at, sequence, latest, latest_processed, latest_application)):
        raise typer.BadParameter("say which point to change to")
    choose = partial(chosen, point, at, sequence, latest, latest_processed, latest_application)
    source = shut_down_source or change_point
    parameters = partial(_parameters, choose, option, compute=compute or "", network=network, shut_down_source=source)
    kind = JobKind.CHANGE_POINT if change_point else JobKind.FAILOVER
    _make(machine, kind, parameters, settings, as_json, wait=wait, timeout=timeout)


def commit(
    machine: Machine,
    notes: Notes = "",
    wait: Wait = True,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Keep a failover: no other point can be chosen from here on. What is stored stays, for the way home."""
    parameters = partial(_parameters, notes=notes)
    _make(machine, JobKind.COMMIT, parameters, settings, as_json, wait=wait, timeout=timeout)


def cancel(
    machine: Machine,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Take a failover back, under way or done but not committed: the machine is protected again."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            await carried_out(telling, control, await _undoing(telling, control, machine, timeout), timeout=timeout)

    run(as_json, work)


def failback(
    machine: Machine,
    destination: Annotated[str, typer.Option("--to", help="Where to, as the compute names it.")] = "",
    compute: Compute = None,
    option: OptionsOfHands = None,
    wait: Wait = True,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Bring a machine home whose failover is committed: only what differs is carried back, and compared."""
    parameters = partial(_parameters, None, option, destination=destination, compute=compute or "")
    _make(machine, JobKind.FAILBACK, parameters, settings, as_json, wait=wait, timeout=timeout)


def reprotect(
    machine: Machine,
    option: OptionsOfHands = None,
    wait: Wait = True,
    timeout: Timeout = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Protect a machine again that came home, without a full copy."""
    parameters = partial(_parameters, None, option)
    _make(machine, JobKind.REPROTECT, parameters, settings, as_json, wait=wait, timeout=timeout)


def disable(machine: Machine, notes: Notes = "", settings: SettingsFile = None, as_json: Json = False) -> None:
    """End a machine's replication. What is stored stays, and so does its key; `replicar protect` begins again."""
    parameters = partial(_parameters, notes=notes)
    _make(machine, JobKind.DISABLE, parameters, settings, as_json, wait=True, timeout=None)


COMMANDS: Final[tuple[Callable[..., None], ...]] = (
    drill,
    cleanup,
    failover,
    commit,
    cancel,
    failback,
    reprotect,
    disable,
)


def chosen(
    point: str | None,
    at: str | None,
    sequence: int | None,
    latest: bool,
    latest_processed: bool,
    latest_application: bool,
) -> PointChoice | None:
    """The one point that was asked for; None: none was.

    Raises:
        PermanentError: more than one was.
    """
    found: list[PointChoice] = []
    if point is not None:
        found.append(PointChoice(kind=PointKind.NAMED, name=point))
    if at is not None:
        found.append(PointChoice(kind=PointKind.INSTANT, time_ns=parse_moment(at)))
    if sequence is not None:
        found.append(PointChoice(kind=PointKind.SEQUENCE, sequence=sequence))
    flags = {
        PointKind.LATEST: latest,
        PointKind.LATEST_PROCESSED: latest_processed,
        PointKind.LATEST_APPLICATION: latest_application,
    }
    found += [PointChoice(kind=kind) for kind, given in flags.items() if given]
    if len(found) > 1:
        raise PermanentError("more than one point was asked for", hint="give one of them, or none")
    return found[0] if found else None


def options_of(given: list[str] | None) -> dict[str, str]:
    """Raises:
    PermanentError: one is no name=value.
    """
    options: dict[str, str] = {}
    for text in given or ():
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise PermanentError(f"{text!r} is no option", hint="write it as name=value")
        options[name] = value
    return options


def _parameters(
    choose: Callable[[], PointChoice | None] | None = None, option: list[str] | None = None, **fields: object
) -> JobParameters:
    """Raises:
    PermanentError: something of it can't be meant so.
    """
    point = choose() if choose is not None else None
    try:
        return JobParameters.model_validate({"point": point, "options": options_of(option), **fields})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " ".join(str(part) for part in first["loc"])
        raise PermanentError(f"{where} can't be taken: {first['msg']}", hint="see --help") from None


def _make(
    machine: str,
    kind: JobKind,
    parameters: Callable[[], JobParameters],
    settings: SettingsFile,
    as_json: bool,
    *,
    wait: bool,
    timeout: float | None,
) -> None:
    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            job = await control.make_job(machine, kind, parameters())
            await carried_out(telling, control, job, wait=wait, timeout=timeout)

    run(as_json, work)


async def _undoing(telling: Telling, control: ControlClient, machine: str, timeout: float | None) -> Job:
    """The job that takes the machine's failover back: made now, or by the config server as it stopped the failover."""
    for job in (await control.jobs(machine)).jobs:
        if job.kind is JobKind.CANCEL_FAILOVER and not job.state.has_ended:
            return job
        if job.kind is JobKind.FAILOVER and not job.state.has_ended:
            return await _undone(control, await follow(telling, control, await control.cancel_job(job.id), timeout))
    return await control.make_job(machine, JobKind.CANCEL_FAILOVER)


async def _undone(control: ControlClient, failover: Job) -> Job:
    """What takes a failover back that was asked to stop: the job that the config server made of it, whether or not that
    has ended by now; nothing, if it had not begun; a job of ours, if it went on to its end all the same."""
    for job in (await control.jobs(failover.machine)).jobs:  # newest first
        if job.id == failover.id:
            break
        if job.kind is JobKind.CANCEL_FAILOVER:
            return job
    if failover.state is JobState.CANCELLED:
        return failover.model_copy(update={"state": JobState.SUCCEEDED})
    return await control.make_job(failover.machine, JobKind.CANCEL_FAILOVER)
