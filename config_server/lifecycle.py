"""The life of a machine under protection: one table of states and events; everything else is refused, with a reason.

Two sources move a machine. What *jobs* do is decided and stored: a drill begins, a failover ends. What *reports* say
is derived each time anybody looks (`observed`): as long as a machine simply replicates, its agent knows best whether
that is initial replication, protection or resynchronisation, and a copy of that in the registry could only be wrong.
So the registry stores `PROTECTED` for "replicates" and the report says what that means now.

                        ┌─────────────────────── re-protected ◄── re-protecting ◄─┐
    unprotected ► enabling ► [replicates] ► test failover ► clean-up pending ►┐   │
                                 │  ▲  ▲                                      │   │
                                 │  │  └──────────────────────────────────────┘   │
                                 ▼  └── undone                                    │
                            failing over ► failed over ► committed ► failing back ► failed back
                                 └► failover stopped

A failure leads to where nothing is lost and the next step is plain: a failed failover to `failover-stopped` (try
again, or cancel it, which protects the machine again), a failed failback to `committed` (the machine goes on where it
is), a failed drill to `clean-up-pending` (what it left has to go).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from replicar.control.messages import JobKind, LifeState
from replicar.errors import ConflictError, PermanentError

S = LifeState


class Event(Enum):
    """What can happen to a machine's life: a job begins, ends well, or stops (failed or was cancelled)."""

    ENABLE = auto()
    ENABLED = auto()
    ENABLING_STOPPED = auto()
    DRILL = auto()
    DRILL_ENDED = auto()
    CLEANED_UP = auto()
    FAIL_OVER = auto()
    FAILED_OVER = auto()
    FAILOVER_STOPPED = auto()
    CHANGE_POINT = auto()
    UNDO = auto()
    UNDONE = auto()
    COMMIT = auto()
    COMMITTED = auto()
    FAIL_BACK = auto()
    FAILED_BACK = auto()
    FAILBACK_STOPPED = auto()
    REPROTECT = auto()
    REPROTECTED = auto()
    REPROTECT_STOPPED = auto()
    CLEAN_UP = auto()
    NOTHING = auto()  # a job that ended without moving the machine
    DISABLE = auto()


#: Where the agent's reports say what is going on.
REPLICATING: Final = frozenset({S.ENABLING, S.INITIAL_REPLICATION, S.WAITING_FOR_POINT, S.PROTECTED, S.RESYNCHRONISING})
#: Of these, where there is a point to go to.
RECOVERABLE: Final = frozenset({S.PROTECTED, S.RESYNCHRONISING})

TRANSITIONS: Final[dict[tuple[LifeState, Event], LifeState]] = {
    (S.UNPROTECTED, Event.ENABLE): S.ENABLING,
    (S.DISABLED, Event.ENABLE): S.ENABLING,
    **{(state, Event.ENABLED): S.PROTECTED for state in REPLICATING},
    **{(state, Event.ENABLING_STOPPED): S.UNPROTECTED for state in REPLICATING},
    **{(state, Event.DRILL): S.TEST_FAILOVER for state in RECOVERABLE},
    (S.TEST_FAILOVER, Event.DRILL_ENDED): S.CLEAN_UP_PENDING,
    (S.CLEAN_UP_PENDING, Event.CLEAN_UP): S.CLEAN_UP_PENDING,
    (S.CLEAN_UP_PENDING, Event.CLEANED_UP): S.PROTECTED,
    # a disaster does not wait for a drill to be cleaned up: the failover sees to what the drill left
    **{(state, Event.FAIL_OVER): S.FAILING_OVER for state in RECOVERABLE | {S.CLEAN_UP_PENDING}},
    (S.FAILOVER_STOPPED, Event.FAIL_OVER): S.FAILING_OVER,
    (S.FAILING_OVER, Event.FAILED_OVER): S.FAILED_OVER,
    (S.FAILING_OVER, Event.FAILOVER_STOPPED): S.FAILOVER_STOPPED,
    (S.FAILED_OVER, Event.CHANGE_POINT): S.FAILING_OVER,
    (S.FAILED_OVER, Event.UNDO): S.FAILOVER_STOPPED,
    (S.FAILOVER_STOPPED, Event.UNDO): S.FAILOVER_STOPPED,
    (S.FAILOVER_STOPPED, Event.UNDONE): S.PROTECTED,
    (S.FAILED_OVER, Event.COMMIT): S.FAILED_OVER,
    (S.FAILED_OVER, Event.COMMITTED): S.COMMITTED,
    (S.COMMITTED, Event.FAIL_BACK): S.FAILING_BACK,
    (S.FAILING_BACK, Event.FAILED_BACK): S.FAILED_BACK,
    (S.FAILING_BACK, Event.FAILBACK_STOPPED): S.COMMITTED,
    (S.FAILED_BACK, Event.REPROTECT): S.REPROTECTING,
    (S.REPROTECTING, Event.REPROTECTED): S.PROTECTED,
    (S.REPROTECTING, Event.REPROTECT_STOPPED): S.FAILED_BACK,
    **{(state, Event.DISABLE): S.DISABLED for state in REPLICATING | {S.COMMITTED, S.FAILED_BACK, S.DISABLED}},
    **{(state, Event.NOTHING): state for state in S},
}


