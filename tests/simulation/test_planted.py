"""Planted bugs: each of them is found, within few seeds; see `simulator.planted`."""

from __future__ import annotations

import pytest

from simulator.planted import PLANTED, planted
from simulator.simulation import simulate
from simulator.story import story_of

#: Seeds within which a bug has to be found.
MOST_SEEDS = 12


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_bug_is_found(name: str) -> None:
    for seed in range(MOST_SEEDS):
        with planted(name):
            if simulate(story_of(seed, kinds=PLANTED[name].faults)).violations:
                return
    pytest.fail(f"{name} is not found within {MOST_SEEDS} seeds: {PLANTED[name].what}")
