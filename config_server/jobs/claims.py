"""Claims: which recovery worker carries out which job, so that there is one at a time, whoever dies; on a transaction.

A claim is a lease and a number, the *fence*, which is one higher with every claim of the job. Whoever reports says the
number; an older one is refused (`FencedError`), so a worker that was away can't report into a job that another has by
now. A lease that ran out is no fence in itself: as long as nobody else claimed the job, its worker may go on.

Nothing here tells what a step does. What it has to be is: safe to do again, since a worker may die after a step and
before its report.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from config_server import lives, machines, parties, policies
from config_server.jobs import book, opening
from config_server.jobs.plan import PLANS
from config_server.parties import Party
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    LEASE_SECONDS,
    MAX_CLAIMS,
    MAX_OPTIONS,
    Claim,
    ClaimedMachine,
    ClaimRequest,
    Job,
    JobDirective,
    JobEnd,
    JobReport,
    JobState,
    JobStep,
    StepReport,
)
from replicar.errors import ConflictError, FencedError, LimitError, PermanentError

#: What a worker may say of a job's end, and of a step.
_ENDS: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.SUSPENDED})


def claim(connection: sqlite3.Connection, worker: Party, request: ClaimRequest, now_ns: int) -> Claim:
    """The oldest job that is to be had, now this worker's; an empty claim if there is none."""
    book.note_worker(connection, worker.id, request.instance, request.kinds, now_ns)
    name = f"{worker.name}/{request.instance}"
    while (job := _next(connection, request, name, now_ns)) is not None:
        if job.fence >= MAX_CLAIMS:
            _give_up(connection, job, now_ns)
            continue
        update: dict[str, object] = {
            "state": JobState.IN_PROGRESS,
            "started_ns": job.started_ns or now_ns,
            "fence": job.fence + 1,
            "worker": name,
            "error": None,
            "lease_until_ns": lease_end(now_ns),
        }
        job = book.save(connection, job.model_copy(update=update), due_ns=lease_end(now_ns), worker_id=str(worker.id))
        life = lives.stored(connection, job.machine_id)
        parties.audit(connection, worker.id, "claim", f"{job.kind} {job.id} of machine {job.machine}", now_ns)
        return Claim(
            job=job,
            machine=_machine(connection, job, held=life.held),
            before=book.before(connection, job, life.left_ns),
            target=policies.target_of(connection, job.machine_id),
            policy=policies.of_machine(connection, job.machine_id),
            fence=job.fence,
        )
    return Claim()


def report(
    connection: sqlite3.Connection, worker: Party, job_id: str, said: JobReport, now_ns: int
) -> tuple[Job, JobDirective]:
    """Take a report in, and renew the lease.

    Raises:
        FencedError: the job is somebody else's by now, or has ended.
        PermanentError: it has no such step.
        LimitError: its result holds too much.
    """
    job = owned(connection, worker, job_id, said.fence)
    if job.state.has_ended:
        raise _fenced(job, said.fence)
    steps = {step.name: step for step in job.steps}
    for each in said.steps:
        if each.name not in steps:
            raise PermanentError(
                f"a {job.kind} job has no step {each.name!r}",
                hint=f"its steps are {', '.join(steps)}",
                status=400,
                step=each.name,
            )
        steps[each.name] = _step(steps[each.name], each, now_ns)
    update: dict[str, object] = {
        "steps": tuple(steps.values()),
        "result": _result(job, said.result),
        "estimate_seconds": said.estimate_seconds,
        "state": JobState.IN_PROGRESS,
        "lease_until_ns": lease_end(now_ns),
    }
    job = book.save(connection, job.model_copy(update=update), due_ns=lease_end(now_ns))
    book.note_worker(connection, worker.id, _instance(job), None, now_ns)
    return job, JobDirective(cancel_requested=job.cancel_requested, lease_seconds=LEASE_SECONDS)


def finish(connection: sqlite3.Connection, worker: Party, job_id: str, said: JobEnd, now_ns: int) -> Job:
    """End a job as its worker says, or put it aside until later; saying it again changes nothing.

    Raises:
        FencedError: the job is somebody else's by now, or has ended otherwise.
        PermanentError: it is no end, or one that its steps do not bear out.
    """
    job = owned(connection, worker, job_id, said.fence)
    if job.state.has_ended or (job.state is JobState.SUSPENDED and said.state is JobState.SUSPENDED):
        if job.state is said.state:
            return job
        raise _fenced(job, said.fence)
    _check_end(job, said)
    job = job.model_copy(update={"result": _result(job, said.result)})
    if said.state is JobState.SUSPENDED and not job.cancel_requested:
        update = {"state": JobState.SUSPENDED, "error": said.error, "lease_until_ns": None, "estimate_seconds": None}
        return book.save(connection, job.model_copy(update=update), due_ns=now_ns + int(said.retry_seconds * 10**9))
    state = JobState.CANCELLED if said.state is JobState.SUSPENDED else said.state
    return opening.end(connection, job, state, now_ns, error=said.error)


