"""The simulation itself: a seed decides everything, a sample of seeds is clean, and a failing story is cut short."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from simulator.faults.catalogue import CATALOGUE
from simulator.planted import PLANTED, planted
from simulator.shrinking import fewest, kind_of, shrink
from simulator.simulation import simulate
from simulator.story import LEAST_FAULTS, story_of
from simulator.world.world import World

_DIGESTS = "from simulator.seeds import run\nprint([o.digest for o in run([3, 7])])"
#: Of the default run; `make simulate` has more.
SAMPLE = 200


def test_a_seed_gives_the_same_run_to_the_byte_in_every_process() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("'") == 4


@pytest.mark.parametrize("first", range(0, SAMPLE, 10))
def test_a_sample_of_seeds_breaks_no_promise(first: int) -> None:
    for seed in range(first, first + 10):
        outcome = simulate(story_of(seed))
        assert not outcome.violations, f"replicar-simulate --seed {seed} --trace"
        assert outcome.virtual_seconds >= 60
        assert outcome.faults >= LEAST_FAULTS


def test_a_story_leaves_no_world_behind() -> None:
    """Ten thousand of them would fill the memory: a map's array that nobody lets go of holds all of its world."""
    for seed in range(3):
        simulate(story_of(seed))
    gc.collect()
    assert sum(isinstance(each, World) for each in gc.get_objects()) <= 1


def test_every_kind_of_fault_has_a_contract_and_is_drawn() -> None:
    drawn = {fault.kind for seed in range(200) for fault in story_of(seed).faults}
    assert drawn == set(CATALOGUE)
    assert all(kind.inject.__doc__ for kind in CATALOGUE.values())


def test_a_failing_story_is_cut_down_to_the_faults_that_it_takes() -> None:
    bug = PLANTED["flush_leaves_the_disk"]
    with planted("flush_leaves_the_disk"):
        story = story_of(0, kinds=(*bug.faults, "link_reset"))
        outcome = simulate(story)
        assert outcome.violations
        short, again = shrink(story, outcome, most_tries=25)
    assert kind_of(again.violations[0]) == kind_of(outcome.violations[0])
    assert len(short.faults) < len(story.faults)
    assert "machine_power" in {fault.kind for fault in short.faults}


def test_a_story_without_some_of_its_faults_is_the_same_story() -> None:
    story = story_of(5)
    fewer = story.without(story.faults[1:3])
    assert replace(fewer, faults=story.faults) == story


def test_delta_debugging_finds_the_few_that_matter() -> None:
    assert fewest(range(20), lambda kept: {3, 17} <= set(kept)) == [3, 17]
    assert fewest(range(20), lambda kept: True) == []
