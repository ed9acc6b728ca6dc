"""What retention may give up, in the judge's own words: each rule can be broken, and is seen to be."""

from __future__ import annotations

from simulator.retained import Left, problems
from simulator.world.folder import UpkeepPlan

_SECOND = 1_000_000_000
#: Ten seconds whole, then one point of every five up to a minute.
_PLAN = UpkeepPlan(window_seconds=10.0, stretch_seconds=5.0, until_seconds=60.0)
#: Named points by sequence, with their second.
_MARKS = {10: 1 * _SECOND, 20: 3 * _SECOND, 30: 6 * _SECOND, 40: 50 * _SECOND}


def _wrong(left: Left, *, latest: int = 60) -> list[str]:
    return list(problems(_PLAN, left, _MARKS, latest * _SECOND))


def test_the_last_point_of_every_stretch_is_enough() -> None:
    assert _wrong(Left(35, 8 * _SECOND, (20, 30))) == []


def test_a_stretch_without_its_last_point_is_told() -> None:
    assert "the point at 20 is the last of its stretch" in _wrong(Left(35, 8 * _SECOND, (10, 30)))[0]


def test_points_beyond_the_policy_may_go() -> None:
    assert _wrong(Left(35, 8 * _SECOND), latest=100) == []


def test_a_floor_within_the_window_is_told() -> None:
    assert "is to be kept" in _wrong(Left(35, 55 * _SECOND, (20, 30)))[0]


def test_a_log_that_was_never_folded_has_everything() -> None:
    assert _wrong(Left()) == []
    assert Left().has(1)


def test_before_the_floor_only_what_is_kept_is_left() -> None:
    left = Left(35, 0, (20,))
    assert [left.has(sequence) for sequence in (10, 20, 34, 35, 40)] == [False, True, False, True, True]