@dataclass(frozen=True, slots=True)
class Moves:
    """What a kind of job does to a machine's life: when it begins, when it succeeds, when it failed or was cancelled.

    `verb` completes "machine x can't be ..."; `command` is how an operator asks for it.
    """

    begin: Event
    done: Event
    stopped: Event
    verb: str
    command: str


MOVES: Final[dict[JobKind, Moves]] = {
    JobKind.ENABLE: Moves(
        Event.ENABLE, Event.ENABLED, Event.ENABLING_STOPPED, "protected anew", "replicar protect {machine}"
    ),
    JobKind.FINALIZE: Moves(
        Event.NOTHING, Event.NOTHING, Event.NOTHING, "finalized", "replicar protect {machine} --wait"
    ),
    JobKind.TEST_FAILOVER: Moves(
        Event.DRILL, Event.DRILL_ENDED, Event.DRILL_ENDED, "drilled", "replicar drill {machine}"
    ),
    JobKind.CLEAN_UP: Moves(
        Event.CLEAN_UP, Event.CLEANED_UP, Event.NOTHING, "cleaned up after", "replicar cleanup {machine}"
    ),
    JobKind.FAILOVER: Moves(
        Event.FAIL_OVER, Event.FAILED_OVER, Event.FAILOVER_STOPPED, "failed over", "replicar failover {machine}"
    ),
    JobKind.CHANGE_POINT: Moves(
        Event.CHANGE_POINT,
        Event.FAILED_OVER,
        Event.FAILOVER_STOPPED,
        "moved to another point",
        "replicar failover {machine} --change-point",
    ),
    JobKind.CANCEL_FAILOVER: Moves(
        Event.UNDO, Event.UNDONE, Event.NOTHING, "taken back from a failover", "replicar cancel {machine}"
    ),
    JobKind.COMMIT: Moves(Event.COMMIT, Event.COMMITTED, Event.NOTHING, "committed", "replicar commit {machine}"),
    JobKind.FAILBACK: Moves(
        Event.FAIL_BACK, Event.FAILED_BACK, Event.FAILBACK_STOPPED, "failed back", "replicar failback {machine}"
    ),
    JobKind.REPROTECT: Moves(
        Event.REPROTECT, Event.REPROTECTED, Event.REPROTECT_STOPPED, "re-protected", "replicar reprotect {machine}"
    ),
    JobKind.DISABLE: Moves(
        Event.DISABLE, Event.NOTHING, Event.NOTHING, "taken out of protection", "replicar disable {machine}"
    ),
}

