"""The book of jobs: how they lie in the registry, found and changed as functions on a transaction.

A job is kept whole, as JSON of the same `Job` that operators see; the columns beside it are what it is looked up by.
Jobs that have ended are history, of which each machine's newest `MAX_ENDED_JOBS` are kept.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from typing import Final

from config_server.jobs.plan import PLANS
from config_server.machines import LIVE_SECONDS
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    MAX_DRILLS,
    MAX_ENDED_JOBS,
    Drill,
    Job,
    JobKind,
    JobState,
    JobStep,
)
from replicar.errors import PermanentError

#: What one reply lists, newest first.
MAX_LISTED: Final = 200
#: Of a machine's earlier jobs, those that a claim shows.
MAX_BEFORE: Final = 16
#: Recovery workers remembered; those that were silent longest are forgotten first.
MAX_WORKERS: Final = 256


def find(connection: sqlite3.Connection, job_id: str) -> Job:
    """Raises:
    PermanentError: there is none by this id.
    """
    job = known(connection, job_id)
    if job is None:
        raise PermanentError(
            f"no job with id {job_id} in this vault",
            hint="see `replicar jobs list`; each machine's oldest jobs leave the list at last",
            status=404,
            job=job_id,
        )
    return job


def known(connection: sqlite3.Connection, job_id: str) -> Job | None:
    row = connection.execute("SELECT job FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return Job.model_validate_json(row["job"]) if row is not None else None


def listed(
    connection: sqlite3.Connection, machine_id: uuid.UUID | None, *, going_only: bool = False
) -> tuple[tuple[Job, ...], bool]:
    """Jobs of a machine, or of all, newest first, and whether older ones were left out."""
    rows = connection.execute(
        "SELECT job FROM jobs WHERE (?1 IS NULL OR machine_id = ?1) AND (NOT ?2 OR ended_ns IS NULL)"
        " ORDER BY number DESC LIMIT ?3",
        (str(machine_id) if machine_id is not None else None, going_only, MAX_LISTED + 1),
    ).fetchall()
    return tuple(Job.model_validate_json(row["job"]) for row in rows[:MAX_LISTED]), len(rows) > MAX_LISTED


def going(connection: sqlite3.Connection, machine_id: uuid.UUID) -> tuple[Job, ...]:
    """The machine's jobs that have not ended, oldest first."""
    rows = connection.execute(
        "SELECT job FROM jobs WHERE machine_id = ? AND ended_ns IS NULL ORDER BY number", (str(machine_id),)
    ).fetchall()
    return tuple(Job.model_validate_json(row["job"]) for row in rows)


def before(connection: sqlite3.Connection, job: Job, left_ns: int | None) -> tuple[Job, ...]:
    """The worker's jobs of the machine since it left plain replication, newest first, without this one."""
    if left_ns is None:
        return ()
    rows = connection.execute(
        "SELECT job FROM jobs WHERE machine_id = ? AND id != ? AND ended_ns IS NOT NULL ORDER BY number DESC LIMIT ?",
        (str(job.machine_id), job.id, 4 * MAX_BEFORE),
    ).fetchall()
    jobs = (Job.model_validate_json(row["job"]) for row in rows)
    # a job that makes a machine leave is made at that very instant
    return tuple(each for each in jobs if PLANS[each.kind].by_worker and each.created_ns >= left_ns)[:MAX_BEFORE]


def enter(connection: sqlite3.Connection, job: Job, state_before: str, now_ns: int) -> None:
    connection.execute(
        "INSERT INTO jobs (id, machine_id, kind, state, job, state_before, due_ns) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (job.id, str(job.machine_id), job.kind, job.state, job.model_dump_json(), state_before, now_ns),
    )


def state_before(connection: sqlite3.Connection, job_id: str) -> str:
    """The stored state that the machine had before the job was made."""
    return str(connection.execute("SELECT state_before FROM jobs WHERE id = ?", (job_id,)).fetchone()[0])


