"""A machine that is held for a group: its writers wait, are let go in every case, and the mark is where they waited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mobility_agent.gate import Gate
from mobility_agent.groups import COMMAND_KIND, Groups
from mobility_agent.marks import Marks
from replicar.clock import SystemClock
from replicar.control.messages import Command, GroupVerdict
from replicar.errors import TransientError
from replicar.formats import record
from replicar.formats.frame import Kind
from replicar.formats.record import Consistency
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import Core, agent_core, frames_of

GROUP = "9f0c7f0e-6a65-4d4c-8f0a-5a0f6c1f6c11"


@asynccontextmanager
async def grouped(directory: Path) -> AsyncIterator[tuple[Core, Groups, Marks]]:
    async with agent_core(directory) as core:
        core.ladder.regions[0].clear(0, core.disk.size_bytes)
        core.ladder.close_gap()
        marks = Marks(core.log, directory / "marks.json", lambda: core.ladder.in_gap)
        yield core, Groups(marks, core.ladder.gate, SystemClock()), marks


def command(hold_seconds: float = 5.0, name: str = "together") -> Command:
    return Command(id=GROUP, kind=COMMAND_KIND, name=name, consistency=Consistency.GROUP, hold_seconds=hold_seconds)


def verdict(complete: bool) -> tuple[GroupVerdict, ...]:
    return (GroupVerdict(group=GROUP, complete=complete),)


def state(groups: Groups) -> str:
    return groups.report.state if groups.report is not None else ""


def marked(core: Core) -> list[tuple[int, str]]:
    """Of the log's records, its writes by their first byte and its marks by their name, in order."""
    core.log.seal()
    found = []
    for item in frames_of(core.log):
        for _, length, _, place, _, kind, _ in item.table.tolist():
            payload = item.payload[place : place + length]
            if kind == Kind.WRITE:
                found.append((kind, chr(payload[0])))
            elif kind == Kind.MARK:
                found.append((kind, record.read_mark(payload).name))
    return found


async def test_writers_wait_for_the_verdict_and_the_mark_lies_before_what_they_wrote(tmp_path: Path) -> None:
    async with grouped(tmp_path) as (core, groups, marks), await NbdClient.connect(core.socket) as client:
        await client.write(0, b"a" * 4096)
        await groups.carry_out(command())
        assert state(groups) == "held"
        writing = asyncio.create_task(client.write(0, b"b" * 4096))
        began = time.monotonic()
        await asyncio.sleep(0.2)
        assert not writing.done()
        waited = time.monotonic() - began  # a timer may end a tick before its time
        await groups.judge(verdict(complete=True))
        await asyncio.wait_for(writing, 5)
        assert state(groups) == "kept"
        assert groups.report is not None
        assert groups.report.held_seconds is not None
        assert groups.report.held_seconds >= round(waited, 4)
        assert marked(core) == [(Kind.WRITE, "a"), (Kind.MARK, "together"), (Kind.WRITE, "b")]
        (reported,) = marks.reports()
        assert (reported.sequence, reported.kind) == (groups.report.sequence, Consistency.GROUP)


async def test_a_client_that_connects_meanwhile_waits_too(tmp_path: Path) -> None:
    async with grouped(tmp_path) as (core, groups, _):
        await groups.carry_out(command())
        async with await NbdClient.connect(core.socket) as client:
            writing = asyncio.create_task(client.write(0, b"b" * 4096))
            await asyncio.sleep(0.2)
            assert not writing.done()
            await groups.judge(verdict(complete=True))
            await asyncio.wait_for(writing, 5)
        assert marked(core) == [(Kind.MARK, "together"), (Kind.WRITE, "b")]


async def test_what_a_client_sent_and_left_is_not_written_over_what_the_next_one_wrote(tmp_path: Path) -> None:
    async with grouped(tmp_path) as (core, groups, _):
        dead = await NbdClient.connect(core.socket)
        await groups.carry_out(command())
        lost = asyncio.create_task(dead.write(0, b"a" * 4096))
        await asyncio.sleep(0.2)
        dead.abort()
        with pytest.raises(TransientError):
            await lost
        async with await NbdClient.connect(core.socket) as client:
            writing = asyncio.create_task(client.write(0, b"b" * 4096))
            await asyncio.sleep(0.2)
            await groups.judge(verdict(complete=True))
            await asyncio.wait_for(writing, 5)
        assert marked(core) == [(Kind.MARK, "together"), (Kind.WRITE, "b")]


@pytest.mark.parametrize("how", ["abandoned", "late"])
async def test_without_a_verdict_writers_are_let_go_and_there_is_no_mark(tmp_path: Path, how: str) -> None:
    async with grouped(tmp_path) as (core, groups, marks), await NbdClient.connect(core.socket) as client:
        await groups.carry_out(command(hold_seconds=0.2))
        writing = asyncio.create_task(client.write(0, b"b" * 4096))
        if how == "abandoned":
            await groups.judge(verdict(complete=False))
        await asyncio.wait_for(writing, 5)
        assert groups.report is not None
        assert state(groups) == "lost"
        await groups.judge(verdict(complete=True))  # too late to be of use
        assert marked(core) == [(Kind.WRITE, "b")]
        assert marks.reports() == ()


async def test_what_was_said_is_said_until_it_is_answered(tmp_path: Path) -> None:
    async with grouped(tmp_path) as (_, groups, _):
        await groups.carry_out(command())
        groups.acknowledged(groups.report)
        assert groups.is_holding
        assert groups.report is not None  # it still holds, and whoever asks is told so
        await groups.judge(verdict(complete=True))
        groups.acknowledged(groups.report)
        assert groups.report is None


async def test_a_name_that_is_taken_holds_nobody(tmp_path: Path) -> None:
    async with grouped(tmp_path) as (core, groups, marks), await NbdClient.connect(core.socket) as client:
        await marks.carry_out(Command(id="earlier", kind="mark", name="together"))
        await groups.carry_out(command())
        assert groups.report is not None
        assert state(groups) == "lost"
        assert "already" in groups.report.reason
        await asyncio.wait_for(client.write(0, bytes(512)), 5)


async def test_a_machine_whose_writers_can_not_be_held_says_so(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        groups = Groups(Marks(core.log, tmp_path / "marks.json", lambda: False), None, SystemClock())
        await groups.carry_out(command())
        assert groups.report is not None
        assert "followed, not served" in groups.report.reason


def test_a_gate_holds_and_lets_go_of_whoever_is_behind_it() -> None:
    class Behind:
        def __init__(self) -> None:
            self.said: list[str] = []

        def hold(self) -> None:
            self.said.append("hold")

        def resume(self) -> None:
            self.said.append("resume")

    gate, behind = Gate(), Behind()
    gate.holders = lambda: [behind]
    gate.close()
    gate.open()
    assert behind.said == ["hold", "resume"]
    assert not gate.is_closed
