"""How jobs begin and end, and what that does to the life of their machine; functions on a transaction.

One function makes jobs, whoever asks, and one ends them, whatever they came to: so a job and the state of its machine
can't disagree. A job that was never claimed is withdrawn as if it had not been; one that was claimed may have left
things behind, which its state after it says (see `lifecycle`).
"""

from __future__ import annotations

import sqlite3
import uuid
from typing import Any

from config_server import lifecycle, lives, parties, placement, policies
from config_server.jobs import book, choice, own
from config_server.jobs.plan import CANCELLABLE, PLANS, conflicts
from config_server.parties import Party
from config_server.vault import Vault
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    Drill,
    Job,
    JobKind,
    JobParameters,
    JobRequest,
    JobState,
    LifeState,
    PointChoice,
    PointKind,
    TargetSettings,
)
from replicar.errors import ConflictError, PermanentError

#: The point that is taken where none was chosen: all that there is, or (for a drill, which hurries) what is there.
_DEFAULT_POINTS = {
    JobKind.TEST_FAILOVER: PointKind.LATEST_PROCESSED,
    JobKind.FAILOVER: PointKind.LATEST,
    JobKind.CHANGE_POINT: PointKind.LATEST,
}


def make(
    connection: sqlite3.Connection, vault: Vault, machine: Party, request: JobRequest, requested_by: str, now_ns: int
) -> Job:
    """Make a job, or return the one that was made by this id before.

    Raises:
        PermanentError: parameters that its kind does not read, a point that is not there, a machine that was removed.
        TransientError: the chosen point is not in storage yet.
        ConflictError: another job of the machine is in its way, the machine is in no state for it, or the id belongs
            to another job.
    """
    made = book.known(connection, request.id)
    if made is not None:
        return _same(made, machine, request)
    if machine.removed_ns is not None:
        raise PermanentError(
            f"machine {machine.name} was removed from the vault",
            hint="enrol it again: `mobility-agent enrol` on that machine",
            status=409,
            machine=machine.name,
        )
    parameters = _parameters(request, policies.target_of(connection, machine.id))
    own.advance(connection, machine.id, now_ns)
    _check_conflicts(connection, machine, request)
    state = lives.state_of(connection, machine.id)
    following = lifecycle.begin(machine.name, state, request.kind)
    if parameters.point is not None:
        choice.check(connection, machine, parameters.point, now_ns)
    job = Job(
        id=request.id,
        kind=request.kind,
        machine=machine.name,
        machine_id=machine.id,
        state=JobState.NOT_STARTED,
        requested_by=requested_by,
        created_ns=now_ns,
        steps=PLANS[request.kind].fresh_steps(),
        parameters=parameters,
    )
    before = lives.stored(connection, machine.id).state
    if following is not state:
        lives.move(connection, machine.id, following, now_ns)
    book.enter(connection, job, before, now_ns)
    if request.kind is JobKind.ENABLE:
        if parameters.policy is not None:
            policies.assign(connection, machine, parameters.policy)
        placement.protect(connection, vault, machine, now_ns)
    if request.kind is JobKind.DISABLE:
        _end_waiting(connection, machine.id, now_ns, but=job.id)
        lives.withdraw(connection, machine.id)
    own.advance(connection, machine.id, now_ns)
    return book.find(connection, job.id)


def protect(
    connection: sqlite3.Connection,
    vault: Vault,
    machine: Party,
    requested_by: str,
    now_ns: int,
    *,
    policy: str | None = None,
) -> tuple[Job, ...]:
    """Enable a machine's protection and finalize it when it is there; one that replicates already stays as it is.

    Raises:
        PermanentError: the machine was removed, or no process server is alive.
        ConflictError: the machine is not at home.
    """
    if machine.removed_ns is None and lives.stored(connection, machine.id).state in lifecycle.REPLICATING:
        if policy is not None:
            policies.assign(connection, machine, policy)
        return ()
    enable = JobParameters(policy=policy)
    requests = [
        JobRequest(id=str(uuid.uuid4()), kind=kind, parameters=parameters)
        for kind, parameters in ((JobKind.ENABLE, enable), (JobKind.FINALIZE, JobParameters()))
    ]
    return tuple(make(connection, vault, machine, request, requested_by, now_ns) for request in requests)


