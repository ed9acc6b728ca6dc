"""Jobs: what an operator asks for, how far it is, and what a recovery worker and the config server say about it.

A job is data that the config server keeps. Kinds that touch disks, storage or virtual machines are carried out by a
*recovery worker*, which claims one, does its steps, reports, and may die at any instant; docs/jobs.md is the protocol
in full. The others the config server sees to itself.

Whoever makes a job chooses its id, so that asking again makes no second one.
"""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from replicar.control.message import Count, Digest, ErrorReport, Message, Name, Seconds, Text
from replicar.control.messages.limits import MAX_WAIT_SECONDS
from replicar.control.messages.policy import Policy, TargetSettings

#: How long a worker may be silent before another may claim what it does. A renewal is due at a third of it.
LEASE_SECONDS: Final = 60.0
#: Jobs of one machine that have ended and are kept, and drills of one machine.
MAX_ENDED_JOBS: Final = 200
MAX_DRILLS: Final = 1000
MAX_OPTIONS: Final = 32
MAX_STEPS: Final = 16
#: Claims of one job; a job that its workers always die of ends as failed.
MAX_CLAIMS: Final = 100
MAX_NOTES: Final = 4096

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Notes = Annotated[str, StringConstraints(max_length=MAX_NOTES)]
OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Options = Annotated[dict[OptionName, Text], Field(max_length=MAX_OPTIONS)]


class LifeState(StrEnum):
    """Where a machine is in the operator's circle."""

    UNPROTECTED = "unprotected"
    ENABLING = "enabling"
    INITIAL_REPLICATION = "initial-replication"
    WAITING_FOR_POINT = "waiting-for-first-point"
    PROTECTED = "protected"
    RESYNCHRONISING = "resynchronising"
    TEST_FAILOVER = "test-failover"
    CLEAN_UP_PENDING = "clean-up-pending"
    FAILING_OVER = "failing-over"
    FAILOVER_STOPPED = "failover-stopped"
    FAILED_OVER = "failed-over"
    COMMITTED = "committed"
    FAILING_BACK = "failing-back"
    FAILED_BACK = "failed-back"
    REPROTECTING = "re-protecting"
    DISABLED = "disabled"


class JobKind(StrEnum):
    """What a job is to reach."""

    ENABLE = "enable-protection"
    FINALIZE = "finalize-protection"
    TEST_FAILOVER = "test-failover"
    CLEAN_UP = "clean-up"
    FAILOVER = "failover"
    CHANGE_POINT = "change-point"
    CANCEL_FAILOVER = "cancel-failover"
    COMMIT = "commit"
    FAILBACK = "failback"
    REPROTECT = "re-protect"
    DISABLE = "disable-protection"


class JobState(StrEnum):
    """How it stands with a job, or with one of its steps. A suspended job goes on by itself."""

    NOT_STARTED = "not-started"
    IN_PROGRESS = "in-progress"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class PointKind(StrEnum):
    """Which of a machine's recovery points is meant."""

    LATEST = "latest"
    LATEST_PROCESSED = "latest-processed"
    LATEST_APPLICATION = "latest-application"
    NAMED = "named"
    INSTANT = "instant"
    SEQUENCE = "sequence"


class PointChoice(Message):
    """A recovery point as it is chosen: `name` for a named one, `time_ns` for an instant, `sequence` for a sequence.

    `latest` takes in everything that still arrives before it is read; `latest-processed` takes what storage holds now.
    """

    kind: PointKind = PointKind.LATEST
    name: Annotated[str, StringConstraints(max_length=255)] = ""
    time_ns: Count | None = None
    sequence: Count | None = None


class JobParameters(Message):
    """What was asked for; a kind reads what concerns it (docs/jobs.md) and the config server refuses the rest.

    `compute` names the hands that make machines (`qemu`, `azure`); empty: as the target settings say. `options` are
    for the hands alone. `shut_down_source`: try to, and go on if it can't be done.
    """

    point: PointChoice | None = None
    compute: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$|^$")] = ""
    network: Text = ""
    shut_down_source: bool = True
    destination: Text = ""
    policy: Name | None = None
    notes: Notes = ""
    options: Options = Field(default_factory=dict)


class JobStep(Message):
    """One step: how it stands, and how much of how much is done (0 of 0: nobody counts), in `unit`."""

    name: Text
    title: Text
    state: JobState = JobState.NOT_STARTED
    done: Count = 0
    total: Count = 0
    unit: Literal["", "bytes", "rows"] = ""
    message: Text = ""
    started_ns: Count | None = None
    ended_ns: Count | None = None


