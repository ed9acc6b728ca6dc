"""Hooks hold applications still around a point, and whatever happens let them go again."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mobility_agent
from mobility_agent.hooks import Hooks
from mobility_agent.marks import Marks
from replicar.control.messages import Command
from replicar.errors import PermanentError, TransientError
from replicar.formats.record import Consistency
from tests.mobility_agent.core import agent_core
from tests.support.databases import mariadb, postgresql

SHIPPED = Path(mobility_agent.__file__).parent / "hooks.d"


class Place:
    """A hooks' directory, and what its hooks were told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "hooks.d"
        self.directory.mkdir(mode=0o755)
        self.state = directory / "state"
        self.said = directory / "said"
        self.said.touch()

    def put(self, name: str, script: str = "") -> Path:
        path = self.directory / name
        path.write_text(f'#!/bin/sh\necho "{name} $1" >> {self.said}\n{script}\n')
        path.chmod(0o755)
        return path

    def hooks(self, timeout_seconds: float = 5.0) -> Hooks:
        return Hooks(self.directory, self.state, timeout_seconds=timeout_seconds)

    @property
    def calls(self) -> list[str]:
        return self.said.read_text().split("\n")[:-1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_hooks_freeze_in_order_and_thaw_in_the_reverse_order(place: Place) -> None:
    place.put("10-web")
    place.put("20-database", "sleep 0.1")
    async with place.hooks().held("a") as held:
        assert place.calls == ["10-web freeze", "20-database freeze"]
    assert place.calls[2:] == ["20-database thaw", "10-web thaw"]
    assert 0.2 <= held.pause_seconds < 5
    assert not (place.state / "frozen").exists()


async def test_a_hook_that_fails_is_named_with_its_last_words_and_all_that_began_is_thawed(place: Place) -> None:
    place.put("10-web")
    place.put("20-database", '[ "$1" = thaw ] || { echo starting; echo the disk is full >&2; exit 3; }')
    place.put("30-never")
    with pytest.raises(TransientError, match=r"20-database did not freeze \(status 3\): the disk is full"):
        async with place.hooks().held("a"):
            pytest.fail("nothing is held")
    assert place.calls == ["10-web freeze", "20-database freeze", "20-database thaw", "10-web thaw"]


async def test_a_hook_that_takes_too_long_is_ended_with_all_that_it_started(place: Place, tmp_path: Path) -> None:
    place.put("10-slow", f'[ "$1" = thaw ] || {{ (sleep 2; touch {tmp_path}/later) & sleep 60; }}')
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"10-slow did not freeze within 0\.3 s"):
        async with place.hooks(0.3).held("a"):
            pytest.fail("nothing is held")
    assert time.monotonic() - began < 2
    await asyncio.sleep(2.2)
    assert not (tmp_path / "later").exists()


async def test_what_fails_while_applications_are_held_lets_them_go(place: Place) -> None:
    place.put("10-web")
    with pytest.raises(RuntimeError):
        async with place.hooks().held("a"):
            raise RuntimeError
    assert place.calls == ["10-web freeze", "10-web thaw"]


async def test_a_task_that_is_cancelled_lets_applications_go_before_it_ends(place: Place) -> None:
    place.put("10-web", '[ "$1" = freeze ] || sleep 0.3')

    async def hold() -> None:
        async with place.hooks().held("a"):
            await asyncio.sleep(60)

    task = asyncio.create_task(hold())
    while len(place.calls) < 1 or not (place.state / "frozen").exists():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert place.calls == ["10-web freeze", "10-web thaw"]
    assert not (place.state / "frozen").exists()


async def test_what_an_agent_that_died_left_held_is_let_go_by_the_next_one(place: Place) -> None:
    place.put("10-web")
    place.state.mkdir()
    (place.state / "frozen").write_text("a\n")  # as an agent leaves it that dies between freeze and thaw
    await place.hooks().recover()
    assert place.calls == ["10-web thaw"]
    await place.hooks().recover()
    assert place.calls == ["10-web thaw"]


async def test_a_thaw_that_fails_is_tried_again_and_then_reported(place: Place) -> None:
    place.put("10-web", '[ "$1" = freeze ]')
    hooks = place.hooks()
    async with hooks.held("a"):
        pass
    assert place.calls == ["10-web freeze", *["10-web thaw"] * 3]
    assert "10-web did not thaw" in hooks.trouble
    assert (place.state / "frozen").exists()  # so that the next start tries again


def test_a_hook_that_others_can_change_is_refused(place: Place) -> None:
    place.put("10-web").chmod(0o777)
    with pytest.raises(PermanentError, match="could be changed by others"):
        place.hooks().programs()


@pytest.mark.parametrize("name", ["web.bak", ".web", "web~", "web.dpkg-old"])
def test_leftovers_of_editors_and_packages_are_no_hooks(place: Place, name: str) -> None:
    place.put(name)
    with pytest.raises(PermanentError, match="has 0 executable hooks"):
        place.hooks().programs()


