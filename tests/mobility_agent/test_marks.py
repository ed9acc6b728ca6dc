"""Marks: one point for each command, whatever dies when; and what is told about gaps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mobility_agent.marks as module
from mobility_agent.changelog import ChangeLog
from mobility_agent.gaps import Gaps
from mobility_agent.marks import MAX_MARKS, Marks
from mobility_agent.records import Record, RecordedLog, held_records
from replicar.clock import SystemClock
from replicar.control import files
from replicar.control.messages import Command
from replicar.errors import CorruptionError, LimitError, TransientError
from replicar.formats import record
from replicar.formats.frame import Flag, Kind
from replicar.formats.record import Consistency
from tests.mobility_agent.core import FILE_BYTES, MACHINE


class Died(BaseException):
    """The process is gone from here on."""


class Agent:
    """Log and marks of an agent that can die and start again on the same directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start()

    def start(self) -> None:
        self.log = RecordedLog(
            self.directory / "log",
            MACHINE,
            first_sequence=1,
            limit_bytes=8 * FILE_BYTES,
            boot_id=b"boot".ljust(16),
            clock=SystemClock(),
            file_bytes=FILE_BYTES,
        )
        self.in_gap = False
        self.gaps = Gaps(self.directory / "gaps.json")
        self.marks = Marks(self.log, self.directory / "marks.json", lambda: self.in_gap)
        begin = min(self.gaps.covered_sequence + 1, self.marks.search_from or 1)
        held = list(held_records(self.log, max(begin, self.log.first_sequence)))
        for found in held:
            self.gaps.observe(found)
        self.marks.recover(held, self.gaps.holds)
        self.log.on_record = self.gaps.observe

    def die(self) -> None:
        self.log.abandon()

    def restart(self) -> None:
        self.die()
        self.start()

    def marks_in_the_stream(self) -> list[record.Mark]:
        return [found.item for found in held_records(self.log, 1) if isinstance(found.item, record.Mark)]

    def write(self, count: int = 1, size: int = 4096) -> None:
        for _ in range(count):
            assert self.log.append_copy(Kind.WRITE, 0, 0, size, bytes(size))


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def command(name: str, command_id: str = "", **fields: Any) -> Command:
    return Command(id=command_id or f"id-{name}", kind="mark", name=name, **fields)


async def test_a_command_makes_a_mark_at_the_place_it_reports(agent: Agent) -> None:
    agent.write(3)
    await agent.marks.carry_out(command("before upgrade"))
    agent.write(2)
    (report,) = agent.marks.reports()
    assert (report.name, report.sequence, report.command_id) == ("before upgrade", 4, "id-before upgrade")
    assert report.kind is Consistency.CRASH
    assert not report.in_gap
    (found,) = [found for found in held_records(agent.log, 1) if found.kind is Kind.MARK]
    assert (found.sequence, found.time_ns) == (report.sequence, report.time_ns)
    assert found.item == record.Mark("before upgrade", Consistency.CRASH, "id-before upgrade")


async def test_a_command_that_comes_again_makes_no_second_mark_and_is_answered_again(agent: Agent) -> None:
    await agent.marks.carry_out(command("one"))
    first = agent.marks.reports()
    agent.marks.acknowledged(first)
    assert agent.marks.reports() == ()
    await agent.marks.carry_out(command("one"))
    assert agent.marks.reports() == first
    assert len(agent.marks_in_the_stream()) == 1


async def test_a_command_that_comes_again_after_a_restart_makes_no_second_mark(agent: Agent) -> None:
    await agent.marks.carry_out(command("one"))
    first = agent.marks.reports()
    agent.restart()
    assert agent.marks.reports() == first  # told again: the answer may have been lost with the process
    await agent.marks.carry_out(command("one"))
    assert len(agent.marks_in_the_stream()) == 1