class JobRequest(Message):
    """POST /v1/machines/{name}/jobs."""

    id: Id
    kind: JobKind
    parameters: JobParameters = JobParameters()


class Job(Message):
    """A job as it stands. `error`: why it failed, or what it is waiting for, with the next step.

    `fence` counts how often it was claimed; `worker` is who has it now. `percent` is of its steps, and of the running
    one's count. `estimate_seconds`: what is left of the running step, where that is known.
    """

    id: Id
    kind: JobKind
    machine: Text
    machine_id: uuid.UUID
    state: JobState
    requested_by: Text
    created_ns: Count
    started_ns: Count | None = None
    ended_ns: Count | None = None
    steps: Annotated[tuple[JobStep, ...], Field(max_length=MAX_STEPS)]
    parameters: JobParameters = JobParameters()
    result: Options = Field(default_factory=dict)
    error: ErrorReport | None = None
    cancel_requested: bool = False
    worker: Text | None = None
    fence: Count = 0
    lease_until_ns: Count | None = None
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    estimate_seconds: Seconds | None = None

    @property
    def step(self) -> JobStep | None:
        """The first step that has not succeeded."""
        return next((step for step in self.steps if step.state is not JobState.SUCCEEDED), None)


class JobList(Message):
    """GET /v1/jobs and /v1/machines/{name}/jobs, newest first; `truncated`: older ones were left out."""

    jobs: tuple[Job, ...]
    truncated: bool = False


class Drill(Message):
    """A drill that counts: a test failover that succeeded, and was cleaned up.

    `recovery_seconds` is what it took from its first step to a machine that had proven itself.
    """

    job: Id
    machine: Text
    ended_ns: Count
    recovery_seconds: Seconds
    point_sequence: Count = 0
    notes: Notes = ""


class DrillList(Message):
    drills: tuple[Drill, ...]


class JobCancel(Message):
    """POST /v1/jobs/{id}/cancel."""

    notes: Notes = ""


# --- between a recovery worker and the config server ---


class ClaimRequest(Message):
    """POST /v1/worker/claim: a worker asks for a job of one of these kinds, and waits for one.

    `instance` tells apart programs that have the same identity; any text that no other uses. `job`: only this one.
    """

    instance: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    kinds: Annotated[tuple[JobKind, ...], Field(min_length=1, max_length=len(JobKind))]
    computes: Annotated[tuple[Text, ...], Field(max_length=8)] = ()
    job: Id | None = None
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0


class ClaimedMachine(Message):
    """What a worker has to know of the job's machine; the key it asks for by itself (GET /v1/machines/{name}/key)."""

    id: uuid.UUID
    name: Text
    incarnation: Count
    epoch: Count
    stored_sequence: Count
    stored_segment: Count | None
    stored_digest: Digest
    held: bool = False


class Claim(Message):
    """The reply: a job, or None. `fence` proves who owns it; say it with every report.

    `before`: the jobs whose results this one builds on, newest first: the drill that is to be cleaned up, the failover
    that is to be committed, undone or brought home. `target` and `policy` are the machine's, as they are now.
    """

    job: Job | None = None
    machine: ClaimedMachine | None = None
    before: tuple[Job, ...] = ()
    target: TargetSettings | None = None
    policy: Policy | None = None
    fence: Count = 0
    lease_seconds: Seconds = LEASE_SECONDS


class StepReport(Message):
    """How one step stands; steps that are not named stay as they are."""

    name: Text
    state: JobState
    done: Count = 0
    total: Count = 0
    message: Text = ""


class JobReport(Message):
    """POST /v1/worker/jobs/{id}/report: renews the lease, too. `result` is added to what the job has found so far."""

    fence: Count
    steps: Annotated[tuple[StepReport, ...], Field(max_length=MAX_STEPS)] = ()
    result: Options = Field(default_factory=dict)
    estimate_seconds: Seconds | None = None


class JobDirective(Message):
    """The reply to a report: whether to stop at the next step, and for how long the lease is good."""

    cancel_requested: bool
    lease_seconds: Seconds


class JobEnd(Message):
    """POST /v1/worker/jobs/{id}/finish.

    `failed` and `suspended` say why in `error`; a suspended job may be claimed again after `retry_seconds`.
    """

    fence: Count
    state: JobState
    error: ErrorReport | None = None
    result: Options = Field(default_factory=dict)
    retry_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0


class HoldRequest(Message):
    """POST /v1/worker/jobs/{id}/hold, to take the machine's stream from its process server, and .../release, to give it
    back."""

    fence: Count


class MachineHold(Message):
    """The reply: the machine's epoch from here on. Whoever writes by an older one is refused by storage itself."""

    epoch: Count
    held: bool