#: What to do next, by state, for whoever asked for something that can't be done there.
_NEXT: Final[dict[LifeState, str]] = {
    S.UNPROTECTED: "protect it first: `replicar protect {machine}`",
    S.ENABLING: "wait for its agent: `replicar jobs list --machine {machine}` shows what is missing",
    S.INITIAL_REPLICATION: "wait until it is protected: `replicar machines {machine}` shows how far it is",
    S.WAITING_FOR_POINT: "wait a few seconds for its first recovery point: `replicar points {machine}`",
    S.PROTECTED: "it is at home and protected: `replicar drill`, `failover` and `disable` are what there is to do",
    S.RESYNCHRONISING: "wait until it is protected again: `replicar machines {machine}`",
    S.TEST_FAILOVER: "a drill is under way: `replicar jobs follow`, or `replicar jobs cancel`",
    S.CLEAN_UP_PENDING: "clean the drill up first: `replicar cleanup {machine}`",
    S.FAILING_OVER: "a failover is under way: wait for it, or take it back: `replicar cancel {machine}`",
    S.FAILOVER_STOPPED: "try again (`replicar failover {machine}`), or take it back (`replicar cancel {machine}`)",
    S.FAILED_OVER: (
        "choose another point (`replicar failover {machine} --change-point`), commit (`replicar commit {machine}`), "
        "or take it back (`replicar cancel {machine}`)"
    ),
    S.COMMITTED: "bring it home (`replicar failback {machine}`), or end its protection (`replicar disable {machine}`)",
    S.FAILING_BACK: "a failback is under way: `replicar jobs follow`, or `replicar jobs cancel`",
    S.FAILED_BACK: "protect it again: `replicar reprotect {machine}`",
    S.REPROTECTING: "it is being protected again: `replicar jobs follow`",
    S.DISABLED: "protect it again: `replicar protect {machine}`",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the registry knows of a machine's replication: its agent reports with an assignment, is inside a gap (or
    has not got to the end of what it copies), and has a recovery point in storage."""

    reporting: bool
    copying: bool
    has_point: bool


def observed(stored: LifeState, seen: Seen) -> LifeState:
    """The state that people see: the stored one, or what the reports say where the machine simply replicates."""
    if stored not in REPLICATING:
        return stored
    if seen.has_point:
        return S.RESYNCHRONISING if seen.copying else S.PROTECTED
    if not seen.reporting:
        return S.ENABLING
    return S.INITIAL_REPLICATION if seen.copying else S.WAITING_FOR_POINT


def after(state: LifeState, event: Event) -> LifeState | None:
    """The next state; None where the event does not belong."""
    return TRANSITIONS.get((state, event))


def begin(machine: str, state: LifeState, kind: JobKind) -> LifeState:
    """The state once a job of this kind is made.

    Raises:
        ConflictError: the machine is where this can't be done; says where that is, and what can.
    """
    moves = MOVES[kind]
    following = after(state, moves.begin)
    if following is not None:
        return following
    raise ConflictError(
        f"machine {machine} can't be {moves.verb} now: it is {spoken(state)}",
        hint=_NEXT[state].format(machine=machine),
        ours=kind,
        theirs=state,
        machine=machine,
    )


def end(machine: str, state: LifeState, kind: JobKind, *, succeeded: bool) -> LifeState:
    """The state once a job has ended.

    Raises:
        PermanentError: the machine is not where this job had it; the registry was changed by other means.
    """
    event = MOVES[kind].done if succeeded else MOVES[kind].stopped
    following = after(state, event)
    if following is None:
        raise PermanentError(
            f"machine {machine} is {spoken(state)}, where no {kind} job can end",
            hint="if the registry was restored from a backup, cancel the job and look at the machine by hand",
            machine=machine,
        )
    return following


def spoken(state: LifeState) -> str:
    """A state within a sentence."""
    return {
        S.CLEAN_UP_PENDING: "waiting for a drill's clean-up",
        S.FAILED_OVER: "failed over, commit pending",
        S.TEST_FAILOVER: "in a test failover",
        S.FAILOVER_STOPPED: "in a failover that stopped",
        S.WAITING_FOR_POINT: "waiting for its first recovery point",
        S.INITIAL_REPLICATION: "in initial replication",
        S.ENABLING: "being enabled",
    }.get(state, state.replace("-", " ") if state is not S.REPROTECTING else "being re-protected")
