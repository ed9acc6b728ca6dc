"""The life of a machine through the API: heartbeats, protection, keys, removal, restart."""

from __future__ import annotations

import asyncio
import base64
import sqlite3
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from config_server.machines import LIVE_SECONDS
from replicar.control.identity import Role
from replicar.control.messages import (
    AgentAssignment,
    DiskReport,
    MachineProgress,
    MachineSummary,
    MarkReport,
)
from replicar.errors import CorruptionError, PermanentError, TransientError
from tests.config_server.support import Cast, SetClock, running


async def test_protecting_a_machine_tells_both_sides_where_the_other_is(cast: Cast) -> None:
    await cast.protect()
    instructions = await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    server_id = cast.server.identity.id
    assert instructions.assignment == AgentAssignment(epoch=1, process_server_id=server_id, host="127.0.0.1", port=9443)
    (assignment,) = (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).assignments
    assert (assignment.machine_id, assignment.name, assignment.epoch) == (cast.machine_id, "db1", 1)
    assert len(assignment.data_key_bytes()) == 32
    assert assignment.data_key.get_secret_value() not in repr(assignment)
    key = await cast.operator.key("db1")
    assert (key.data_key_bytes(), key.key_id) == (assignment.data_key_bytes(), assignment.key_id)


async def test_protecting_twice_changes_nothing(cast: Cast) -> None:
    await cast.protect()
    key = await cast.operator.key("db1")
    summary = await cast.operator.protect("db1")
    assert (summary.epoch, summary.process_server) == (1, "ps1")
    assert await cast.operator.key("db1") == key


async def test_the_least_loaded_live_process_server_is_chosen(cast: Cast, tmp_path: Path) -> None:
    house = cast.house
    await cast.protect()
    other = await house.enrol(tmp_path / "ps2", "ps2", Role.PROCESS_SERVER)
    for name in ("db2", "db3", "db4"):
        await house.enrol(tmp_path / name, name)
    async with house.client(other) as second:
        await second.process_server_heartbeat(house.server_heartbeat(port=9444))
        assert (await cast.operator.protect("db2")).process_server == "ps2"
        house.clock.move(seconds=LIVE_SECONDS + 5)
        with pytest.raises(PermanentError, match="no process server is alive") as refusal:
            await cast.operator.protect("db3")
        assert "process-server run" in refusal.value.hint
        await second.process_server_heartbeat(house.server_heartbeat(port=9444))
        assert [(await cast.operator.protect(name)).process_server for name in ("db3", "db4")] == ["ps2", "ps2"]


async def test_a_data_key_is_kept_wrapped_only(cast: Cast) -> None:
    await cast.protect()
    key = (await cast.operator.key("db1")).data_key_bytes()
    (server,) = (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).assignments
    wrapped = base64.b64decode(server.wrapped_key)
    kept = b"".join(path.read_bytes() for path in cast.house.directory.glob("registry.sqlite*"))
    assert wrapped in kept
    assert key not in kept
    assert cast.house.server.vault.unwrap(wrapped) == key


async def test_a_key_wrapped_by_another_vault_is_corruption_and_says_so(cast: Cast) -> None:
    await cast.protect()
    await cast.house.server.registry.run(lambda c: c.execute("UPDATE machines SET wrapped_key = zeroblob(40)"))
    with pytest.raises(CorruptionError, match="not wrapped by this vault's key"):
        await cast.operator.key("db1")


async def test_who_asked_for_a_key_is_kept(cast: Cast) -> None:
    await cast.protect()
    await cast.operator.key("db1")
    rows = await cast.house.server.registry.run(
        lambda c: c.execute("SELECT party_id, subject FROM audit WHERE action = 'key'").fetchall()
    )
    assert [tuple(row) for row in rows] == [(str(cast.operator.identity.id), "machine db1")]


async def test_a_poll_is_held_until_the_assignment_changes(cast: Cast) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(wait_seconds=20))  # the first is answered at once
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(cast.machine.agent_heartbeat(cast.house.machine_heartbeat(wait_seconds=20)))
        await asyncio.sleep(0.3)
        assert not poll.done()
        begun = time.monotonic()
        await cast.protect()
    assert poll.result().assignment is not None
    assert time.monotonic() - begun < 5