def owned(connection: sqlite3.Connection, worker: Party, job_id: str, fence: int) -> Job:
    """The job, if it is this worker's by this fence.

    Raises:
        FencedError: it is not, or not any more.
    """
    job = book.find(connection, job_id)
    row = connection.execute("SELECT worker_id FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if job.fence != fence or row["worker_id"] != str(worker.id):
        raise _fenced(job, fence)
    return job


def _next(connection: sqlite3.Connection, request: ClaimRequest, name: str, now_ns: int) -> Job | None:
    """The oldest job that is due; one that this very instance has is due at once, since who asks for more does not
    know of it: it was killed, and is back."""
    marks = ", ".join("?" * len(request.kinds))
    rows = connection.execute(
        f"SELECT job FROM jobs WHERE ended_ns IS NULL AND kind IN ({marks})"  # noqa: S608 - question marks
        " AND (due_ns <= ? OR (json_extract(job, '$.worker') = ? AND json_extract(job, '$.state') = 'in-progress'))"
        " AND (? IS NULL OR id = ?) ORDER BY number",
        (*request.kinds, now_ns, name, request.job, request.job),
    )
    for row in rows:
        job = Job.model_validate_json(row["job"])
        compute = job.parameters.compute
        if PLANS[job.kind].by_worker and (not compute or not request.computes or compute in request.computes):
            return job
    return None


def _machine(connection: sqlite3.Connection, job: Job, *, held: bool) -> ClaimedMachine:
    row = machines.machine_row(connection, job.machine_id)
    return ClaimedMachine(
        id=job.machine_id,
        name=job.machine,
        incarnation=row["incarnation"],
        epoch=row["epoch"],
        stored_sequence=row["stored_sequence"],
        stored_segment=row["stored_segment"],
        stored_digest=row["stored_digest"],
        held=held,
    )


def _step(step: JobStep, said: StepReport, now_ns: int) -> JobStep:
    ended = said.state.has_ended
    update: dict[str, object] = {
        "state": said.state,
        "done": said.done,
        "total": said.total,
        "message": said.message,
        "started_ns": step.started_ns or (now_ns if said.state is not JobState.NOT_STARTED else None),
        "ended_ns": (step.ended_ns or now_ns) if ended else None,
    }
    return step.model_copy(update=update)


def _result(job: Job, more: dict[str, str]) -> dict[str, str]:
    result = {**job.result, **more}
    if len(result) > MAX_OPTIONS:
        raise LimitError(f"a job's result holds {MAX_OPTIONS} values at most", hint="say less", status=413)
    return result


def _check_end(job: Job, said: JobEnd) -> None:
    if said.state not in _ENDS:
        raise PermanentError(f"{said.state} is no end of a job", hint=f"say one of {', '.join(sorted(_ENDS))}")
    undone = [step.name for step in job.steps if step.state is not JobState.SUCCEEDED]
    if said.state is JobState.SUCCEEDED and undone:
        raise PermanentError(
            f"the {job.kind} job of machine {job.machine} can't have succeeded: {undone[0]} has not",
            hint="report its steps before its end",
            status=409,
            step=undone[0],
        )
    if said.state in (JobState.FAILED, JobState.SUSPENDED) and said.error is None:
        raise PermanentError(f"a job that {said.state} says why", hint="give the error", status=400)
    if said.state is JobState.CANCELLED and not job.cancel_requested:
        raise ConflictError(
            f"nobody asked to cancel the {job.kind} job of machine {job.machine}",
            hint="say that it failed, and why",
            ours=said.state,
            theirs=job.state,
        )


def _give_up(connection: sqlite3.Connection, job: Job, now_ns: int) -> None:
    error = ErrorReport(
        part="config server",
        error="LimitError",
        message=f"{job.fence} claims by workers came to no end",
        hint="look at the workers' logs for what stops them, then ask for the job again",
    )
    opening.end(connection, job, JobState.FAILED, now_ns, error=error)


def _instance(job: Job) -> str:
    return (job.worker or "").partition("/")[2]


def lease_end(now_ns: int) -> int:
    """When a job that a worker claims or reports on now is anybody's again."""
    return now_ns + int(LEASE_SECONDS * 10**9)


def _fenced(job: Job, fence: int) -> FencedError:
    whose = f"it {job.state}" if job.state.has_ended else f"it is with {job.worker} now"
    return FencedError(
        f"the {job.kind} job of machine {job.machine} is not this worker's any more (claim {fence}; the latest is "
        f"{job.fence}): {whose}",
        hint="stop what is being done for it at once, and claim again",
        status=409,
        job=job.id,
    )
