"""The jobs that need no worker: enabling, finalizing and disabling protection, which reports and settings answer.

Nothing is done here but looking: each step is a question to the registry, asked again whenever there may be another
answer. So these jobs are the same after a restart, and can't be done twice.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from config_server import lifecycle, lives, machines, policies
from config_server.jobs import book
from config_server.jobs.plan import PLANS
from replicar.control.message import ErrorReport
from replicar.control.messages import AgentHeartbeat, Job, JobKind, JobState, JobStep


@dataclass(frozen=True, slots=True)
class Answer:
    """How it stands with one step: whether it is reached, how far it is, and what it waits for."""

    reached: bool
    done: int = 0
    total: int = 0
    waiting: ErrorReport | None = None
    estimate_seconds: float | None = None


Question = Callable[[sqlite3.Connection, sqlite3.Row], Answer]


def advance(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int) -> tuple[Job, ...]:
    """Look again at the machine's jobs that need no worker; returns those that changed."""
    changed = []
    for job in book.going(connection, machine_id):
        if PLANS[job.kind].by_worker:
            continue
        looked = _looked(connection, job, now_ns)
        if looked != job:
            changed.append(looked)
    return tuple(changed)


def _looked(connection: sqlite3.Connection, job: Job, now_ns: int) -> Job:
    row = machines.machine_row(connection, job.machine_id)
    steps: list[JobStep] = []
    waiting: Answer | None = None
    for step in job.steps:
        if waiting is not None or step.state is JobState.SUCCEEDED:
            steps.append(step)
            continue
        answer = QUESTIONS[step.name](connection, row)
        if not answer.reached:
            waiting = answer
        steps.append(_step(step, answer, now_ns))
    update: dict[str, object] = {"steps": tuple(steps), "started_ns": job.started_ns or now_ns}
    if waiting is None:
        update |= {"state": JobState.SUCCEEDED, "ended_ns": now_ns, "error": None, "estimate_seconds": None}
        before = lives.stored(connection, job.machine_id).state
        following = lifecycle.end(job.machine, before, job.kind, succeeded=True)
        if following is not before:
            lives.move(connection, job.machine_id, following, now_ns)
    else:
        state = JobState.IN_PROGRESS if waiting.waiting is None else JobState.SUSPENDED
        update |= {"state": state, "error": waiting.waiting, "estimate_seconds": waiting.estimate_seconds}
    looked = job.model_copy(update=update)
    looked = looked.model_copy(update={"percent": book.percent(looked)})
    return book.save(connection, looked) if looked != job else job


def _step(step: JobStep, answer: Answer, now_ns: int) -> JobStep:
    return step.model_copy(
        update={
            "state": JobState.SUCCEEDED if answer.reached else JobState.IN_PROGRESS,
            "done": answer.done,
            "total": answer.total,
            "started_ns": step.started_ns or now_ns,
            "ended_ns": now_ns if answer.reached else None,
        }
    )


def _assigned(connection: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    return Answer(reached=row["process_server_id"] is not None)


def _agent(connection: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    if lives.seen(connection, row).reporting:
        return Answer(reached=True)
    if row["heartbeat_ns"] is not None:
        return Answer(reached=False)
    return Answer(
        reached=False,
        waiting=ErrorReport(
            part="agent",
            error="TransientError",
            message=f"the agent of machine {row['name']} was not heard of yet",
            hint="start it there: `mobility-agent run`",
        ),
    )


def _copied(connection: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    seen = lives.seen(connection, row)
    if row["report"] is None:
        return Answer(reached=seen.has_point)
    report = AgentHeartbeat.model_validate_json(row["report"])
    return Answer(
        reached=seen.has_point or (seen.reporting and not seen.copying),
        done=sum(disk.seed_done_bytes for disk in report.disks),
        total=sum(disk.seed_total_bytes for disk in report.disks),
        estimate_seconds=report.copy_remaining_seconds,
    )


def _point(connection: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    return Answer(reached=lives.seen(connection, row).has_point)


def _target(connection: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    missing = policies.target_of(connection, uuid.UUID(row["id"])).missing()
    if not missing:
        return Answer(reached=True)
    return Answer(
        reached=False,
        waiting=ErrorReport(
            part="target settings",
            error="PermanentError",
            message=f"it is not decided what machine {row['name']} is to be made of: {', '.join(missing)}",
            hint=f"decide it: {policies.deciding(row['name'], missing)}; it is protected meanwhile, and a drill or "
            "failover can be told by --compute",
        ),
    )


def _withdrawn(connection: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    return Answer(reached=row["process_server_id"] is None)


#: By step; names are unique among the jobs that need no worker.
QUESTIONS: Final[dict[str, Question]] = {
    "assign": _assigned,
    "agent": _agent,
    "copied": _copied,
    "point": _point,
    "target": _target,
    "withdraw": _withdrawn,
}
assert {step.name for kind in JobKind if not PLANS[kind].by_worker for step in PLANS[kind].steps} <= QUESTIONS.keys()