async def test_a_poll_without_news_ends_when_it_said(cast: Cast) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    begun = time.monotonic()
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(wait_seconds=0.5))
    assert 0.45 < time.monotonic() - begun < 5


async def test_a_process_server_that_moves_is_found_again(cast: Cast) -> None:
    await cast.protect()
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(cast.machine.agent_heartbeat(cast.house.machine_heartbeat(wait_seconds=20)))
        await asyncio.sleep(0.2)
        await cast.server.process_server_heartbeat(cast.house.server_heartbeat(host="10.9.8.7", port=1234))
    assignment = poll.result().assignment
    assert assignment is not None
    assert (assignment.host, assignment.port) == ("10.9.8.7", 1234)


async def test_what_is_reported_is_what_the_operator_sees(cast: Cast) -> None:
    await cast.protect()
    disk = DiskReport(index=0, name="vda", size_bytes=10**9, seed_total_bytes=500, seed_done_bytes=100)
    await cast.machine.agent_heartbeat(
        cast.house.machine_heartbeat(
            state="initial-replication", disks=[disk], captured_sequence=9, rpo_p50_seconds=0.5
        )
    )
    await cast.report_stored(5, stored_segment=3, stored_digest="ab" * 32, received_sequence=8, bytes_stored=77)
    status = await cast.operator.status()
    (machine,), (server,) = status.machines, status.process_servers
    assert (machine.state, machine.online, machine.disks, machine.captured_sequence) == (
        "initial-replication",
        True,
        (disk,),
        9,
    )
    assert (machine.seed_done_bytes, machine.seed_total_bytes, machine.rpo_p50_seconds) == (100, 500, 0.5)
    assert (machine.stored_sequence, machine.stored_segment, machine.bytes_stored) == (5, 3, 77)
    assert (server.name, server.online, server.machines, server.port) == ("ps1", True, 1, 9443)
    key = await cast.operator.key("db1")
    assert (key.stored_segment, key.stored_digest) == (3, "ab" * 32)
    cast.house.clock.move(seconds=LIVE_SECONDS + 5)
    assert not (await cast.operator.machine("db1")).online


async def test_bytes_are_counted_on_over_restarts_and_none_of_them_twice(cast: Cast) -> None:
    await cast.protect()

    async def counted(since: str, received: int, stored: int) -> tuple[int, int]:
        await cast.report_stored(1, counted_since=since, bytes_received=received, bytes_stored=stored)
        machine = await cast.operator.machine("db1")
        return machine.bytes_received, machine.bytes_stored

    assert await counted("one", 100, 40) == (100, 40)
    assert await counted("one", 150, 60) == (150, 60)
    assert await counted("one", 150, 60) == (150, 60), "a heartbeat sent again"
    assert await counted("two", 0, 0) == (150, 60), "killed, and nothing came yet"
    assert await counted("two", 30, 10) == (180, 70)
    assert await counted("three", 500, 200) == (680, 270), "killed, and past its old count before it could say so"
    assert await counted("three", 400, 150) == (680, 270), "a heartbeat that another one overtook"
    assert await counted("three", 501, 200) == (681, 270)
    # An older process server doesn't name its beginning; there, a lower number is one.
    assert await counted("", 10, 10) == (691, 280)
    assert await counted("", 15, 10) == (696, 280)
    assert await counted("", 5, 5) == (701, 285)
    assert await counted("four", 2**63 - 1, 2**63 - 1) == (2**63 - 1, 2**63 - 1)


