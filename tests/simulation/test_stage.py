"""The stage: who is started again, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from simulator.stage import RESTART_SECONDS, Stage
from simulator.story import story_of
from simulator.world.cast import MACHINES
from simulator.world.processes import Process
from simulator.world.world import standing

DB = MACHINES[0]


@pytest.fixture
def stage() -> Iterator[Stage]:
    with standing(1) as world:
        yield Stage(world, story_of(1))


async def _run(process: Process) -> None:
    await asyncio.sleep(1000)


def _supervised(stage: Stage, starts: list[float]) -> Process:
    process = stage.world.start(DB, "service", _run)
    stage.supervise(process, lambda: starts.append(stage.world.loop.time()))
    stage.world.loop.run_until_complete(asyncio.sleep(0.1))
    return process


def test_what_is_killed_is_started_again(stage: Stage) -> None:
    starts: list[float] = []
    stage.world.kill(_supervised(stage, starts))
    stage.world.loop.run_until_complete(asyncio.sleep(10))
    assert len(starts) == 1
    assert RESTART_SECONDS[0] <= starts[0] - 0.1 <= RESTART_SECONDS[1]


@pytest.mark.parametrize("is_killed_first", [False, True])
def test_a_power_cut_takes_the_supervisor_along(stage: Stage, is_killed_first: bool) -> None:
    """Two supervisors start two agents; the second one finds the first one's directory held, for ever (seed 11470)."""
    starts: list[float] = []
    process = _supervised(stage, starts)
    if is_killed_first:
        stage.world.kill(process)
    stage.world.power_off(DB)
    stage.world.power_on(DB)
    stage.world.loop.run_until_complete(asyncio.sleep(10))
    assert not starts
