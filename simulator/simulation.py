"""The simulation: tell one seed's story to its end, and say what was seen.

    outcome = simulate(story_of(7))
    assert not outcome.violations

The same story gives the same `Outcome`, trace and all, in every process.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from simulator.judgement import judge, settle
from simulator.shortcuts import remembering, shortcuts
from simulator.stage import Stage
from simulator.story import Story
from simulator.watching import watch
from simulator.world import cast
from simulator.world.loop import StuckError
from simulator.world.processes import Killed
from simulator.world.world import standing

#: When the operator protects the machine, and when its application begins.
PROTECT_SECONDS: Final = 0.3
WRITE_SECONDS: Final = 0.6
#: How long the application may take to finish what it has in flight.
REST_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one story came to."""

    seed: int
    violations: tuple[str, ...]
    digest: str
    virtual_seconds: float
    faults: int
    changes: int
    points: int
    segments: int
    trace: tuple[str, ...]

    def without_trace(self) -> Outcome:
        """For a way between processes, or to be kept with thousands of others."""
        return replace(self, trace=())


def simulate(story: Story) -> Outcome:
    """Tell a story."""
    level = logging.root.manager.disable
    _settle_memory()
    logging.disable(logging.CRITICAL)
    hook = sys.unraisablehook
    try:
        with standing(story.seed) as world, shortcuts():
            stage = Stage(world, story)
            points = 0
            try:
                points = world.loop.run_until_complete(_tell(stage))
            except StuckError as error:
                stage.violated(f"everything stands still: {error}")
            for failure in world.loop.failures:
                _judge_failure(stage, failure)
            for wrong in stage.ledger.violations:
                stage.violated(wrong)
            outcome = Outcome(
                seed=story.seed,
                violations=tuple(stage.violations),
                digest=world.digest,
                virtual_seconds=world.loop.time(),
                faults=stage.faults_injected,
                changes=sum(truth.changes for truth in stage.truths.values()),
                points=points,
                segments=stage.ledger.segments,
                trace=tuple(world.trace),
            )
            # What the dead leave behind is let go here, where none of it can reach anything any more.
            sys.unraisablehook = lambda _: None
            world.take_down()
            del stage
        gc.collect()
        return outcome
    finally:
        sys.unraisablehook = hook
        logging.disable(level)


@lru_cache(maxsize=1)
def _settle_memory() -> None:
    """Once: so that what is let go of a story is found without walking through all that was imported."""
    cast.template()
    gc.collect()
    gc.freeze()


async def _tell(stage: Stage) -> int:
    story = stage.story
    with stage.standing():
        stage.start()
        telling = [asyncio.ensure_future(_at(fault.at, stage.inject(fault))) for fault in story.faults]
        telling.append(asyncio.ensure_future(_at(PROTECT_SECONDS, _protect(stage))))
        telling.append(asyncio.ensure_future(_at(WRITE_SECONDS, _write(stage))))
        for number, at in enumerate(story.marks):
            telling.append(asyncio.ensure_future(_at(at, stage.ask_for_mark(f"mark-{number}"))))
        if stage.neighbour is not None:
            for number, at in enumerate(stage.neighbour.plan.marks):
                telling.append(asyncio.ensure_future(_at(at, stage.neighbour.ask(f"group-{number}"))))
        watching = asyncio.ensure_future(watch(stage))
        await asyncio.sleep(story.seconds)
        done, late = await asyncio.wait(telling, timeout=REST_SECONDS)
        for task in done:
            task.result()
        for task in late:
            task.cancel()
        stage.heal()
        await _rest(stage)
        await settle(stage)
        watching.cancel()
        if stage.upkeep is not None:
            await stage.upkeep.rest()
        with remembering():
            together = await stage.neighbour.judge() if stage.neighbour is not None else 0
            return together + await judge(stage)


async def _at(seconds: float, what: Any) -> None:
    await asyncio.sleep(seconds)
    await what


async def _protect(stage: Stage) -> None:
    stage.operate("protect", stage.protect)


async def _write(stage: Stage) -> None:
    stage.start_application()
    if stage.neighbour is not None:
        stage.neighbour.start_application()


async def _rest(stage: Stage) -> None:
    """The application stops and has its last answers."""
    for application in stage.applications.values():
        application.is_writing = False
    began = stage.world.loop.time()
    while stage.world.loop.time() - began < REST_SECONDS:
        for application in stage.applications.values():
            application.is_writing = False
        is_done = stage.neighbour is None or stage.neighbour.stop_writing()
        if is_done and not any(truth._in_flight for truth in stage.truths.values()):
            break
        await asyncio.sleep(0.2)
    stage.is_writing = False
    for truth in stage.truths.values():
        if truth._in_flight:
            stage.violated("the application waits for an answer for ever")


def _judge_failure(stage: Stage, failure: dict[str, Any]) -> None:
    """What asyncio would only have logged."""
    error = failure.get("exception")
    if isinstance(error, Killed):
        return
    stage.violated(f"{failure.get('message')}: {type(error).__name__}: {error}")