async def test_an_assignment_says_what_must_be_in_storage(cast: Cast, tmp_path: Path) -> None:
    await cast.protect()

    async def said(known: str = "", wait_seconds: float = 0) -> tuple[int | None, int, str]:
        heartbeat = cast.house.server_heartbeat(known_version=known, wait_seconds=wait_seconds)
        (assignment,) = (await cast.server.process_server_heartbeat(heartbeat)).assignments
        return assignment.stored_segment, assignment.stored_sequence, assignment.stored_digest

    assert await said() == (None, 0, "")
    await cast.report_stored(70, stored_segment=9, stored_digest="ab" * 32)
    assert await said() == (9, 70, "ab" * 32)
    await cast.report_stored(60, stored_segment=8, stored_digest="cd" * 32)
    await cast.report_stored(70, stored_segment=9, stored_digest="ef" * 32)
    assert await said() == (9, 70, "ab" * 32), "neither cut short nor replaced"

    # Progress is no news: a poll is held although the bound has risen since.
    version = (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).version
    await cast.report_stored(90, stored_segment=10, stored_digest="ab" * 32)
    begun = time.monotonic()
    assert await said(version, 0.5) == (10, 90, "ab" * 32)
    assert time.monotonic() - begun >= 0.4

    # Enrolled again, perhaps because its log was lost: what the older incarnation stored is no condition any more.
    await cast.house.enrol(tmp_path / "again", "db1")
    assert await said() == (None, 0, "")
    await cast.report_stored((1 << 48) + 5, stored_segment=3, stored_digest="12" * 32)
    assert await said() == (3, (1 << 48) + 5, "12" * 32)


async def test_a_process_server_can_not_speak_for_a_machine_that_is_not_its_own(cast: Cast, tmp_path: Path) -> None:
    await cast.protect()
    stranger = await cast.house.enrol(tmp_path / "ps2", "ps2", Role.PROCESS_SERVER)
    async with cast.house.client(stranger) as client:
        progress = MachineProgress(machine_id=cast.machine_id, stored_sequence=999)
        reply = await client.process_server_heartbeat(cast.house.server_heartbeat(progress, port=9444))
    assert reply.assignments == ()
    assert (await cast.operator.machine("db1")).stored_sequence == 0


async def test_a_machine_that_enrols_again_gets_its_process_server_told(cast: Cast, tmp_path: Path) -> None:
    await cast.protect()
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(cast.server.process_server_heartbeat(cast.house.server_heartbeat(wait_seconds=20)))
        await asyncio.sleep(0.2)
        await cast.house.enrol(tmp_path / "db1", "db1")
    (assignment,) = poll.result().assignments
    assert (assignment.machine_id, assignment.incarnation, assignment.epoch) == (cast.machine_id, 1, 1)


@pytest.mark.parametrize("off_seconds", [-310, 310])
async def test_a_heartbeat_with_a_clock_that_is_off_is_refused(cast: Cast, off_seconds: int) -> None:
    time_ns = cast.house.clock.now_ns() + off_seconds * 10**9
    with pytest.raises(PermanentError, match="the clock of machine db1 is 5 min") as refusal:
        await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(time_ns=time_ns))
    assert refusal.value.fields["clock_off_seconds"] == pytest.approx(off_seconds, abs=3)
    with pytest.raises(PermanentError, match="the clock of process server ps1"):
        await cast.server.process_server_heartbeat(cast.house.server_heartbeat(time_ns=time_ns))


async def test_an_unknown_machine_is_named_with_the_next_step(cast: Cast) -> None:
    ways = (cast.operator.machine, cast.operator.protect, cast.operator.points, cast.operator.key, cast.operator.remove)
    for way in ways:
        with pytest.raises(PermanentError, match=r"no machine named 'nosuch/\.\./one'") as refusal:
            await way("nosuch/../one")
        assert refusal.value.fields["status"] == 404
        assert "replicar machines" in refusal.value.hint


async def test_a_machine_that_the_registry_forgot_is_told_to_enrol_again(cast: Cast) -> None:
    def forget(connection: sqlite3.Connection) -> None:
        for table, column in (("machines", "id"), ("certificates", "party_id"), ("parties", "id")):
            connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (str(cast.machine_id),))  # noqa: S608

    await cast.house.server.registry.run(forget)
    with pytest.raises(PermanentError, match=str(cast.machine_id)) as refusal:
        await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    assert refusal.value.fields["status"] == 404


async def test_a_machine_that_was_never_protected_has_no_key_and_takes_no_marks(cast: Cast) -> None:
    for attempt in (cast.operator.key("db1"), cast.operator.mark("db1", "m")):
        with pytest.raises(PermanentError, match="machine db1 is not protected") as refusal:
            await attempt
        assert "replicar protect db1" in refusal.value.hint