def save(connection: sqlite3.Connection, job: Job, *, due_ns: int | None = None, worker_id: str | None = None) -> Job:
    """Write a job back; what is None of what it is claimed by stays as it is. Returns it, with its percentage."""
    job = job.model_copy(update={"percent": percent(job)})
    connection.execute(
        "UPDATE jobs SET state = ?, job = ?, ended_ns = ?, due_ns = coalesce(?, due_ns),"
        " worker_id = coalesce(?, worker_id) WHERE id = ?",
        (job.state, job.model_dump_json(), job.ended_ns, due_ns, worker_id, job.id),
    )
    if job.state.has_ended:
        connection.execute(
            "DELETE FROM jobs WHERE machine_id = ?1 AND ended_ns IS NOT NULL AND number NOT IN (SELECT number FROM jobs"
            " WHERE machine_id = ?1 AND ended_ns IS NOT NULL ORDER BY number DESC LIMIT ?2)",
            (str(job.machine_id), MAX_ENDED_JOBS),
        )
    return job


def percent(job: Job) -> int:
    """How much of a job is done, 0 to 100; all its steps count alike."""
    if job.state is JobState.SUCCEEDED or not job.steps:
        return 100
    return int(100 * sum(map(_share, job.steps)) / len(job.steps))


def _share(step: JobStep) -> float:
    if step.state is JobState.SUCCEEDED:
        return 1.0
    return min(step.done / step.total, 0.99) if step.total else 0.0


def record_drill(connection: sqlite3.Connection, drill: Drill, machine_id: uuid.UUID) -> None:
    """Keep a drill that counts; each machine's newest are kept."""
    connection.execute(
        "INSERT INTO drills VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (drill.job, str(machine_id), drill.ended_ns, drill.model_dump_json()),
    )
    connection.execute(
        "DELETE FROM drills WHERE machine_id = ?1 AND job_id NOT IN"
        " (SELECT job_id FROM drills WHERE machine_id = ?1 ORDER BY ended_ns DESC LIMIT ?2)",
        (str(machine_id), MAX_DRILLS),
    )


def drills(connection: sqlite3.Connection, machine_id: uuid.UUID) -> tuple[Drill, ...]:
    """The machine's drills that count, newest first."""
    rows = connection.execute(
        "SELECT drill FROM drills WHERE machine_id = ? ORDER BY ended_ns DESC LIMIT ?", (str(machine_id), MAX_LISTED)
    ).fetchall()
    return tuple(Drill.model_validate_json(row["drill"]) for row in rows)


def note_worker(
    connection: sqlite3.Connection, party_id: uuid.UUID, instance: str, kinds: tuple[JobKind, ...] | None, now_ns: int
) -> None:
    """A worker was heard of; `kinds` is None where it did not say what it does."""
    if kinds is None:
        connection.execute(
            "UPDATE recovery_workers SET heartbeat_ns = ? WHERE party_id = ? AND instance = ?",
            (now_ns, str(party_id), instance),
        )
        return
    connection.execute(
        "INSERT INTO recovery_workers VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET heartbeat_ns = excluded.heartbeat_ns, kinds = excluded.kinds",
        (str(party_id), instance, now_ns, json.dumps(kinds)),
    )
    connection.execute(
        "DELETE FROM recovery_workers WHERE (party_id, instance) NOT IN"
        " (SELECT party_id, instance FROM recovery_workers ORDER BY heartbeat_ns DESC LIMIT ?)",
        (MAX_WORKERS,),
    )


def kinds_online(connection: sqlite3.Connection, now_ns: int) -> frozenset[JobKind]:
    """The kinds of job that some worker that was heard of lately carries out."""
    rows = connection.execute(
        "SELECT kinds FROM recovery_workers WHERE heartbeat_ns >= ?", (now_ns - LIVE_SECONDS * 10**9,)
    ).fetchall()
    return frozenset(JobKind(kind) for row in rows for kind in json.loads(row["kinds"]))


def shown(job: Job, online: frozenset[JobKind], now_ns: int) -> Job:
    """The job as people see it: one that nobody carries out at present says so, and why."""
    idle = not job.state.has_ended and (job.lease_until_ns is None or job.lease_until_ns < now_ns)
    if not idle or not PLANS[job.kind].by_worker or job.kind in online:
        return job
    error = ErrorReport(
        part="config server",
        error="TransientError",
        message=f"no recovery worker is online that carries out {job.kind} jobs",
        hint="start one where the storage account can be reached: `recovery-worker run`; the job goes on then",
    )
    return job.model_copy(update={"error": job.error or error})