def remove(connection: sqlite3.Connection, machine: Party, now_ns: int) -> None:
    """End a machine's protection and refuse it; its keys and points stay, so that what is stored can be recovered.

    Its epoch rises, so that a process server that does not hear of it can be shut out (see `replicar.log.headers`).
    """
    if machine.removed_ns is None:
        connection.execute("UPDATE machines SET epoch = epoch + 1 WHERE id = ?", (str(machine.id),))
    _end_waiting(connection, machine.id, now_ns)
    lives.withdraw(connection, machine.id)
    lives.move(connection, machine.id, LifeState.DISABLED, now_ns)
    parties.remove(connection, machine, now_ns)


def end(
    connection: sqlite3.Connection,
    job: Job,
    state: JobState,
    now_ns: int,
    *,
    error: ErrorReport | None = None,
) -> Job:
    """End a job, and move its machine accordingly."""
    before = lives.stored(connection, job.machine_id).state
    following = lifecycle.end(job.machine, before, job.kind, succeeded=state is JobState.SUCCEEDED)
    if following is not before:
        lives.move(connection, job.machine_id, following, now_ns)
    changed = {"state": state, "ended_ns": now_ns, "error": error, "lease_until_ns": None, "estimate_seconds": None}
    job = book.save(connection, job.model_copy(update=changed))
    if job.kind is JobKind.CLEAN_UP and state is JobState.SUCCEEDED:
        _count_drill(connection, job, now_ns)
    if job.kind is JobKind.FAILOVER and state is JobState.CANCELLED:
        undo(connection, job, now_ns)
    return job


def cancel(connection: sqlite3.Connection, job: Job, now_ns: int) -> Job:
    """Cancel a job: at once if nobody is at it, else it is asked to stop; again: changes nothing.

    Raises:
        ConflictError: it has ended otherwise, or is of a kind that ends as it ends.
    """
    if job.state is JobState.CANCELLED:
        return job
    if job.state.has_ended:
        raise ConflictError(
            f"the {job.kind} job of machine {job.machine} has ended: it {job.state}",
            hint=f"what can be done now: `replicar machines {job.machine}` shows its state",
            ours="cancel",
            theirs=job.state,
            job=job.id,
        )
    if job.fence == 0 and PLANS[job.kind].by_worker:
        lives.move(connection, job.machine_id, LifeState(book.state_before(connection, job.id)), now_ns)
        changed = {"state": JobState.CANCELLED, "ended_ns": now_ns}
        return book.save(connection, job.model_copy(update=changed))
    if job.kind not in CANCELLABLE:
        raise ConflictError(
            f"a {job.kind} job can't be cancelled once it was begun",
            hint="wait for its end: `replicar jobs follow`",
            ours="cancel",
            theirs=job.state,
            job=job.id,
        )
    if job.kind is JobKind.ENABLE:
        _end_waiting(connection, job.machine_id, now_ns, but=job.id)
        lives.withdraw(connection, job.machine_id)
    if job.lease_until_ns is None or job.lease_until_ns < now_ns:
        # nobody is at it; the fence keeps out whoever was
        return end(connection, job.model_copy(update={"fence": job.fence + 1}), JobState.CANCELLED, now_ns)
    return book.save(connection, job.model_copy(update={"cancel_requested": True}))


