"""Machines change their process server: by hand, after a death, and not otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from config_server.machines import LIVE_SECONDS
from config_server.takeover import Takeover
from replicar.control.client import ControlClient
from replicar.control.identity import Role
from replicar.control.messages import MachineState
from replicar.errors import PermanentError
from tests.config_server.support import Cast

AFTER_SECONDS = 900.0


@pytest.fixture
async def second(cast: Cast, tmp_path: Path) -> AsyncIterator[ControlClient]:
    """Another process server, ps2, alive; db1 is protected through ps1."""
    await cast.protect()
    identity = await cast.house.enrol(tmp_path / "ps2", "ps2", Role.PROCESS_SERVER)
    async with cast.house.client(identity) as client:
        await client.process_server_heartbeat(cast.house.server_heartbeat(port=9444))
        yield client


async def served(cast: Cast, server: ControlClient) -> list[tuple[str, int]]:
    instructions = await server.process_server_heartbeat(
        cast.house.server_heartbeat(port=9444 if server is not cast.server else 9443)
    )
    return [(each.name, each.epoch) for each in instructions.assignments]


async def test_a_moved_machine_has_a_new_epoch_and_its_new_server_knows_how_far_it_is_stored(
    cast: Cast, second: ControlClient
) -> None:
    await cast.report_stored(70, stored_segment=7, stored_digest="ab" * 32)
    moved = await cast.operator.move("db1", "ps2")
    assert (moved.process_server, moved.epoch) == ("ps2", 2)
    assert await served(cast, cast.server) == []
    (assignment,) = (await second.process_server_heartbeat(cast.house.server_heartbeat(port=9444))).assignments
    assert (assignment.epoch, assignment.stored_segment, assignment.stored_sequence) == (2, 7, 70)
    told = (await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())).assignment
    assert told is not None
    assert (told.process_server_id, told.port, told.epoch) == (second.identity.id, 9444, 2)
    # What the former server says of it counts no more.
    await cast.report_stored(90, stored_segment=9, stored_digest="cd" * 32)
    assert (await cast.operator.machine("db1")).stored_sequence == 70


async def test_moving_to_where_it_is_changes_nothing(cast: Cast, second: ControlClient) -> None:
    await cast.operator.move("db1", "ps2")
    assert (await cast.operator.move("db1", "ps2")).epoch == 2
    assert (await cast.operator.move("db1")).process_server == "ps1"
    assert (await cast.operator.machine("db1")).epoch == 3


async def test_nobody_is_moved_to_a_server_that_is_unknown_or_dead_or_when_there_is_no_other(
    cast: Cast, second: ControlClient
) -> None:
    with pytest.raises(PermanentError, match="no process server named 'ps9'"):
        await cast.operator.move("db1", "ps9")
    cast.house.clock.move(seconds=LIVE_SECONDS + 5)
    with pytest.raises(PermanentError, match="ps2 was not heard of"):
        await cast.operator.move("db1", "ps2")
    await served(cast, cast.server)
    with pytest.raises(PermanentError, match="no other process server is alive"):
        await cast.operator.move("db1")
    assert (await cast.operator.machine("db1")).epoch == 1


async def test_a_machine_protected_again_after_its_removal_is_above_its_former_epoch(
    cast: Cast, second: ControlClient
) -> None:
    """Else its writer would be fenced by its own past."""
    await cast.operator.move("db1", "ps2")
    await cast.operator.remove("db1")
    await cast.house.enrol(cast.house.directory.parent / "again", "db1")
    assert (await cast.operator.protect("db1")).epoch == 3


def takeover(cast: Cast) -> Takeover:
    server = cast.house.server
    return Takeover(server.registry, server.bells, cast.house.clock, cast.server.identity.id, AFTER_SECONDS)


async def test_a_dead_servers_machine_is_taken_over_once_its_agent_reaches_nobody(
    cast: Cast, second: ControlClient
) -> None:
    looker = takeover(cast)
    cut_off = {"state": str(MachineState.DISCONNECTED)}
    cast.house.clock.move(seconds=AFTER_SECONDS - 10)
    await served(cast, second)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(**cut_off))
    assert not await looker.look(), "it may come back yet"
    cast.house.clock.move(seconds=20)
    await served(cast, second)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(**cut_off))
    assert [move.server for move in await looker.look()] == [second.identity.id]
    assert (await cast.operator.machine("db1")).process_server == "ps2"
    assert not await looker.look()
    audited = await cast.house.server.registry.run(
        lambda c: c.execute("SELECT subject FROM audit WHERE action = 'takeover'").fetchall()
    )
    assert [row["subject"] for row in audited] == ["machine db1"]


@pytest.mark.parametrize("why", ["its agent streams", "its agent is silent", "nobody else is alive", "we just began"])
async def test_a_silent_servers_machine_stays_where_it_is_while(cast: Cast, second: ControlClient, why: str) -> None:
    looker = takeover(cast)
    cast.house.clock.move(seconds=AFTER_SECONDS + 20)
    if why != "nobody else is alive":
        await served(cast, second)
    if why != "its agent is silent":
        state = MachineState.PROTECTED if why == "its agent streams" else MachineState.DISCONNECTED
        await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state=str(state)))
    if why == "we just began":
        looker = takeover(cast)
    assert not await looker.look()
    assert (await cast.operator.machine("db1")).process_server == "ps1"


async def test_a_clock_that_was_ahead_at_the_start_does_not_keep_a_dead_servers_machines_where_they_are(
    cast: Cast, second: ControlClient
) -> None:
    cast.house.clock.move(days=30)
    looker, rounds = takeover(cast), cast.house.server.rounds()
    await served(cast, cast.server)
    await rounds.go()
    cast.house.clock.move(days=-30)
    await rounds.go()
    assert not await looker.look()
    cast.house.clock.move(seconds=AFTER_SECONDS + 20)
    await served(cast, second)
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state=str(MachineState.DISCONNECTED)))
    assert [move.server for move in await looker.look()] == [second.identity.id]


CRITICAL = {"name": "cache free", "level": "critical", "value": 3.0, "unit": "percent", "cause": "full", "hint": "mend"}


async def test_a_server_in_critical_health_takes_no_machine_and_status_says_why(
    cast: Cast, second: ControlClient
) -> None:
    await second.process_server_heartbeat(cast.house.server_heartbeat(port=9444, signals=(CRITICAL,)))
    with pytest.raises(PermanentError, match="ps2 is in critical health"):
        await cast.operator.move("db1", "ps2")
    with pytest.raises(PermanentError, match="no other process server is alive"):
        await cast.operator.move("db1")
    servers = {each.name: each for each in (await cast.operator.status()).process_servers}
    assert (servers["ps2"].health, servers["ps1"].health) == ("critical", "healthy")
    assert [signal.cause for signal in servers["ps2"].signals] == ["full"]
    await served(cast, second)
    assert (await cast.operator.move("db1", "ps2")).process_server == "ps2"


async def test_a_server_with_a_warning_is_the_last_to_be_chosen(cast: Cast, second: ControlClient) -> None:
    warning = {**CRITICAL, "level": "warning"}
    await second.process_server_heartbeat(cast.house.server_heartbeat(port=9444, signals=(warning,)))
    await cast.house.enrol(cast.house.directory.parent / "db2", "db2")
    assert (await cast.operator.protect("db2")).process_server == "ps1", "though ps2 has fewer machines"


async def test_a_silent_server_is_critical_after_fifteen_minutes_and_what_is_in_transit_is_told(
    cast: Cast, second: ControlClient
) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(unstored_bytes=5000))
    await cast.report_stored(1, pending_bytes=2000)
    machine = await cast.operator.machine("db1")
    assert (machine.source_bytes, machine.pending_bytes) == (5000, 2000)
    health = []
    for seconds in (LIVE_SECONDS + 5, AFTER_SECONDS):
        cast.house.clock.move(seconds=seconds)
        (server, _) = (await cast.operator.status()).process_servers
        health.append((server.health, server.signals[0].code))
    assert health == [("warning", "806"), ("critical", "806")]
