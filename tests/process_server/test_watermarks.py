"""How far the cache is filled, and by whom: the tables."""

from __future__ import annotations

import pytest

from process_server.watermarks import LEAST_SLOTS, Level, allowance, level_of


@pytest.mark.parametrize(
    ("free", "level"),
    [
        (100, Level.WELL), (30, Level.WELL), (29, Level.WARNING), (25, Level.WARNING), (24, Level.CRITICAL),
        (20, Level.CRITICAL), (19, Level.THROTTLED), (0, Level.THROTTLED),
    ],
)  # fmt: skip
def test_the_watermarks_are_at_30_25_and_20_percent_free(free: int, level: Level) -> None:
    assert level_of(free, 100) is level
    assert level_of(free << 30, 100 << 30) is level


def fill(total: int, weights: list[int], *, held: list[int] | None = None) -> list[int]:
    """What each holds when all take all they may, in turns."""
    held, moved = held or [0] * len(weights), True
    while moved:
        moved = False
        for each, weight in enumerate(weights):
            if sum(held) < total and held[each] < allowance(total - sum(held), total, weight):
                held[each], moved = held[each] + 1, True
    return held


def settled(total: int, weights: list[int]) -> list[int]:
    """What each holds after a while in which everybody's oldest were stored and replaced."""
    held = fill(total, weights)
    for _ in range(500):
        held = fill(total, weights, held=[max(0, each - 5) for each in held])
    return held


@pytest.mark.parametrize(
    ("weights", "held"),
    [
        ([1], [640]),  # four fifths of what lies above the lowest watermark
        ([1, 1], [356, 356]),
        ([1, 1, 1, 1], [189, 188, 188, 188]),
        ([3, 1], [565, 189]),
    ],
)
def test_shares_follow_weights_and_leave_room_for_a_newcomer(weights: list[int], held: list[int]) -> None:
    found = settled(1000, weights)
    assert all(abs(each - wanted) <= 5 for each, wanted in zip(found, held, strict=True)), found
    assert level_of(1000 - sum(held), 1000) in (Level.WELL, Level.WARNING, Level.CRITICAL)
    assert allowance(1000 - sum(held), 1000) >= LEAST_SLOTS


def test_below_the_lowest_watermark_everybody_may_still_hold_a_little() -> None:
    assert allowance(199, 1000, 100) == LEAST_SLOTS
    held = fill(1000, [1] * 500)
    assert sum(held) == 1000
    assert min(held) == LEAST_SLOTS
