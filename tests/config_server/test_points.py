"""Marks, gaps and recovery points through the API: asked for, made, stored, refused."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from config_server.points import MAX_COMMANDS
from replicar.control.client import ControlClient
from replicar.control.identity import Role
from replicar.control.messages import (
    GapReport,
    MarkReport,
)
from replicar.errors import LimitError, PermanentError, TransientError
from replicar.formats.record import Consistency
from tests.config_server.support import Cast, House


async def test_a_mark_goes_to_the_agent_and_comes_back_as_a_point(cast: Cast) -> None:
    await cast.protect()
    async with asyncio.TaskGroup() as group:
        mark = group.create_task(cast.operator.mark("db1", "before upgrade", consistency=Consistency.APPLICATION))
        group.create_task(cast.make_marks(100))
    point = mark.result()
    assert (point.name, point.kind, point.sequence, point.stored) == (
        "before upgrade",
        Consistency.APPLICATION,
        100,
        False,
    )
    assert (await cast.operator.points("db1")).points == (point,)
    assert (await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())).commands == ()


async def test_a_command_is_repeated_until_its_mark_is_reported(cast: Cast) -> None:
    await cast.protect()
    with pytest.raises(TransientError, match="has not made the mark 'm'") as late:
        await cast.operator.mark("db1", "m", wait_seconds=0)
    command_id = late.value.fields["command_id"]
    for _ in range(3):
        (command,) = (await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())).commands
        assert command.id == command_id
    await cast.make_marks(7)
    point = await cast.operator.mark("db1", "m", wait_seconds=0, command_id=command_id)
    assert point.sequence == 7
    assert len((await cast.operator.points("db1")).points) == 1


async def test_waiting_for_stored_waits_for_storage(cast: Cast) -> None:
    await cast.protect()
    async with asyncio.TaskGroup() as group:
        mark = group.create_task(cast.operator.mark("db1", "m", wait_stored=True))
        group.create_task(cast.make_marks(50))
        await asyncio.sleep(0.5)
        await cast.report_stored(49)
        await asyncio.sleep(0.2)
        assert not mark.done()
        await cast.report_stored(50)
    assert mark.result().stored


async def test_polls_are_short_while_somebody_waits_for_storage(cast: Cast) -> None:
    await cast.protect()
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(cast.make_marks(50))
        held = group.create_task(cast.server.process_server_heartbeat(cast.house.server_heartbeat(wait_seconds=30)))
        await asyncio.sleep(0.2)
        mark = asyncio.create_task(cast.operator.mark("db1", "m", wait_stored=True, wait_seconds=1))
        await held
        assert time.monotonic() - begun < 1
    with pytest.raises(TransientError, match="storage does not hold the mark 'm'"):
        await mark


async def test_a_mark_is_not_called_stored_because_a_later_incarnation_got_further(cast: Cast) -> None:
    await cast.protect()
    marks = [MarkReport(name="kept", sequence=80, time_ns=1), MarkReport(name="lost", sequence=95, time_ns=2)]
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=marks))
    await cast.report_stored(90)
    await cast.report_stored(2**48 + 5)
    await cast.report_stored(70)  # an old report that comes late takes nothing back
    listed = await cast.operator.points("db1")
    assert [(point.name, point.stored) for point in listed.points] == [("lost", False), ("kept", True)]
    assert listed.stored_sequence == 2**48 + 5


async def test_a_mark_inside_a_gap_is_no_recovery_point_and_who_asked_is_told(cast: Cast) -> None:
    await cast.protect()
    with pytest.raises(TransientError) as late:
        await cast.operator.mark("db1", "m", wait_seconds=0)
    command_id = late.value.fields["command_id"]
    mark = MarkReport(name="m", sequence=9, time_ns=1, command_id=command_id, in_gap=True)
    assert (await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=[mark]))).commands == ()
    with pytest.raises(PermanentError, match="made at sequence 9, but order was not captured there"):
        await cast.operator.mark("db1", "m", command_id=command_id)
    assert (await cast.operator.points("db1")).points == ()


@pytest.mark.parametrize(("error", "kind"), [("LimitError", LimitError), ("Newer", PermanentError)])
async def test_what_the_agent_refuses_reaches_who_asked_and_is_not_asked_again(
    cast: Cast, error: str, kind: type[Exception]
) -> None:
    await cast.protect()
    asked = asyncio.create_task(cast.operator.mark("db1", "m"))
    await asyncio.sleep(0.2)
    (command,) = (await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(wait_seconds=5))).commands
    refusal = {"command_id": command.id, "error": error, "message": "that name is taken", "hint": "choose another"}
    for _ in range(2):
        reply = await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(refusals=[refusal]))
        assert reply.commands == ()
    with pytest.raises(kind, match="the agent refused: that name is taken; choose another"):
        await asked


async def test_gaps_and_the_ordered_window_are_listed_and_saying_them_twice_does_no_harm(cast: Cast) -> None:
    open_gap = GapReport(first_sequence=10, reason="journal full")
    closed = GapReport(first_sequence=10, last_sequence=20, reason="journal full")
    await cast.protect()
    for gaps in ([open_gap], [open_gap], [closed], [open_gap]):
        await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(gaps=gaps, ordered_from=(21, 5)))
    await cast.report_stored(21)
    listed = await cast.operator.points("db1")
    assert listed.gaps == (closed,)
    assert listed.ordered_from == (21, 5)


async def test_the_ordered_window_is_offered_as_far_as_storage_has_it(cast: Cast) -> None:
    await cast.protect()
    window = {"ordered_from": (21, 5), "captured_sequence": 40, "stored_until_ns": 90}
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(stored_sequence=20, **window))
    listed = await cast.operator.points("db1")
    assert (listed.ordered_from, listed.ordered_until_ns) == (None, None)
    await cast.report_stored(30)
    listed = await cast.operator.points("db1")
    assert (listed.ordered_from, listed.ordered_until_ns, listed.stored_sequence) == ((21, 5), 90, 30)


async def test_a_machine_enrolled_again_offers_nothing_of_which_storage_may_have_nothing(cast: Cast) -> None:
    await cast.protect()
    mark = MarkReport(name="before", sequence=25, time_ns=7)
    fields = {"ordered_from": (21, 5), "stored_sequence": 30, "stored_until_ns": 90}
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=[mark], **fields))
    assert (await cast.operator.key("db1")).quiet == (30, 90)
    identity = await cast.house.enrol(cast.house.directory.parent / "again", "db1")
    async with cast.house.client(identity) as again:
        listed = await cast.operator.points("db1")
        assert [(point.name, point.stored, point.earlier) for point in listed.points] == [("before", True, True)]
        assert listed.ordered_from is None
        assert (await cast.operator.key("db1")).quiet is None
        begin = 2**48 + 5
        await again.agent_heartbeat(cast.house.machine_heartbeat(ordered_from=(begin, 100), stored_until_ns=99))
        assert (await cast.operator.points("db1")).ordered_from is None
        await cast.report_stored(begin)
        listed = await cast.operator.points("db1")
        assert (listed.ordered_from, listed.ordered_until_ns) == ((begin, 100), 100)


async def test_marks_for_a_machine_that_is_away_are_bounded(cast: Cast) -> None:
    await cast.protect()
    for number in range(MAX_COMMANDS):
        with pytest.raises(TransientError):
            await cast.operator.mark("db1", f"m{number}", wait_seconds=0)
    with pytest.raises(LimitError, match=f"{MAX_COMMANDS} marks still to make"):
        await cast.operator.mark("db1", "one more", wait_seconds=0)
    await cast.make_marks(1, count=MAX_COMMANDS)
    assert len((await cast.operator.points("db1")).points) == MAX_COMMANDS


async def test_twenty_machines_report_at_once_and_marks_reach_each_of_them(house: House, tmp_path: Path) -> None:
    names = [f"m{number:02}" for number in range(20)]

    async def live(name: str, client: ControlClient) -> None:
        """Poll and make marks until two are made."""
        made: list[MarkReport] = []
        while len(made) < 2:
            reply = await client.agent_heartbeat(house.machine_heartbeat(marks=made, wait_seconds=10))
            for command in reply.commands:
                if command.id not in {mark.command_id for mark in made}:
                    sequence = len(made) + 1
                    made.append(
                        MarkReport(name=command.name, sequence=sequence, time_ns=sequence, command_id=command.id)
                    )
        await client.agent_heartbeat(house.machine_heartbeat(marks=made))

    async with AsyncExitStack() as stack:
        operator = await stack.enter_async_context(house.operator())
        identity = await house.enrol(tmp_path / "ps1", "ps1", Role.PROCESS_SERVER)
        server = await stack.enter_async_context(house.client(identity))
        await server.process_server_heartbeat(house.server_heartbeat())
        async with asyncio.TaskGroup() as group:
            for name in names:
                client = await stack.enter_async_context(house.client(await house.enrol(tmp_path / name, name)))
                await operator.protect(name)
                group.create_task(live(name, client))
            marks = [group.create_task(operator.mark(name, f"{name} {turn}")) for name in names for turn in "ab"]
        assert sorted(mark.result().name for mark in marks) == sorted(
            f"{name} {turn}" for name in names for turn in "ab"
        )
        for name in names:
            assert {point.name for point in (await operator.points(name)).points} == {f"{name} a", f"{name} b"}
