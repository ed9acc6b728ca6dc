"""Planted bugs: each of them is found, within few seeds; see `simulator.planted`."""

from __future__ import annotations

import pytest

from simulator.planted import PLANTED, planted
from simulator.simulation import simulate

#: Seeds within which a bug has to be found.
MOST_SEEDS = 12


#: Found at once, so they are of the default run; the others are with the long tests.
QUICK = {
    "trims_on_received",
    "flush_leaves_the_disk",
    "last_write_is_not_redone",
    "salt_is_used_again",
    "gap_ends_early",
    "needed_segment_is_freed",
    "group_of_some",
    "written_pages_stay_left_out",
    "audits_are_told_late",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.soak) for name in sorted(PLANTED)]
)
def test_a_planted_bug_is_found(name: str) -> None:
    for seed in range(MOST_SEEDS):
        with planted(name):
            if simulate(PLANTED[name].story(seed)).violations:
                return
    pytest.fail(f"{name} is not found within {MOST_SEEDS} seeds: {PLANTED[name].what}")
