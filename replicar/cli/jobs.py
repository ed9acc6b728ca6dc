"""`jobs`: what was asked for, how far it is, and its end."""

from __future__ import annotations

from typing import Annotated

import typer

from replicar.cli.console import Json, SettingsFile, Telling, run
from replicar.cli.following import Timeout, carried_out, show_drills, show_job, show_jobs
from replicar.cli.settings import load_settings

app = typer.Typer(
    name="jobs",
    help="List jobs, look at one, follow it to its end, cancel it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
JobId = Annotated[str, typer.Argument(help="The job's id, as `replicar jobs list` shows it.")]


@app.command("list")
def list_jobs(
    machine: Annotated[str | None, typer.Option(help="Only this machine's.", show_default=False)] = None,
    going: Annotated[bool, typer.Option("--going", help="Only those that have not ended.")] = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.jobs(machine, going_only=going)
        telling.result(found.model_dump(mode="json"), lambda console: show_jobs(console, found.jobs))

    run(as_json, work)


@app.command()
def show(job: JobId, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Show one job: its steps, what it found, what it waits for or failed of."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.job(job)
        telling.result(found.model_dump(mode="json"), lambda console: show_job(console, found))

    run(as_json, work)


@app.command()
def follow(job: JobId, timeout: Timeout = None, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Follow a job to its end; exit status 0 if it succeeded."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            await carried_out(telling, control, await control.job(job), timeout=timeout)

    run(as_json, work)


@app.command()
def cancel(job: JobId, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Cancel a job; one that a worker is at stops at its next step. A failover is undone then."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.cancel_job(job)
        telling.result(found.model_dump(mode="json"), lambda console: show_job(console, found))

    run(as_json, work)


@app.command()
def drills(
    machine: Annotated[str, typer.Argument(help="The machine's name.")],
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """List the drills of a machine that count, with what recovery took each time."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.drills(machine)
        data = {"drills": [drill.model_dump(mode="json") for drill in found]}
        telling.result(data, lambda console: show_drills(console, found))

    run(as_json, work)
