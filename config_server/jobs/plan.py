"""What each kind of job consists of, as data: its steps, who carries them out, what it may be asked.

docs/jobs.md tells a worker's author what each step has to reach; a test holds that document to this table. The names
are a contract between versions: a job that was made before an upgrade goes on after it with the steps it was made with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from replicar.control.messages import JobKind, JobStep


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, what it says to people, and what its progress counts."""

    name: str
    title: str
    unit: Literal["", "bytes", "rows"] = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a kind, and the parameters that it reads; `by_worker`: a recovery worker carries it out."""

    steps: tuple[Step, ...]
    parameters: frozenset[str] = frozenset()
    by_worker: bool = True

    def fresh_steps(self) -> tuple[JobStep, ...]:
        return tuple(JobStep(name=step.name, title=step.title, unit=step.unit) for step in self.steps)


_PREREQUISITES: Final = Step("prerequisites", "check that everything is there")
_POINT: Final = Step("point", "find the recovery point")
_REMOVE_MACHINE: Final = Step("remove-machine", "remove the machine that was made")
_REMOVE_DISKS: Final = Step("remove-disks", "remove its disks")
_DISKS: Final = Step("disks", "give the machine its disks", "bytes")
_MACHINE: Final = Step("machine", "make and start the machine")
_CHECK: Final = Step("check", "see that it runs")
_MAKING: Final = frozenset({"point", "compute", "network", "options"})

PLANS: Final[dict[JobKind, Plan]] = {
    JobKind.ENABLE: Plan(
        (
            Step("assign", "assign a process server and a key"),
            Step("agent", "wait for the machine's agent to take it up"),
        ),
        frozenset({"policy"}),
        by_worker=False,
    ),
    JobKind.FINALIZE: Plan(
        (
            Step("copied", "copy all that is on the disks", "bytes"),
            Step("point", "wait for the first recovery point"),
            Step("target", "know what the machine is to be made of"),
        ),
        by_worker=False,
    ),
    JobKind.TEST_FAILOVER: Plan(
        (_PREREQUISITES, _POINT, Step("network", "make an isolated network"), _DISKS, _MACHINE, _CHECK), _MAKING
    ),
    JobKind.CLEAN_UP: Plan(
        (_REMOVE_MACHINE, _REMOVE_DISKS, Step("remove-network", "remove the isolated network")), frozenset({"notes"})
    ),
    JobKind.FAILOVER: Plan(
        (
            _PREREQUISITES,
            Step("shut-down-source", "shut the source down, if that can be done"),
            Step("fence", "take the stream from its process server"),
            _POINT,
            _DISKS,
            _MACHINE,
            _CHECK,
        ),
        _MAKING | {"shut_down_source"},
    ),
    JobKind.CHANGE_POINT: Plan((_POINT, _REMOVE_MACHINE, _REMOVE_DISKS, _DISKS, _MACHINE, _CHECK), _MAKING),
    JobKind.CANCEL_FAILOVER: Plan(
        (_REMOVE_MACHINE, _REMOVE_DISKS, Step("release", "give the stream back to its process server")),
        frozenset({"notes"}),
    ),
    JobKind.COMMIT: Plan(
        (Step("complete", "make the machine's disks whole and independent", "bytes"),), frozenset({"notes"})
    ),
    JobKind.FAILBACK: Plan(
        (
            _PREREQUISITES,
            Step("shut-down", "shut the failed-over machine down"),
            Step("compare", "find what differs", "bytes"),
            Step("copy", "copy what differs", "bytes"),
            Step("verify", "compare both sides", "bytes"),
            Step("switch", "let the machine live at home again"),
        ),
        frozenset({"destination", "compute", "options"}),
    ),
    JobKind.REPROTECT: Plan(
        (
            _PREREQUISITES,
            Step("release", "give the stream back to a process server"),
            Step("catch-up", "send what the replica does not hold", "bytes"),
        ),
        frozenset({"options"}),
    ),
    JobKind.DISABLE: Plan((Step("withdraw", "end the replication"),), frozenset({"notes"}), by_worker=False),
}

#: Kinds that wait beside whatever else goes on with their machine; all others exclude each other.
_BESIDE: Final = frozenset({JobKind.FINALIZE})
#: Kinds that put an end to what waits.
_ENDING: Final = frozenset({JobKind.DISABLE})
#: Kinds that can be taken back once a worker has begun; the others end as they end.
CANCELLABLE: Final = frozenset(
    {
        JobKind.ENABLE,
        JobKind.FINALIZE,
        JobKind.TEST_FAILOVER,
        JobKind.FAILOVER,
        JobKind.CHANGE_POINT,
        JobKind.FAILBACK,
        JobKind.REPROTECT,
    }
)


def conflicts(new: JobKind, going: JobKind) -> bool:
    """Whether a job can't be made while one of the kind `going` of the same machine has not ended."""
    if new in _ENDING and going in (JobKind.ENABLE, JobKind.FINALIZE):
        return False
    return new == going or not (new in _BESIDE or going in _BESIDE)
