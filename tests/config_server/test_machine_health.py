"""What the config server makes of a machine's reports, and of their absence."""

from __future__ import annotations

import pytest

from config_server.machines import LIVE_SECONDS
from replicar.control.messages import MachineState, MachineSummary
from replicar.signals import Level
from tests.config_server.support import Cast


@pytest.fixture(autouse=True)
async def protected_machine(cast: Cast) -> None:
    await cast.protect()


def unwell(machine: MachineSummary) -> dict[str, tuple[str, str]]:
    return {each.name: (each.level, each.code) for each in machine.signals if each.level != Level.HEALTHY}


async def test_a_machine_that_was_never_heard_of_has_no_health_yet(cast: Cast) -> None:
    machine = await cast.operator.machine("db1")
    assert (machine.signals, machine.health) == ((), Level.HEALTHY)


async def test_an_agent_that_falls_silent_is_a_warning_and_then_critical_and_its_rpo_grows(cast: Cast) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state=MachineState.PROTECTED, rpo_seconds=1.0))
    assert not unwell(await cast.operator.machine("db1"))
    cast.house.clock.move(seconds=LIVE_SECONDS + 1)
    assert unwell(await cast.operator.machine("db1")) == {"heartbeat": ("warning", "78174")}
    cast.house.clock.move(seconds=3600)
    machine = await cast.operator.machine("db1")
    assert unwell(machine) == {"heartbeat": ("critical", "78174"), "RPO": ("warning", "")}
    assert machine.health == Level.CRITICAL


async def test_an_agent_that_said_goodbye_is_not_missing(cast: Cast) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state=MachineState.STOPPED))
    cast.house.clock.move(seconds=LIVE_SECONDS + 1)
    assert not unwell(await cast.operator.machine("db1"))


async def test_an_agent_that_reaches_no_process_server_says_why_in_its_signal(cast: Cast) -> None:
    error = {"part": "sender", "error": "TransientError", "message": "nobody answers at 10.0.0.5:9443"}
    report = cast.house.machine_heartbeat(state=MachineState.DISCONNECTED, errors=(error,), rpo_seconds=20.0)
    await cast.machine.agent_heartbeat(report)
    machine = await cast.operator.machine("db1")
    assert unwell(machine) == {"process server": ("warning", "78186")}
    [signal] = [each for each in machine.signals if each.name == "process server"]
    assert "nobody answers at 10.0.0.5:9443" in signal.cause
    assert "9443" in signal.hint


async def test_the_rpo_as_the_process_server_measures_it_stands_beside_the_agents(cast: Cast) -> None:
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(rpo_seconds=4.0))
    assert (await cast.operator.machine("db1")).server_rpo_seconds is None
    await cast.report_stored(1, rpo_seconds=2.5)
    machine = await cast.operator.machine("db1")
    assert (machine.rpo_seconds, machine.server_rpo_seconds) == (4.0, 2.5)
