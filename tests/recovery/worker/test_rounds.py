"""Carrying a job out: its steps in order, from where the last worker left them, and what each way to end says.

The config server here is a stand-in that keeps what it is told; the real one is met in tests/config_server/test_jobs.py
and tests/end_to_end/test_circle.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from config_server.jobs.plan import PLANS
from recovery.worker import desk as desk_module
from recovery.worker.desk import Desk
from recovery.worker.rounds import carry_out
from replicar.clock import SystemClock
from replicar.control.client import ControlClient
from replicar.control.messages import (
    Claim,
    ClaimedMachine,
    Job,
    JobDirective,
    JobEnd,
    JobKind,
    JobReport,
    JobState,
    JobStep,
)
from replicar.errors import FencedError, PermanentError, TransientError

JOB = "00000000-0000-4000-8000-000000000001"


class Told:
    """What a config server would have been told; it can be away for a while, or say that the job is another's."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, JobState]] = []
        self.results: dict[str, str] = {}
        self.end: JobEnd | None = None
        self.away = 0
        self.is_fenced = False
        self.cancel_requested = False

    async def report(self, job_id: str, report: JobReport) -> JobDirective:
        self._answer()
        self.steps += [(step.name, step.state) for step in report.steps]
        self.results |= report.result
        return JobDirective(cancel_requested=self.cancel_requested, lease_seconds=60)

    async def finish(self, job_id: str, end: JobEnd) -> None:
        self._answer()
        self.end = end

    def _answer(self) -> None:
        if self.is_fenced:
            raise FencedError("somebody else has the job")
        if self.away:
            self.away -= 1
            raise TransientError("nobody answers")


class QuickClock(SystemClock):
    async def sleep(self, seconds: float) -> None:
        await super().sleep(0)


def _claim(steps: tuple[JobStep, ...] | None = None) -> Claim:
    job = Job(
        id=JOB,
        kind=JobKind.CLEAN_UP,
        machine="shop",
        machine_id=uuid.UUID(int=1),
        state=JobState.IN_PROGRESS,
        requested_by="op",
        created_ns=1,
        steps=steps or PLANS[JobKind.CLEAN_UP].fresh_steps(),
    )
    machine = ClaimedMachine(
        id=uuid.UUID(int=1),
        name="shop",
        incarnation=1,
        epoch=1,
        stored_sequence=0,
        stored_segment=None,
        stored_digest="",
    )
    return Claim(job=job, machine=machine, fence=1)


class Stage:
    """A desk, and works that say their names."""

    def __init__(self, claim: Claim | None = None) -> None:
        self.told, self.did = Told(), list[str]()
        self.desk = Desk(cast(ControlClient, cast(Any, self.told)), claim or _claim(), QuickClock())
        self.trouble: dict[str, Exception] = {}

    def works(self) -> dict[str, Callable[[], Awaitable[str]]]:
        return {step.name: self._work(step.name) for step in self.desk.job.steps}

    def _work(self, name: str) -> Callable[[], Awaitable[str]]:
        async def work() -> str:
            self.did.append(name)
            if name in self.trouble:
                raise self.trouble[name]
            return ""

        return work

    async def run(self) -> None:
        await carry_out(self.desk, self.works())


async def test_steps_are_done_in_their_order_and_the_job_succeeds() -> None:
    stage = Stage()
    await stage.run()
    names = [step.name for step in stage.desk.job.steps]
    assert stage.did == names
    assert [name for name, state in stage.told.steps if state is JobState.SUCCEEDED] == names
    assert stage.told.end is not None
    assert stage.told.end.state is JobState.SUCCEEDED


async def test_what_an_earlier_worker_did_is_not_done_again() -> None:
    first, *others = PLANS[JobKind.CLEAN_UP].fresh_steps()
    stage = Stage(_claim((first.model_copy(update={"state": JobState.SUCCEEDED}), *others)))
    await stage.run()
    assert stage.did == [step.name for step in others]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (TransientError("storage is away", retry_after_seconds=7), JobState.SUSPENDED),
        (PermanentError("no such point", hint="choose another"), JobState.FAILED),
        (OSError(28, "No space left on device"), JobState.FAILED),
        (FencedError("a newer writer has the log"), JobState.FAILED),
    ],
)
async def test_what_stands_in_the_way_is_said_and_nothing_is_done_behind_it(error: Exception, state: JobState) -> None:
    stage = Stage()
    stage.trouble["remove-disks"] = error
    await stage.run()
    assert stage.did == ["remove-machine", "remove-disks"]
    assert stage.told.end is not None
    assert stage.told.end.state is state
    assert stage.told.end.error is not None
    assert getattr(error, "message", "No space") in stage.told.end.error.message


async def test_a_job_that_is_to_stop_stops_between_two_steps() -> None:
    stage = Stage()
    stage.told.cancel_requested = True
    await stage.run()
    assert stage.did == ["remove-machine"]
    assert stage.told.end is not None
    assert stage.told.end.state is JobState.CANCELLED


async def test_a_worker_that_is_stopped_puts_its_job_aside_after_the_step() -> None:
    stage, stop = Stage(), asyncio.Event()
    works = stage.works()

    async def stopping() -> str:
        stop.set()
        return ""

    works["remove-machine"] = stopping
    await carry_out(stage.desk, works, stop)
    assert stage.did == []
    assert stage.told.steps[-1] == ("remove-machine", JobState.SUCCEEDED)
    assert stage.told.end is not None
    assert stage.told.end.state is JobState.SUSPENDED


async def test_a_config_server_that_is_away_is_waited_for() -> None:
    stage = Stage()
    stage.told.away = 5
    await stage.run()
    assert stage.told.end is not None
    assert stage.told.end.state is JobState.SUCCEEDED


async def test_work_is_cut_off_when_the_job_is_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "RENEW_SECONDS", 0.01)
    stage = Stage()
    works, was_cut = stage.works(), asyncio.Event()

    async def long() -> str:
        stage.told.is_fenced = True
        try:
            await asyncio.Event().wait()
        finally:
            was_cut.set()
        return ""

    works["remove-disks"] = long
    await carry_out(stage.desk, works)
    assert was_cut.is_set()
    assert stage.told.end is None
    assert stage.did == ["remove-machine"]


async def test_what_was_found_is_said_before_it_is_acted_on() -> None:
    stage = Stage()
    await stage.desk.note(sequence=12, machine="drill-shop-1")
    assert stage.told.results == {"sequence": "12", "machine": "drill-shop-1"}
    assert stage.desk.result["sequence"] == "12"


async def test_a_step_of_another_version_fails_with_what_to_compare() -> None:
    stage = Stage()
    await carry_out(stage.desk, {})
    assert stage.told.end is not None
    assert stage.told.end.error is not None
    assert "different versions" in stage.told.end.error.hint
