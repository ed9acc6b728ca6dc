"""Whose turn it is, as tables: shares by weight, nobody starves, nobody saves up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, strategies as st

from process_server.turns import Turns


def share(wants: dict[str, tuple[int, int]], turns: int) -> Counter[str]:
    """Bytes that each got in so many turns, when all (weight, cost of a turn) always want another one."""
    queue, got = Turns[str](), Counter[str]()
    for _ in range(turns):
        for name, (weight, _cost) in wants.items():
            queue.join(name, weight)
        chosen = queue.next(lambda key: wants[key][1])
        assert chosen is not None
        got[chosen] += wants[chosen][1]
    return got


@pytest.mark.parametrize(
    ("wants", "shares"),
    [
        ({"a": (1, 4), "b": (1, 4)}, {"a": 0.5, "b": 0.5}),
        ({"a": (1, 4), "b": (1, 1)}, {"a": 0.5, "b": 0.5}),  # small segments: more turns
        ({"a": (3, 4), "b": (1, 4)}, {"a": 0.75, "b": 0.25}),
        ({"a": (2, 4), "b": (1, 1), "c": (1, 2)}, {"a": 0.5, "b": 0.25, "c": 0.25}),
        ({"a": (100, 4), "b": (1, 4)}, {"a": 100 / 101, "b": 1 / 101}),
    ],
)
def test_who_always_wants_more_gets_bytes_in_proportion_to_weight(
    wants: dict[str, tuple[int, int]], shares: dict[str, float]
) -> None:
    got = share(wants, 4000)
    assert {name: round(count / got.total(), 2) for name, count in got.items()} == {
        name: round(each, 2) for name, each in shares.items()
    }


def test_a_modest_one_waits_for_one_turn_of_each_other_at_most() -> None:
    queue = Turns[str]()
    greedy = [f"greedy {number}" for number in range(10)]
    for _ in range(200):
        for name in greedy:
            queue.join(name)
        queue.next(lambda _: 4 << 20)
    queue.join("modest")
    before = 0
    while True:
        for name in greedy:
            queue.join(name)
        if queue.next(lambda key: 1 if key == "modest" else 4 << 20) == "modest":
            break
        before += 1
    assert before <= len(greedy)


def test_being_idle_saves_up_no_turns() -> None:
    queue = Turns[str]()
    for _ in range(1000):
        queue.join("busy")
        queue.next(lambda _: 10)
    order = []
    for _ in range(6):
        queue.join("busy")
        queue.join("back again")
        order.append(queue.next(lambda _: 10))
    assert Counter(order) == {"busy": 3, "back again": 3}


def test_who_may_not_keeps_its_place_and_who_left_has_none() -> None:
    queue = Turns[str]()
    for name in ("first", "second", "third"):
        queue.join(name)
    queue.leave("second")
    assert queue.next(lambda _: 1, may=lambda key: key != "first") == "third"
    assert queue.next(lambda _: 1, may=lambda key: False) is None
    assert queue.next(lambda _: 1) == "first"
    assert queue.next(lambda _: 1) is None
    assert len(queue) == 0


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 1000)), min_size=2, max_size=6))
def test_no_share_is_ever_off_by_more_than_a_turn_of_each(wants: list[tuple[int, int]]) -> None:
    named = {str(number): each for number, each in enumerate(wants)}
    got = share(named, 500)
    ends = {name: got[name] / weight for name, (weight, _) in named.items()}
    for one, (weight, cost) in named.items():
        for other, (heavy, large) in named.items():
            assert ends[one] - ends[other] <= cost / weight + large / heavy, (one, other)
