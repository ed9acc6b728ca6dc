"""What operators call to make, see and cancel jobs, and what recovery workers call to carry them out."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from functools import partial
from typing import Final

from config_server import lives, machines, parties
from config_server.api import Call, Context, Route, hold
from config_server.bells import EVERYBODY, Topic
from config_server.jobs import book, claims, opening, own
from config_server.rights import OPERATORS, PEOPLE, WORKERS
from replicar.control.messages import (
    Claim,
    ClaimRequest,
    DrillList,
    HoldRequest,
    Job,
    JobCancel,
    JobDirective,
    JobEnd,
    JobList,
    JobReport,
    JobRequest,
    MachineHold,
)

#: How often a waiting claim looks whether a lease has run out.
LOOK_SECONDS: Final = 5.0


async def post_job(context: Context, call: Call) -> Job:
    """Make a job for a machine; asking again with the same id makes no second one."""
    request, name, now_ns = JobRequest.from_json(call.body), call.names["name"], context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[Job, frozenset[uuid.UUID | None]]:
        machine = parties.machine_named(connection, name)
        server = machines.server_of(connection, machine.id)
        known = book.known(connection, request.id) is not None
        job = opening.make(connection, context.vault, machine, request, call.asking().name, now_ns)
        if not known:
            parties.audit(connection, call.asking().id, request.kind, f"machine {name}, job {job.id}", now_ns)
        return _shown(connection, job, now_ns), frozenset({server, machines.server_of(connection, machine.id)})

    job, servers = await context.registry.run(change)
    _ring(context, job, *servers)
    return job


async def get_jobs(context: Context, call: Call) -> JobList:
    """Jobs, newest first; of one machine (`?machine=`), or only those that have not ended (`?going=yes`)."""
    name, now_ns = call.names.get("name") or call.query.get("machine"), context.clock.now_ns()
    only = call.flag("going")

    def read(connection: sqlite3.Connection) -> JobList:
        machine_id = parties.machine_named(connection, name).id if name else None
        found, truncated = book.listed(connection, machine_id, going_only=only)
        if any(not job.state.has_ended for job in found):
            for machine in {job.machine_id for job in found if not job.state.has_ended}:
                own.advance(connection, machine, now_ns)
            found, truncated = book.listed(connection, machine_id, going_only=only)
        online = book.kinds_online(connection, now_ns)
        return JobList(jobs=tuple(book.shown(job, online, now_ns) for job in found), truncated=truncated)

    return await context.registry.run(read)


async def get_job(context: Context, call: Call) -> Job:
    """One job as it stands."""
    now_ns = context.clock.now_ns()

    def read(connection: sqlite3.Connection) -> Job:
        job = book.find(connection, call.names["id"])
        if not job.state.has_ended:
            own.advance(connection, job.machine_id, now_ns)
        return _shown(connection, book.find(connection, job.id), now_ns)

    return await context.registry.run(read)


async def post_cancel(context: Context, call: Call) -> Job:
    """Cancel a job: at once if nobody is at it, else it is asked to stop."""
    JobCancel.from_json(call.body or b"{}")
    now_ns = context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[Job, uuid.UUID | None]:
        job = book.find(connection, call.names["id"])
        server = machines.server_of(connection, job.machine_id)
        job = opening.cancel(connection, job, now_ns)
        parties.audit(connection, call.asking().id, "cancel", f"{job.kind} {job.id} of machine {job.machine}", now_ns)
        return job, server

    job, server = await context.registry.run(change)
    _ring(context, job, server)
    return job


async def get_drills(context: Context, call: Call) -> DrillList:
    """A machine's drills that count, newest first, with what recovery took each time."""
    name = call.names["name"]
    found = await context.registry.run(lambda c: book.drills(c, parties.machine_named(c, name).id))
    return DrillList(drills=found)


# --- recovery workers ---


