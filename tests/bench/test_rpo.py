"""The age of the oldest change that storage lacks, from what a sink wrote down."""

from __future__ import annotations

import pytest

from bench import rpo
from bench.sink import StoredSegment
from replicar.errors import PermanentError

SECOND = 10**9


def stored(number: int, *, captured: float, answered: float) -> StoredSegment:
    first = int(captured * SECOND)
    return StoredSegment(int(answered * SECOND), 7, number, number, number, first, first, 1000, 1024)


def test_a_change_ages_from_its_capture_until_it_is_stored() -> None:
    ages = rpo.ages([stored(1, captured=1.0, answered=1.5)], 0, 2 * SECOND)
    assert len(ages) == 200
    assert ages[:101] == [0.0] * 101
    assert ages[125] == pytest.approx(0.25)
    assert max(ages) == pytest.approx(0.49)
    assert ages[150:] == [0.0] * 50


def test_a_segment_counts_when_all_before_it_are_stored_too() -> None:
    late = [stored(1, captured=0.0, answered=1.0), stored(2, captured=0.1, answered=0.2)]
    ages = rpo.ages(late, 0, 2 * SECOND)
    assert ages[50] == pytest.approx(0.5)  # of the first one, though the second is stored
    assert max(ages) == pytest.approx(0.99)
    assert ages[100] == 0.0


def test_the_order_in_which_answers_were_written_down_does_not_matter() -> None:
    segments = [stored(number, captured=number / 10, answered=number / 10 + 0.05) for number in range(1, 10)]
    assert rpo.ages(segments, 0, SECOND) == rpo.ages(reversed(segments), 0, SECOND)


def test_a_record_with_a_hole_says_nothing() -> None:
    with pytest.raises(PermanentError, match="hole"):
        rpo.ages([stored(1, captured=0, answered=0), stored(3, captured=0, answered=0)], 0, SECOND)


def test_percentiles_are_of_time_not_of_segments() -> None:
    found = rpo.summary([0.0] * 98 + [3.0, 5.0])
    assert (found.samples, found.p50, found.p99, found.longest) == (100, 0.0, 3.0, 5.0)
    with pytest.raises(PermanentError):
        rpo.summary([])