def undo(connection: sqlite3.Connection, failover: Job, now_ns: int) -> Job:
    """What follows a cancelled failover by itself, so that cancelling leaves the machine protected."""
    undo_id = str(uuid.uuid5(uuid.UUID(failover.id), JobKind.CANCEL_FAILOVER))
    state = lives.stored(connection, failover.machine_id).state
    job = Job(
        id=undo_id,
        kind=JobKind.CANCEL_FAILOVER,
        machine=failover.machine,
        machine_id=failover.machine_id,
        state=JobState.NOT_STARTED,
        requested_by=failover.requested_by,
        created_ns=now_ns,
        steps=PLANS[JobKind.CANCEL_FAILOVER].fresh_steps(),
    )
    lifecycle.begin(job.machine, state, job.kind)
    book.enter(connection, job, state, now_ns)
    return job


def _same(made: Job, machine: Party, request: JobRequest) -> Job:
    if (made.machine_id, made.kind) == (machine.id, request.kind):
        return made
    raise ConflictError(
        f"the id {request.id} belongs to the {made.kind} job of machine {made.machine}",
        hint="ask with a new id",
        ours=f"{request.kind} of {machine.name}",
        theirs=f"{made.kind} of {made.machine}",
    )


def _parameters(request: JobRequest, target: TargetSettings) -> JobParameters:
    given: dict[str, Any] = request.parameters.model_dump(exclude_defaults=True)
    unread = sorted(given.keys() - PLANS[request.kind].parameters)
    if unread:
        raise PermanentError(
            f"a {request.kind} job knows nothing of {', '.join(unread)}", hint="leave that out", status=400
        )
    parameters = request.parameters
    default = _DEFAULT_POINTS.get(request.kind)
    if default is None:
        return parameters
    is_drill = request.kind is JobKind.TEST_FAILOVER
    update = {
        "point": parameters.point or PointChoice(kind=default),
        "compute": parameters.compute or target.compute,
        "network": parameters.network or (target.drill_network if is_drill else target.network),
    }
    return parameters.model_copy(update=update)


def _check_conflicts(connection: sqlite3.Connection, machine: Party, request: JobRequest) -> None:
    for other in book.going(connection, machine.id):
        if conflicts(request.kind, other.kind):
            raise ConflictError(
                f"machine {machine.name} has a {other.kind} job that has not ended, so no {request.kind} job can be "
                "made",
                hint=f"wait for it, or cancel it: `replicar jobs follow` or `cancel`, and {other.id}",
                ours=f"{request.kind} {request.id}",
                theirs=f"{other.kind} {other.id}",
                machine=machine.name,
            )


def _end_waiting(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int, *, but: str = "") -> None:
    for job in book.going(connection, machine_id):
        if job.id != but:
            changed = {"state": JobState.CANCELLED, "ended_ns": now_ns, "fence": job.fence + 1}
            book.save(connection, job.model_copy(update=changed))


def _count_drill(connection: sqlite3.Connection, clean_up: Job, now_ns: int) -> None:
    """A drill counts when it succeeded and was cleaned up."""
    rows = connection.execute(
        "SELECT job FROM jobs WHERE machine_id = ? AND kind = ? ORDER BY number DESC LIMIT 1",
        (str(clean_up.machine_id), JobKind.TEST_FAILOVER),
    ).fetchall()
    for drill in (Job.model_validate_json(row["job"]) for row in rows):
        if drill.state is not JobState.SUCCEEDED or drill.started_ns is None or drill.ended_ns is None:
            continue
        sequence = drill.result.get("sequence", "")
        counted = Drill(
            job=drill.id,
            machine=drill.machine,
            ended_ns=now_ns,
            recovery_seconds=max(drill.ended_ns - drill.started_ns, 0) / 1e9,
            point_sequence=int(sequence) if sequence.isascii() and sequence.isdecimal() else 0,
            notes=clean_up.parameters.notes,
        )
        book.record_drill(connection, counted, clean_up.machine_id)
        parties.audit(connection, clean_up.machine_id, "drill", f"machine {drill.machine}", now_ns)