async def post_claim(context: Context, call: Call) -> Claim:
    """A job to carry out, as soon as there is one, or nothing once the worker's patience is over."""
    request, worker = ClaimRequest.from_json(call.body), call.asking()
    begun = asyncio.get_running_loop().time()
    with context.bells.listen(Topic.JOBS, EVERYBODY) as bell:
        while True:
            now_ns = context.clock.now_ns()
            found = await context.registry.run(partial(claims.claim, worker=worker, request=request, now_ns=now_ns))
            left = begun + request.wait_seconds - asyncio.get_running_loop().time()
            if found.job is not None or left <= 0 or context.bells.closed:
                return found
            # leases and pauses run out without a bell
            await hold(bell, min(left, LOOK_SECONDS))


async def post_report(context: Context, call: Call) -> JobDirective:
    """How far a job is; renews the lease."""
    said, worker, now_ns = JobReport.from_json(call.body), call.asking(), context.clock.now_ns()
    job, directive = await context.registry.run(
        lambda connection: claims.report(connection, worker, call.names["id"], said, now_ns)
    )
    _ring(context, job)
    return directive


async def post_finish(context: Context, call: Call) -> Job:
    """How a job ended, or that it has to wait."""
    said, worker, now_ns = JobEnd.from_json(call.body), call.asking(), context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> Job:
        job = claims.finish(connection, worker, call.names["id"], said, now_ns)
        parties.audit(connection, worker.id, f"job {job.state}", f"{job.kind} of machine {job.machine}", now_ns)
        return job

    job = await context.registry.run(change)
    _ring(context, job)
    return job


async def post_hold(context: Context, call: Call) -> MachineHold:
    """Take the job's machine from its process server, under a new epoch."""
    return await _held(context, call, take=True)


async def post_release(context: Context, call: Call) -> MachineHold:
    """Give the job's machine back to a process server, under a new epoch."""
    return await _held(context, call, take=False)


async def _held(context: Context, call: Call, *, take: bool) -> MachineHold:
    said, worker, now_ns = HoldRequest.from_json(call.body), call.asking(), context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[MachineHold, Job, frozenset[uuid.UUID | None]]:
        job = claims.owned(connection, worker, call.names["id"], said.fence)
        before = machines.server_of(connection, job.machine_id)
        if take:
            found = lives.hold(connection, job.machine_id)
        else:
            found = lives.release(connection, context.vault, job.machine_id, now_ns)
        action = "hold" if take else "release"
        parties.audit(connection, worker.id, action, f"machine {job.machine}, epoch {found.epoch}", now_ns)
        return found, job, frozenset({before, machines.server_of(connection, job.machine_id)})

    found, job, servers = await context.registry.run(change)
    _ring(context, job, *servers)
    return found


def _shown(connection: sqlite3.Connection, job: Job, now_ns: int) -> Job:
    return book.shown(job, book.kinds_online(connection, now_ns), now_ns)


def _ring(context: Context, job: Job, *servers: uuid.UUID | None) -> None:
    """The process servers first: an agent that comes before its process server knows of it is only sent away again."""
    for server_id in servers:
        if server_id is not None:
            context.bells.ring(Topic.INSTRUCTIONS, server_id)
    context.bells.ring(Topic.INSTRUCTIONS, job.machine_id)
    context.bells.ring(Topic.JOBS, EVERYBODY)


ROUTES: Final[tuple[Route, ...]] = (
    Route("POST", "/machines/{name}/jobs", post_job, OPERATORS, JobRequest),
    Route("GET", "/machines/{name}/jobs", get_jobs, PEOPLE, query=("going",)),
    Route("GET", "/machines/{name}/drills", get_drills, PEOPLE),
    Route("GET", "/jobs", get_jobs, PEOPLE, query=("machine", "going")),
    Route("GET", "/jobs/{id}", get_job, PEOPLE),
    Route("POST", "/jobs/{id}/cancel", post_cancel, OPERATORS, JobCancel),
    Route("POST", "/worker/claim", post_claim, WORKERS, ClaimRequest),
    Route("POST", "/worker/jobs/{id}/report", post_report, WORKERS, JobReport),
    Route("POST", "/worker/jobs/{id}/finish", post_finish, WORKERS, JobEnd),
    Route("POST", "/worker/jobs/{id}/hold", post_hold, WORKERS, HoldRequest),
    Route("POST", "/worker/jobs/{id}/release", post_release, WORKERS, HoldRequest),
)
