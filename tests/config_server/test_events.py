"""Events over TLS: what happens is heard as it happens, once and in order; who was away goes on where he was."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from config_server import alerts
from config_server.bells import Bells
from config_server.events import MAX_EVENTS, Events
from config_server.foundation import new_identity
from config_server.jobs import book, opening
from config_server.registry import Registry
from config_server.vault import REGISTRY_FILE
from replicar.control.event_stream import MAX_LINE_BYTES, NOTHING, EventReader, encode
from replicar.control.identity import AUTHORITY_FILE, CONFIG_SERVER_NAME, Role
from replicar.control.messages import Alert, Event, EventKind, JobKind, JobState, LifeState, TokenRequest
from replicar.errors import LimitError, PermanentError
from tests.config_server.script import Script, drill
from tests.config_server.support import Cast, SetClock


async def heard(events: AsyncIterator[Event | None], count: int, *kinds: EventKind) -> list[Event]:
    """The next events of these kinds."""
    found: list[Event] = []
    async with asyncio.timeout(60):
        async for event in events:
            if event is not None and (not kinds or event.kind in kinds):
                found.append(event)
            if len(found) == count:
                return found
    raise AssertionError(f"the line ended after {found}")


async def test_a_job_is_told_step_by_step_and_what_it_makes_of_its_machine(protected: Cast, worker: Script) -> None:
    async with protected.operator.events("db1") as events:
        made = await drill(protected)
        await worker.must_claim()
        await worker.say("prerequisites", JobState.IN_PROGRESS)
        await worker.say("prerequisites", JobState.IN_PROGRESS)  # renews the lease, and is no news
        await worker.say("prerequisites", JobState.SUCCEEDED)
        await worker.do_steps()
        await worker.end(result={"sequence": "60"})
        told = [event.job for event in await heard(events, 10, EventKind.JOB) if event.job is not None]
    assert {job.id for job in told} == {made.id}
    made_and_claimed_and_begun = [JobState.NOT_STARTED, JobState.IN_PROGRESS, JobState.IN_PROGRESS]
    assert [job.state for job in told[:3]] == made_and_claimed_and_begun
    assert [job.percent for job in told] == [0, 0, 0, 16, 33, 50, 66, 83, 100, 100]
    assert told[-1].state is JobState.SUCCEEDED


async def test_a_life_that_changes_is_told_with_where_it_came_from(protected: Cast, worker: Script) -> None:
    async with protected.operator.events("db1") as events:
        await drill(protected)
        (begun,) = await heard(events, 1, EventKind.LIFE)
        await worker.carry_out(JobKind.TEST_FAILOVER)
        (done,) = await heard(events, 1, EventKind.LIFE)
    assert (begun.machine, begun.life_before, begun.life) == ("db1", LifeState.PROTECTED, LifeState.TEST_FAILOVER)
    assert (done.life_before, done.life) == (LifeState.TEST_FAILOVER, LifeState.CLEAN_UP_PENDING)


async def test_what_follows_from_reports_is_told_too(protected: Cast) -> None:
    protected.house.server.events.look_seconds = 0.1
    async with protected.operator.events() as events:
        await protected.machine.agent_heartbeat(protected.house.machine_heartbeat(state="resynchronising"))
        (life,) = await heard(events, 1, EventKind.LIFE)
        protected.house.clock.move(seconds=3600)
        machine, server = sorted(await heard(events, 2, EventKind.HEALTH), key=lambda event: event.process_server)
    assert (life.life_before, life.life) == (LifeState.PROTECTED, LifeState.RESYNCHRONISING)
    assert machine.machine == "db1"
    assert machine.health is not None
    assert not machine.health.online
    assert "process server ps1" in {error.part for error in machine.health.errors}
    assert server.process_server == "ps1"
    assert server.health is not None
    assert (server.health.online, server.health.level) == (False, "critical")


async def test_an_alert_is_told_when_it_is_raised_and_when_it_is_cleared(protected: Cast) -> None:
    late, well = (protected.house.machine_heartbeat(rpo_seconds=seconds) for seconds in (9000.0, 1.0))
    registry, clock = protected.house.server.registry, protected.house.clock
    async with protected.operator.events() as events:
        for report in (late, well):
            await protected.machine.agent_heartbeat(report)
            await registry.run(lambda connection: alerts.look_at_rpo(connection, clock.now_ns()))
        raised, cleared = [event.alert for event in await heard(events, 2, EventKind.ALERT)]
    assert isinstance(raised, Alert)
    assert isinstance(cleared, Alert)
    assert (raised.code, raised.machine, raised.cleared_ns) == ("rpo-exceeded", "db1", None)
    assert cleared.number == raised.number
    assert cleared.cleared_ns is not None


async def test_nobody_is_told_what_was_rolled_back(protected: Cast) -> None:
    house = protected.house

    def cancel_and_fail(connection: sqlite3.Connection) -> None:
        opening.cancel(connection, book.find(connection, made.id), house.clock.now_ns())
        raise LimitError("on second thoughts")

    async with protected.operator.events("db1") as events:
        made = await drill(protected)
        with pytest.raises(LimitError):
            await house.server.registry.run(cancel_and_fail)
        assert (await protected.operator.job(made.id)).state is JobState.NOT_STARTED
        await protected.operator.cancel_job(made.id)
        await drill(protected)
        told = [event.job.state for event in await heard(events, 3, EventKind.JOB) if event.job is not None]
    assert told == [JobState.NOT_STARTED, JobState.CANCELLED, JobState.NOT_STARTED]


async def test_who_comes_back_with_the_last_id_hears_what_he_missed_and_once(protected: Cast) -> None:
    async with protected.operator.events("db1") as events:
        made = await drill(protected)
        (last,) = await heard(events, 1, EventKind.JOB)
    await protected.operator.cancel_job(made.id)
    async with protected.operator.events("db1", after=last.id) as events:
        (missed,) = await heard(events, 1, EventKind.JOB)
    assert missed.job is not None
    assert missed.job.state is JobState.CANCELLED
    for unknown in ("00000000-1", last.id.partition("-")[0] + "-99", "nonsense"):
        async with protected.operator.events("db1", after=unknown) as events:
            assert (await heard(events, 1))[0].kind is EventKind.MISSED


def test_who_is_behind_by_more_than_the_ring_is_told_so_and_goes_on() -> None:
    events = Events(Bells(), SetClock())
    alert = Alert(number=1, machine="db1", code="rpo-exceeded", message="late", raised_ns=1)
    start = events.begin("")
    events.take([alert] * MAX_EVENTS)
    found, place = events.since(start)
    assert len(found) == MAX_EVENTS
    events.take([alert] * (MAX_EVENTS + 1))
    (missed,), place = events.since(place)
    assert missed.kind is EventKind.MISSED
    assert events.begin(missed.id) == place
    events.take([alert])
    assert [event.kind for event in events.since(place)[0]] == [EventKind.ALERT]


async def test_a_machine_that_is_not_there_and_a_role_that_may_not_are_refused(protected: Cast) -> None:
    with pytest.raises(PermanentError, match="no machine named 'nobody'"):
        async with protected.operator.events("nobody"):
            pass
    with pytest.raises(PermanentError, match="a machine may not GET /v1/events"):
        async with protected.machine.events():
            pass


async def test_a_token_hears_until_it_is_revoked(protected: Cast, tmp_path: Path) -> None:
    house = protected.house
    house.server.events.alive_seconds = 0.2
    registry = Registry(house.directory / REGISTRY_FILE)
    ada = new_identity(house.server.vault, registry, Role.ADMIN, "ada", tmp_path / "ada", address="", clock=house.clock)
    registry.close()
    context = ssl.create_default_context(cafile=str(house.directory / "operator" / AUTHORITY_FILE))
    async with house.client(ada) as admin, aiohttp.ClientSession() as session:
        made = await admin.create_token(TokenRequest.model_validate({"name": "screen", "role": "reader"}))
        answer = await session.get(
            f"https://{house.address}/v1/events",
            headers={"Authorization": f"Bearer {made.text.get_secret_value()}"},
            ssl=context,
            server_hostname=CONFIG_SERVER_NAME,
        )
        assert answer.content_type == "text/event-stream"
        assert await answer.content.readline() == NOTHING.splitlines(keepends=True)[0]
        await admin.revoke_token(made.token.id)
        async with asyncio.timeout(60):
            await answer.content.read()  # to the end, which is the server's doing


async def test_the_line_ends_when_the_server_does(protected: Cast) -> None:
    async with asyncio.timeout(60), protected.operator.events() as events:
        protected.house.server.bells.close()
        assert [event async for event in events] == [None]


def test_bytes_may_come_in_any_pieces() -> None:
    sent = [Event(id=f"a-{number}", kind=EventKind.MISSED, time_ns=number) for number in range(3)]
    data = NOTHING + b"retry: 10\r\n\r\n" + b"".join(encode(event).replace(b"\n", b"\r\n") for event in sent)
    for size in (1, 2, 7, len(data)):
        reader, found = EventReader(), list[Event | None]()
        for start in range(0, len(data), size):
            found += reader.take(data[start : start + size])
        assert found == [None, *sent]
    assert json.loads(encode(sent[0]).splitlines()[2].removeprefix(b"data: "))["kind"] == "missed"
    with pytest.raises(LimitError, match="a line of more than"):
        EventReader().take(b"x" * (MAX_LINE_BYTES + 1))
    with pytest.raises(PermanentError, match="not a valid Event"):
        EventReader().take(b"data: {}\n\n")