async def test_a_removed_machine_is_refused_but_what_it_stored_can_be_recovered(cast: Cast, tmp_path: Path) -> None:
    await cast.protect()
    await cast.report_stored(5)
    key = await cast.operator.key("db1")
    assert (await cast.operator.remove("db1")).state == "removed"
    with pytest.raises(PermanentError, match="was removed from the vault") as refusal:
        await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    assert refusal.value.fields["status"] == 403
    assert (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).assignments == ()
    assert await cast.operator.machines() == ()
    assert await cast.operator.key("db1") == key
    with pytest.raises(PermanentError, match="was removed"):
        await cast.operator.protect("db1")
    back = await cast.house.enrol(tmp_path / "db1", "db1")
    assert back.incarnation == 1
    assert (await cast.operator.protect("db1")).id == cast.machine_id


async def test_every_role_keeps_to_its_own_routes(cast: Cast) -> None:
    for wrong in (
        cast.machine.key("db1"),
        cast.server.key("db1"),
        cast.server.agent_heartbeat(cast.house.machine_heartbeat()),
        cast.machine.process_server_heartbeat(cast.house.server_heartbeat()),
        cast.operator.agent_heartbeat(cast.house.machine_heartbeat()),
        cast.machine.protect("db1"),
    ):
        with pytest.raises(PermanentError, match="may not") as refusal:
            await wrong
        assert refusal.value.fields["status"] == 403


def _timeless(summary: MachineSummary) -> MachineSummary:
    """Without what grows while nobody reports, which a busy machine shows."""
    return summary.model_copy(update={"signals": tuple((signal.name, signal.level) for signal in summary.signals)})


async def test_the_registry_survives_a_restart(vault_directory: Path, clock: SetClock, tmp_path: Path) -> None:
    async with running(vault_directory, clock) as house:
        identity = await house.enrol(tmp_path / "db1", "db1")
        server = await house.enrol(tmp_path / "ps1", "ps1", Role.PROCESS_SERVER)
        async with house.operator() as operator, house.client(identity) as machine, house.client(server) as client:
            await client.process_server_heartbeat(house.server_heartbeat())
            await operator.protect("db1")
            marks = [MarkReport(name="m", sequence=3, time_ns=4)]
            before = await machine.agent_heartbeat(house.machine_heartbeat(marks=marks))
            found = await operator.machine("db1")
            seen = (await operator.points("db1"), await operator.key("db1"), _timeless(found))
    async with (
        running(vault_directory, clock) as house,
        house.operator() as operator,
        house.client(identity) as machine,
    ):
        found = await operator.machine("db1")
        assert (await operator.points("db1"), await operator.key("db1"), _timeless(found)) == seen
        assert await machine.agent_heartbeat(house.machine_heartbeat()) == before


async def test_a_server_that_stops_lets_go_of_the_polls_it_holds(vault_directory: Path, tmp_path: Path) -> None:
    clock = SetClock()
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(running(vault_directory, clock))
        client = await stack.enter_async_context(house.client(await house.enrol(tmp_path / "db1", "db1")))
        await client.agent_heartbeat(house.machine_heartbeat())
        poll = asyncio.create_task(client.agent_heartbeat(house.machine_heartbeat(wait_seconds=30)))
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        await house.server.__aexit__(None, None, None)
        assert (await poll).assignment is None
        assert time.monotonic() - begun < 4
        with pytest.raises(TransientError, match=f"can't reach the config server at {house.address}"):
            await client.agent_heartbeat(house.machine_heartbeat())


async def test_a_poll_whose_caller_left_leaves_no_listener_behind(cast: Cast) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    poll = asyncio.create_task(cast.machine.agent_heartbeat(cast.house.machine_heartbeat(wait_seconds=30)))
    await asyncio.sleep(0.3)
    assert cast.house.server.bells.listening == 1
    poll.cancel()
    async with asyncio.timeout(5):
        while cast.house.server.bells.listening:
            await asyncio.sleep(0.05)
