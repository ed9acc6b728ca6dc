"""Estimates of when the journal is full and when a copy is done."""

from __future__ import annotations

import pytest

from mobility_agent.estimate import MAX_SAMPLES, Estimate


def _of(*samples: tuple[float, float]) -> Estimate:
    made = Estimate()
    for now, value in samples:
        made.sample(now, value)
    return made


@pytest.mark.parametrize(
    ("samples", "goal", "seconds"),
    [
        ([], 100, None),
        ([(0, 10)], 100, None),  # one sample is no rate
        ([(0, 100)], 100, 0.0),  # but it may be there
        ([(0, 0), (1, 10)], 100, None),  # too short to say
        ([(0, 0), (10, 10)], 100, 90.0),  # filling
        ([(0, 80), (10, 40)], 0, 10.0),  # emptying
        ([(0, 40), (10, 40)], 100, None),  # standing still
        ([(0, 40), (10, 20)], 100, None),  # going the other way
        ([(0, 0), (10, 1e-6)], 1e9, None),  # in a thousand years
        ([(0, 0), (90, 50), (100, 50), (110, 60)], 100, 80.0),  # what is long ago does not count
    ],
)
def test_how_long_it_takes_if_it_goes_on_so(
    samples: list[tuple[float, float]], goal: float, seconds: float | None
) -> None:
    assert _of(*samples).seconds_until(goal) == (None if seconds is None else pytest.approx(seconds))


def test_samples_are_bounded() -> None:
    made = _of(*((number / 100, number) for number in range(10_000)))
    assert len(made._samples) == MAX_SAMPLES
