"""The life of a machine: every state with every event, every state with every kind of job."""

from __future__ import annotations

from collections import deque
from itertools import product

import pytest

from config_server import lifecycle
from config_server.jobs.plan import PLANS, conflicts
from config_server.lifecycle import MOVES, RECOVERABLE, REPLICATING, Event, Seen, after, begin, end, observed
from replicar.control.messages import JobKind, LifeState
from replicar.errors import ConflictError, PermanentError

S, J = LifeState, JobKind

#: What an operator may ask for in each state. Said again here by hand: a table that is checked against itself is right.
MAY_ASK: dict[LifeState, set[JobKind]] = {
    S.UNPROTECTED: {J.ENABLE},
    S.ENABLING: {J.DISABLE},
    S.INITIAL_REPLICATION: {J.DISABLE},
    S.WAITING_FOR_POINT: {J.DISABLE},
    S.PROTECTED: {J.TEST_FAILOVER, J.FAILOVER, J.DISABLE},
    S.RESYNCHRONISING: {J.TEST_FAILOVER, J.FAILOVER, J.DISABLE},
    S.TEST_FAILOVER: set(),
    S.CLEAN_UP_PENDING: {J.CLEAN_UP, J.FAILOVER},
    S.FAILING_OVER: set(),
    S.FAILOVER_STOPPED: {J.FAILOVER, J.CANCEL_FAILOVER},
    S.FAILED_OVER: {J.CHANGE_POINT, J.CANCEL_FAILOVER, J.COMMIT},
    S.COMMITTED: {J.FAILBACK, J.DISABLE},
    S.FAILING_BACK: set(),
    S.FAILED_BACK: {J.REPROTECT, J.DISABLE},
    S.REPROTECTING: set(),
    S.DISABLED: {J.ENABLE, J.DISABLE},
}


@pytest.mark.parametrize("state", S)
def test_each_kind_of_job_begins_where_it_may_and_is_refused_with_a_next_step_elsewhere(state: LifeState) -> None:
    for kind in set(J) - {J.FINALIZE}:
        if kind in MAY_ASK[state]:
            assert begin("db1", state, kind) in S
            continue
        with pytest.raises(ConflictError) as refusal:
            begin("db1", state, kind)
        assert "db1" in refusal.value.message
        assert refusal.value.hint
        assert "{" not in refusal.value.hint
        assert (refusal.value.ours, refusal.value.theirs) == (kind, state)
    assert begin("db1", state, J.FINALIZE) is state


def test_every_pair_of_state_and_event_leads_to_a_state_or_nowhere() -> None:
    led = {pair: after(*pair) for pair in product(S, Event)}
    assert {pair for pair, following in led.items() if following is not None} == set(lifecycle.TRANSITIONS)
    for event in Event:
        assert any(led[state, event] is not None for state in S), f"{event} is good for nothing"


@pytest.mark.parametrize("kind", J)
def test_a_job_can_end_either_way_wherever_it_had_its_machine(kind: JobKind) -> None:
    for state in S:
        following = after(state, MOVES[kind].begin)
        if following is None:
            continue
        for succeeded in (True, False):
            assert end("db1", following, kind, succeeded=succeeded) in S


def test_a_job_of_another_life_can_not_end() -> None:
    with pytest.raises(PermanentError, match="db1 is unprotected, where no failover job can end"):
        end("db1", S.UNPROTECTED, J.FAILOVER, succeeded=True)


def test_from_every_state_there_is_a_way_back_to_protection() -> None:
    for start in S:
        reached, waiting = {start}, deque([start])
        while waiting:
            state = waiting.popleft()
            for event in Event:
                following = after(state, event)
                if following is not None and following not in reached:
                    reached.add(following)
                    waiting.append(following)
        assert S.PROTECTED in reached, f"{start} is a dead end"


@pytest.mark.parametrize(
    ("begun", "stopped_in"),
    [
        (J.FAILOVER, S.FAILOVER_STOPPED),
        (J.TEST_FAILOVER, S.CLEAN_UP_PENDING),
    ],
)
def test_a_stopped_job_leaves_the_machine_where_the_next_step_is_plain(begun: JobKind, stopped_in: LifeState) -> None:
    following = begin("db1", S.PROTECTED, begun)
    assert end("db1", following, begun, succeeded=False) is stopped_in
    undo = {S.FAILOVER_STOPPED: J.CANCEL_FAILOVER, S.CLEAN_UP_PENDING: J.CLEAN_UP}[stopped_in]
    assert end("db1", begin("db1", stopped_in, undo), undo, succeeded=True) is S.PROTECTED


def test_the_whole_circle_comes_home() -> None:
    state = S.UNPROTECTED
    for kind in (J.ENABLE, J.TEST_FAILOVER, J.CLEAN_UP, J.FAILOVER, J.CHANGE_POINT, J.COMMIT, J.FAILBACK, J.REPROTECT):
        state = end("db1", begin("db1", state, kind), kind, succeeded=True)
    assert state is S.PROTECTED


@pytest.mark.parametrize(("reporting", "copying", "has_point"), list(product([False, True], repeat=3)))
def test_reports_tell_how_far_a_machine_is_only_while_it_replicates(
    reporting: bool, copying: bool, has_point: bool
) -> None:
    seen = Seen(reporting=reporting, copying=copying, has_point=has_point)
    for state in S:
        found = observed(state, seen)
        if state not in REPLICATING:
            assert found is state
            continue
        assert found in REPLICATING
        assert (found in RECOVERABLE) == has_point
        if has_point:
            assert (found is S.RESYNCHRONISING) == copying
        elif not reporting:
            assert found is S.ENABLING


def test_jobs_of_one_machine_exclude_each_other_but_for_what_only_waits() -> None:
    for new, going in product(J, J):
        if (J.FINALIZE in (new, going) and new is not going) or (new, going) == (J.DISABLE, J.ENABLE):
            assert not conflicts(new, going)
        else:
            assert conflicts(new, going)


def test_step_names_of_a_job_are_its_own() -> None:
    for kind, plan in PLANS.items():
        names = [step.name for step in plan.steps]
        assert len(names) == len(set(names)) > 0, kind