async def test_a_hook_is_told_no_more_than_it_needs(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "of the agent")
    place.put("10-web", f"env > {tmp_path}/told")
    async with place.hooks().held("before-upgrade"):
        pass
    told = dict(line.split("=", 1) for line in (tmp_path / "told").read_text().splitlines())
    assert told["REPLICAR_MARK"] == "before-upgrade"
    assert "A_SECRET" not in told


# --- marks ---


def _command(name: str) -> Command:
    return Command(id=f"id-{name}", kind="mark", name=name, consistency=Consistency.APPLICATION)


async def test_an_application_consistent_mark_lies_between_freeze_and_thaw_and_says_how_long_that_was(
    place: Place, tmp_path: Path
) -> None:
    place.put("10-web", "sleep 0.1")
    async with agent_core(tmp_path) as core:
        marks = Marks(core.log, tmp_path / "marks.json", lambda: False, hooks=place.hooks())
        await marks.carry_out(_command("a"))
        (report,) = marks.reports()
        assert report.kind is Consistency.APPLICATION
        assert report.pause_seconds is not None
        assert 0.2 <= report.pause_seconds < 5
        again = Marks(core.log, tmp_path / "marks.json", lambda: False, hooks=place.hooks())
        assert again.reports() == (report,)


async def test_no_mark_claims_what_its_hooks_did_not_do(place: Place, tmp_path: Path) -> None:
    place.put("10-web", '[ "$1" = thaw ]')
    async with agent_core(tmp_path) as core:
        marks = Marks(core.log, tmp_path / "marks.json", lambda: False, hooks=place.hooks())
        await marks.carry_out(_command("a"))
        assert marks.reports() == ()
        assert "10-web" in marks.refusals()[0].message


# --- with the databases that hooks are shipped for ---


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path is short enough for sockets, and open to the databases' own users."""
    made = Path(tempfile.mkdtemp(prefix="replicar-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.needs_root
async def test_the_hook_for_postgresql_makes_a_checkpoint(place: Place, short: Path) -> None:
    shutil.copy(SHIPPED / "postgresql", place.directory)
    with postgresql(short / "data", short / "run") as server:
        (place.directory / "postgresql.conf").write_text(f"PGHOST={server.sockets}\n")
        server.sql("CREATE TABLE kept (n int); INSERT INTO kept SELECT generate_series(1, 10000)")
        before = server.sql("SELECT checkpoint_lsn FROM pg_control_checkpoint()")
        async with place.hooks(30.0).held("a"):
            assert server.sql("SELECT checkpoint_lsn FROM pg_control_checkpoint()") != before


@pytest.mark.needs_root
async def test_the_hook_for_postgresql_says_when_the_server_is_away(place: Place, short: Path) -> None:
    shutil.copy(SHIPPED / "postgresql", place.directory)
    (place.directory / "postgresql.conf").write_text(f"PGHOST={short}\nRUN_AS=\n")
    with pytest.raises(TransientError, match="postgresql did not freeze"):
        async with place.hooks(30.0).held("a"):
            pytest.fail("nothing is held")


@pytest.mark.needs_root
async def test_the_hook_for_mariadb_holds_writers_until_thaw(place: Place, short: Path) -> None:
    shutil.copy(SHIPPED / "mysql", place.directory)
    with mariadb(short / "data", short / "socket") as server:
        (place.directory / "mysql.cnf").write_text(f"[client]\nsocket={server.socket}\n")
        server.sql("CREATE DATABASE shop; CREATE TABLE shop.kept (n int)")
        async with place.hooks(30.0).held("a"):
            writing = asyncio.create_task(asyncio.to_thread(server.sql, "INSERT INTO shop.kept VALUES (1)"))
            await asyncio.sleep(0.5)
            assert not writing.done()
            assert server.sql("SELECT count(*) FROM shop.kept") == "0"
        await asyncio.wait_for(writing, 10)
        assert server.sql("SELECT count(*) FROM shop.kept") == "1"


@pytest.mark.needs_root
async def test_mariadb_is_let_go_by_itself_when_nobody_thaws(place: Place, short: Path) -> None:
    shutil.copy(SHIPPED / "mysql", place.directory)
    with mariadb(short / "data", short / "socket") as server:
        (place.directory / "mysql.cnf").write_text(f"[client]\nsocket={server.socket}\n")
        server.sql("CREATE DATABASE shop; CREATE TABLE shop.kept (n int)")
        place.state.mkdir()
        environment = {"PATH": "/usr/bin:/bin", "REPLICAR_HOOKS_STATE": str(place.state)}
        # An agent that dies right behind this never thaws.
        environment["REPLICAR_TIMEOUT_SECONDS"] = "2"
        process = await asyncio.create_subprocess_exec(place.directory / "mysql", "freeze", env=environment)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await asyncio.wait_for(asyncio.to_thread(server.sql, "INSERT INTO shop.kept VALUES (1)"), 20)