async def test_commands_at_the_same_time_make_one_mark_each(agent: Agent) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(agent.marks.carry_out(command(f"mark {number % 5}")))
    assert sorted(mark.name for mark in agent.marks_in_the_stream()) == [f"mark {number}" for number in range(5)]


@pytest.mark.parametrize("dies_at", ["append_record", "sync", "second save"])
async def test_a_death_between_any_two_steps_leaves_one_mark_of_a_command(
    agent: Agent, dies_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.write(5)
    await agent.marks.carry_out(command("earlier"))
    with monkeypatch.context() as patch:
        _die_at(patch, dies_at)
        with pytest.raises(Died):
            await agent.marks.carry_out(command("one"))
    agent.restart()
    await agent.marks.carry_out(command("one"))  # the config server never heard of it
    assert [mark.name for mark in agent.marks_in_the_stream()] == ["earlier", "one"]
    assert [report.name for report in agent.marks.reports()] == ["earlier", "one"]
    agent.restart()
    assert [report.name for report in agent.marks.reports()] == ["earlier", "one"]


def _die_at(patch: pytest.MonkeyPatch, place: str) -> None:
    def dead(*_: object, **__: object) -> Any:
        raise Died

    if place == "second save":
        saves: list[int] = []
        real: Callable[..., None] = files.write_file

        def second_dies(*arguments: Any, **options: Any) -> None:
            saves.append(1)
            if len(saves) == 2:
                raise Died
            real(*arguments, **options)

        patch.setattr(files, "write_file", second_dies)
    else:
        patch.setattr(ChangeLog if place == "sync" else RecordedLog, place, dead)


async def test_a_disk_that_fails_half_way_is_tried_again_without_a_second_mark(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process lives on: the mark is in the stream, but was not made durable."""

    async def fails(_: ChangeLog) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(ChangeLog, "sync", fails)
        with pytest.raises(OSError, match="Input/output"):
            await agent.marks.carry_out(command("one"))
        assert agent.marks.reports() == ()
    await agent.marks.carry_out(command("one"))
    assert len(agent.marks_in_the_stream()) == 1
    assert len(agent.marks.reports()) == 1


async def test_when_nobody_can_tell_whether_a_mark_was_made_the_command_is_refused(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _die_at(patch, "append_record")
        with pytest.raises(Died):
            await agent.marks.carry_out(command("one"))
    agent.write(10, 1 << 20)  # as if all this had come and gone before the death
    agent.log.trim(agent.log.next_sequence - 1)
    assert agent.log.first_sequence > 1
    agent.restart()
    (refusal,) = agent.marks.refusals()
    assert refusal.command_id == "id-one"
    assert "can't tell" in refusal.message
    assert refusal.hint


async def test_a_name_that_is_taken_is_refused_and_makes_no_second_point(agent: Agent) -> None:
    await agent.marks.carry_out(command("nightly", "first"))
    await agent.marks.carry_out(command("nightly", "second"))
    (refusal,) = agent.marks.refusals()
    assert refusal.command_id == "second"
    assert refusal.error == "PermanentError"
    assert "'nightly' already" in refusal.message
    assert len(agent.marks_in_the_stream()) == 1
    agent.restart()
    await agent.marks.carry_out(command("nightly", "third"))
    assert [item.command_id for item in agent.marks.refusals()] == ["third"]
    agent.marks.acknowledged((), agent.marks.refusals())
    assert agent.marks.refusals() == ()


async def test_application_consistency_is_not_claimed(agent: Agent) -> None:
    await agent.marks.carry_out(command("one", consistency=Consistency.APPLICATION))
    (refusal,) = agent.marks.refusals()
    assert "application-consistent" in refusal.message
    assert agent.marks_in_the_stream() == []


async def test_a_name_too_long_for_a_record_is_refused(agent: Agent) -> None:
    # 500 characters of four bytes each are within the API's limit, and their escapes within nothing.
    await agent.marks.carry_out(command("\N{LINEAR B SYLLABLE B008 A}" * 500, "a" * 500, consistency=Consistency.GROUP))
    await agent.marks.carry_out(command("\0" * 500, "\1" * 500))
    assert len(agent.marks_in_the_stream()) + len(agent.marks.refusals()) == 2
    assert [item.error for item in agent.marks.refusals()] == ["LimitError"]


async def test_a_command_of_an_unknown_kind_is_passed_over(agent: Agent) -> None:
    await agent.marks.carry_out(Command(id="1", kind="dance", name="one"))
    assert agent.marks.reports() == ()
    assert agent.log.next_sequence == 1


async def test_a_full_log_makes_no_mark_now_and_one_later(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise LimitError("the change log has no room left even for a record")

    with monkeypatch.context() as patch:
        patch.setattr(RecordedLog, "append_record", full)
        with pytest.raises(LimitError):
            await agent.marks.carry_out(command("one"))
    await agent.marks.carry_out(command("one"))
    assert len(agent.marks_in_the_stream()) == 1


async def test_a_mark_waits_for_its_point_and_lies_in_it(agent: Agent) -> None:
    async def at_point(append: Callable[[], None]) -> None:
        agent.write(3)
        agent.in_gap = False
        append()
        agent.in_gap = True

    agent.in_gap, agent.marks.at_point = True, at_point
    await agent.marks.carry_out(command("one"))
    (report,) = agent.marks.reports()
    assert (report.sequence, report.in_gap) == (4, False)


async def test_a_point_that_can_not_be_had_refuses_the_command_and_leaves_its_name_free(agent: Agent) -> None:
    async def no_point(_: Callable[[], None]) -> None:
        raise TransientError("no recovery point: too much is written", hint="ask again")

    agent.marks.at_point = no_point
    await agent.marks.carry_out(command("one"))
    (refusal,) = agent.marks.refusals()
    assert (refusal.message, refusal.hint) == ("no recovery point: too much is written", "ask again")
    assert agent.marks_in_the_stream() == []
    agent.marks.at_point = None
    await agent.marks.carry_out(command("one", "again"))
    assert [mark.mark_id for mark in agent.marks_in_the_stream()] == ["again"]


async def test_a_death_right_after_a_points_mark_makes_no_second_one(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_point(append: Callable[[], None]) -> None:
        append()

    agent.marks.at_point = at_point
    with monkeypatch.context() as patch:
        _die_at(patch, "sync")
        with pytest.raises(Died):
            await agent.marks.carry_out(command("one"))
    agent.restart()
    await agent.marks.carry_out(command("one"))
    assert [report.name for report in agent.marks.reports()] == ["one"]
    assert len(agent.marks_in_the_stream()) == 1


async def test_a_mark_inside_a_gap_is_recorded_and_reported_as_such(agent: Agent) -> None:
    agent.in_gap = True
    await agent.marks.carry_out(command("one"))
    (report,) = agent.marks.reports()
    assert report.in_gap
    assert len(agent.marks_in_the_stream()) == 1


async def test_a_mark_found_again_after_a_death_knows_whether_it_lay_in_a_gap(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.log.append_record(Kind.GAP, record.Gap("initial replication"), flags=Flag.GAP_BEGIN)
    for name in ("inside", "outside"):
        with monkeypatch.context() as patch:
            _die_at(patch, "sync")
            with pytest.raises(Died):
                await agent.marks.carry_out(command(name))
        agent.log.append_record(Kind.GAP, record.Gap("copied"), flags=Flag.GAP_END)
    agent.restart()
    assert [(report.name, report.in_gap) for report in agent.marks.reports()] == [("inside", True), ("outside", False)]


async def test_only_so_many_marks_are_remembered(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MARKS", 10)
    for number in range(15):
        await agent.marks.carry_out(command(f"{number}"))
    agent.marks.acknowledged(agent.marks.reports())
    agent.restart()
    assert [report.name for report in agent.marks.reports()] == [str(number) for number in range(5, 15)]


async def test_the_longest_marks_fit_into_the_file(agent: Agent) -> None:
    """The bound of the file holds for as many marks as are remembered, of the longest names there may be."""
    await agent.marks.carry_out(command("\N{LINEAR B SYLLABLE B008 A}" * 255, "f" * 36))
    assert (agent.directory / "marks.json").stat().st_size * MAX_MARKS < module.MAX_FILE_BYTES


async def test_a_damaged_memory_of_marks_is_said_and_not_begun_anew(agent: Agent) -> None:
    await agent.marks.carry_out(command("one"))
    agent.die()
    path = agent.directory / "marks.json"
    for damage in (b"", b"[]", b'{"marks":[{}]}', path.read_bytes()[:-3], b"\xff" * 20):
        path.write_bytes(damage)
        with pytest.raises(CorruptionError, match=r"marks\.json"):
            agent.start()
        agent.die()


async def test_gaps_are_told_once_each_until_they_are_heard(agent: Agent) -> None:
    was_first = agent.gaps.is_first
    agent.log.append_record(Kind.GAP, record.Gap("initial replication"), flags=Flag.GAP_BEGIN)
    agent.write()
    agent.log.append_record(Kind.GAP, record.Gap("again"), flags=Flag.GAP_BEGIN)  # an agent that was killed says it so
    (report,) = agent.gaps.reports()
    assert (report.first_sequence, report.last_sequence, report.reason) == (1, None, "initial replication")
    whole = agent.gaps.ordered_from
    assert whole is None
    agent.gaps.acknowledged((report,))
    assert agent.gaps.reports() == ()
    agent.log.append_record(Kind.GAP, record.Gap("copied"), flags=Flag.GAP_END)
    (report,) = agent.gaps.reports()
    assert (report.first_sequence, report.last_sequence) == (1, 4)
    assert agent.gaps.ordered_from == (4, agent.log.last_time_ns)
    assert (was_first, agent.gaps.is_first) == (True, False)
    assert [agent.gaps.holds(sequence) for sequence in (1, 4, 5)] == [True, True, False]


async def test_gaps_are_remembered_and_completed_from_the_log(agent: Agent) -> None:
    agent.log.append_record(Kind.GAP, record.Gap("initial replication"), flags=Flag.GAP_BEGIN)
    await agent.gaps.save()
    agent.write(2)
    agent.log.append_record(Kind.GAP, record.Gap("copied"), flags=Flag.GAP_END)
    ended = agent.gaps.ordered_from
    agent.restart()  # without having saved the end
    assert agent.gaps.ordered_from == ended
    assert not agent.gaps.is_open
    await agent.gaps.save()
    agent.restart()
    assert agent.gaps.ordered_from == ended
    assert json.loads((agent.directory / "gaps.json").read_text())["covered_sequence"] == 4


async def test_a_damaged_memory_of_gaps_is_made_from_the_log(agent: Agent) -> None:
    agent.log.append_record(Kind.GAP, record.Gap("initial replication"), flags=Flag.GAP_BEGIN)
    await agent.gaps.save()
    (agent.directory / "gaps.json").write_text("{")
    agent.restart()
    assert agent.gaps.is_open
    assert agent.gaps.latest is not None
    assert agent.gaps.latest.reason == "initial replication"


async def test_records_are_found_among_everything_else_in_the_log(agent: Agent) -> None:
    seen: list[Record] = []
    agent.log.on_record = seen.append
    for number in range(6):
        agent.write(3, 300 << 10)
        agent.log.append_record(Kind.MARK, record.Mark(f"mark {number}"))
        agent.log.append_record(Kind.DISK, record.Disk(0, "root", 1 << 30))
    found = list(held_records(agent.log, 1))
    assert found == seen
    assert [item.sequence for item in found] == [n for k in range(6) for n in (5 * k + 4, 5 * k + 5)]
    assert list(held_records(agent.log, found[5].sequence)) == found[5:]
