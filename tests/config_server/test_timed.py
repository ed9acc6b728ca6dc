"""Work by the clock that fails: told, tried again, and no end of the config server, but where it has to be."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from pathlib import Path

import pytest

from config_server import rounds, service, timed
from config_server.settings import Settings
from config_server.timed import LONGEST_PAUSE_SECONDS, Timed
from config_server.troubles import Troubles
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.errors import (
    ConflictError,
    CorruptionError,
    FencedError,
    LimitError,
    PermanentError,
    ReplicarError,
    TransientError,
)
from tests.config_server.support import Cast, SetClock


class NotingClock(SetClock):
    """Does not wait, and notes for how long it should have; ends the work after so many pauses."""

    def __init__(self, pauses: int) -> None:
        super().__init__()
        self.left, self.pauses = pauses, list[float]()

    async def sleep(self, seconds: float) -> None:
        if not self.left:
            raise asyncio.CancelledError
        self.left -= 1
        self.pauses.append(seconds)


async def worked(errors: list[BaseException | None], troubles: Troubles) -> list[float]:
    """What pauses there were while the work ended in these ways, one after the other."""
    clock, ends = NotingClock(len(errors)), iter(errors)

    async def work() -> None:
        error = next(ends)
        if error is not None:
            raise error

    with pytest.raises(asyncio.CancelledError):
        await Timed("work", 30.0, work, troubles, clock).run()
    return clock.pauses


@pytest.mark.parametrize("kind", [TransientError, PermanentError, LimitError, ConflictError, FencedError])
async def test_what_fails_is_told_and_tried_again_less_and_less_often(kind: type[ReplicarError]) -> None:
    troubles = Troubles()
    pauses = await worked([None, *[kind("it can't be done", hint="do this")] * 8], troubles)
    assert pauses == [30.0, 30.0, 60.0, 120.0, 240.0, 480.0, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, 900.0]
    [report] = troubles.own
    assert (report.part, report.error, report.hint) == ("work", kind.__name__, "do this")


async def test_when_it_goes_well_again_nothing_is_told_and_it_is_done_as_often_as_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    troubles, failure = Troubles(), PermanentError("it can't be done")
    with caplog.at_level("INFO", logger=timed.__name__):
        assert await worked([failure, failure, None, None], troubles) == [30.0, 60.0, 120.0, 30.0]
    assert troubles.own == ()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["work failed and will be tried again: it can't be done", "work: well again"]


@pytest.mark.parametrize("error", [CorruptionError("the registry is damaged"), ValueError("a bug")])
async def test_a_damaged_registry_and_a_programmers_error_end_it(error: Exception) -> None:
    async def work() -> None:
        raise error

    with pytest.raises(type(error)):
        await Timed("work", 30.0, work, Troubles(), NotingClock(5)).run()


async def test_one_machines_trouble_keeps_no_other_from_its_turn(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    await cast.protect()
    troubled, well = uuid.UUID(int=1), uuid.UUID(int=2)
    advanced: list[uuid.UUID] = []

    def advance(connection: sqlite3.Connection, machine_id: uuid.UUID, now_ns: int) -> None:
        if machine_id == troubled:
            raise PermanentError("this machine's job can't go on")
        advanced.append(machine_id)

    monkeypatch.setattr(rounds, "_with_jobs", lambda _: [troubled, well])
    monkeypatch.setattr("config_server.jobs.own.advance", advance)
    with pytest.raises(PermanentError, match="can't go on"):
        await cast.house.server.rounds().go()
    assert advanced == [well]


async def test_the_server_goes_on_answering_and_status_says_what_fails(
    vault_directory: Path, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = Identity.load(vault_directory / "operator")

    def fail(_: object, __: object) -> None:
        raise LimitError("an alert too many", hint="look at it")

    monkeypatch.setattr(service, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr("config_server.alerts.look_at_rpo", fail)
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    settings = Settings(directory=vault_directory, listen="127.0.0.1", port=0, heartbeat_seconds=5)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        running = group.create_task(service.run(settings, clock, stop, port.set_result))
        async with ControlClient(operator, address=f"127.0.0.1:{await port}") as client:
            while not (status := await client.status()).errors:
                await asyncio.sleep(0.02)
        assert [(each.part, each.error, each.hint) for each in status.errors] == [
            ("the rounds", "LimitError", "look at it")
        ]
        assert not running.done()
        stop.set()
