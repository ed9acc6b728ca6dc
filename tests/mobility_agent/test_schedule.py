"""Points are named by the clock, at whole multiples of the interval, and only where a state can be had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import mobility_agent.marks as module
from mobility_agent.changelog import ChangeLog
from mobility_agent.marks import SCHEDULED, Marks
from mobility_agent.schedule import Schedule
from replicar.clock import SystemClock
from replicar.control.messages import Command
from replicar.errors import LimitError
from tests.mobility_agent.core import MIB, Core, agent_core

#: 2026-11-22T10:03:20Z
BEGIN_NS = 1_795_341_800 * 10**9


class WallClock(SystemClock):
    """A wall clock that passes by being slept, up to `until_ns`; there it stands still."""

    def __init__(self) -> None:
        self.time_ns = self.until_ns = BEGIN_NS
        self.reached = asyncio.Event()

    def now_ns(self) -> int:
        return self.time_ns

    async def sleep(self, seconds: float) -> None:
        while self.time_ns + int(seconds * 1e9) > self.until_ns:
            self.reached.set()
            await asyncio.sleep(0.001)
        self.time_ns += max(int(seconds * 1e9), 1)

    async def pass_to(self, seconds: float) -> None:
        """Let time pass up to so many seconds after the beginning."""
        self.until_ns = BEGIN_NS + int(seconds * 1e9)
        await asyncio.sleep(0.01)
        self.reached.clear()
        await asyncio.wait_for(self.reached.wait(), 20)


@asynccontextmanager
async def scheduled(core: Core, marks: Marks, *, every_seconds: int = 300) -> AsyncIterator[WallClock]:
    clock = WallClock()
    running = asyncio.create_task(
        Schedule(marks.carry_out, lambda: core.ladder.in_gap, clock, every_seconds=every_seconds).run()
    )
    yield clock
    assert not running.done()
    running.cancel()
    await asyncio.wait({running})


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[Core]:
    """A disk that is replicated."""
    async with agent_core(tmp_path, disk_bytes=MIB) as made:
        seeding = asyncio.create_task(made.seeder.run())
        while made.ladder.in_gap:
            await asyncio.sleep(0.01)
        seeding.cancel()
        await asyncio.wait({seeding})
        yield made


@pytest.fixture
def marks(core: Core) -> Marks:
    return Marks(core.log, core.disk.path.parent / "marks.json", lambda: core.ladder.in_gap)


def names(marks: Marks) -> list[str]:
    return [report.name for report in marks.reports()]


async def test_points_are_named_at_whole_multiples_of_the_interval(core: Core, marks: Marks) -> None:
    async with scheduled(core, marks) as clock:
        await clock.pass_to(99)
        assert names(marks) == []
        await clock.pass_to(10 * 60)
    assert names(marks) == ["auto-2026-11-22T10:05:00Z", "auto-2026-11-22T10:10:00Z"]
    for report in marks.reports():
        assert report.command_id is None  # nobody asked for it
        assert not report.in_gap
        assert report.sequence < core.log.next_sequence
    marks.acknowledged(marks.reports())
    assert marks.reports() == ()


async def test_no_point_is_named_inside_a_gap_and_the_next_one_is(core: Core, marks: Marks) -> None:
    async with scheduled(core, marks) as clock:
        core.ladder.open_gap("a test")
        await clock.pass_to(4 * 60)
        assert names(marks) == []
        assert core.ladder.close_gap()
        await clock.pass_to(8 * 60)
    assert names(marks) == ["auto-2026-11-22T10:10:00Z"]


async def test_a_clock_that_is_set_back_keeps_nobody_waiting(core: Core, marks: Marks) -> None:
    async with scheduled(core, marks, every_seconds=60) as clock:
        await clock.pass_to(50)
        clock.time_ns -= 24 * 3600 * 10**9
        clock.until_ns = clock.time_ns
        await clock.pass_to(50 + 60 - 24 * 3600)
    assert names(marks) == ["auto-2026-11-22T10:04:00Z", "auto-2026-11-21T10:05:00Z"]


async def test_a_point_that_can_not_be_made_is_left_out(
    core: Core, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise LimitError("the change log has no room left even for a record")

    async with scheduled(core, marks) as clock:
        with monkeypatch.context() as patch:
            patch.setattr(ChangeLog, "append_record", full)
            await clock.pass_to(4 * 60)
        await clock.pass_to(8 * 60)
    assert names(marks) == ["auto-2026-11-22T10:10:00Z"]


async def test_points_by_the_clock_do_not_drive_out_those_that_were_asked_for(
    core: Core, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SCHEDULED", 3)
    asked = [("c1", "before the upgrade"), *((f"{SCHEDULED}auto-{number}", f"auto-{number}") for number in range(8))]
    for mark_id, name in asked:
        await marks.carry_out(Command(id=mark_id, kind="mark", name=name))
    expected = ["before the upgrade", "auto-5", "auto-6", "auto-7"]
    assert names(marks) == expected
    again = Marks(core.log, core.disk.path.parent / "marks.json", lambda: False)
    assert names(again)[-3:] == expected[-3:]
    assert [report.command_id for report in again.reports()] == ["c1", None, None, None, None]  # saved, then trimmed


async def test_a_machines_policy_beats_the_agents_settings_and_gives_them_back(core: Core, marks: Marks) -> None:
    clock = WallClock()
    schedule = Schedule(marks.carry_out, lambda: core.ladder.in_gap, clock, every_seconds=300)
    running = asyncio.create_task(schedule.run())
    schedule.follow(60)
    await clock.pass_to(90)
    assert names(marks) == ["auto-2026-11-22T10:04:00Z"]
    schedule.follow(0)
    await clock.pass_to(20 * 60)
    assert len(names(marks)) == 1
    schedule.follow(None)
    await clock.pass_to(26 * 60)
    assert len(names(marks)) in (2, 3)
    assert names(marks)[-1] == "auto-2026-11-22T10:25:00Z"
    running.cancel()
    await asyncio.wait({running})
