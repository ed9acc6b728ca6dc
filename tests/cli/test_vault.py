"""What the operator asks the config server, and the settings that say where it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from replicar.control.message import ErrorReport
from replicar.control.messages import MachineTrouble, MarkReport
from tests.cli.conftest import Operator, Stored
from tests.config_server.support import Cast


async def test_status_shows_process_servers_and_machines(operator: Operator, stored: Stored) -> None:
    ended = await operator("status", "--json")
    assert ended.status == 0
    assert [machine["name"] for machine in ended.json["machines"]] == ["db1"]
    assert ended.json["process_servers"][0]["online"] is True
    shown = await operator("status")
    assert "db1" in shown.output
    assert "ps1" in shown.output


async def test_status_names_what_keeps_a_machine_from_storage_and_ends_with_another_status(
    operator: Operator, stored: Stored
) -> None:
    cast = stored.cast
    gone = ErrorReport(part="storage", error="PermanentError", message="the container logs is gone", hint="restore it")
    full = ErrorReport(error="LimitError", message="no room for its log", hint="make room")
    trouble = MachineTrouble(machine_id=cast.machine_id, state="waiting", error=full)
    heartbeat = cast.house.server_heartbeat(errors=[gone], troubles=[trouble])
    await cast.server.process_server_heartbeat(heartbeat)
    lost = ErrorReport(part="sender", error="TransientError", message="ps1 hung up", hint="look at it")
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(errors=[lost]))
    shown = await operator("status")
    assert shown.status == 7
    for words in ("not storing", gone.message, "next step: restore it", full.message, "agent: ps1 hung up"):
        assert words in shown.output.replace("\n", " "), shown.output
    assert shown.output.count(gone.message) == 1
    told = await operator("status", "--json")
    assert told.status == 7
    assert [error["message"] for error in told.json["process_servers"][0]["errors"]] == [gone.message]
    (machine,) = told.json["machines"]
    assert (machine["state"], machine["storing"]) == ("protected", False)
    assert [error["message"] for error in machine["errors"]] == [gone.message, full.message, lost.message]
    listed = await operator("machines")
    assert (listed.status, gone.message in listed.output) == (0, True)
    for arguments in (["machines", "db1"], ["points", "db1"]):
        one = await operator(*arguments)
        assert (one.status, lost.message in one.output) == (0, True), one.output
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    well = await operator("status")
    assert (well.status, "not storing" in well.output) == (0, False)


async def test_who_is_away_stores_nothing_and_is_named(operator: Operator, stored: Stored) -> None:
    cast = stored.cast
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat())
    cast.house.clock.move(seconds=100)
    shown = await operator("status")
    assert shown.status == 7
    assert "the process server ps1 was not heard of for 100 s" in shown.output
    assert "the agent was not heard of for 100 s" in shown.output
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(state="stopped"))
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    cast.house.clock.move(seconds=80)
    assert (await operator("status")).status == 0


async def test_tables_fit_eighty_columns_and_break_no_word(operator: Operator, stored: Stored) -> None:
    operator.environment["COLUMNS"] = "80"
    cast = stored.cast
    disks = [{"index": 0, "name": "root", "size_bytes": 1 << 40, "seed_total_bytes": 1 << 40, "seed_done_bytes": 1}]
    beat = {"disks": disks, "state": "initial-replication", "rpo_seconds": 119.9, "ordered_from": (9, 1)}
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(**beat))
    marks = [MarkReport(name="before-upgrade", sequence=7, time_ns=cast.house.clock.now_ns())]
    await cast.machine.agent_heartbeat(cast.house.machine_heartbeat(marks=marks, **beat))
    words = {
        "status": ("process server", "127.0.0.1:9443", "cache free", "replicating", "119.9 s", "0 %"),
        "machines": ("machine", "state", "initial", "stored", "db1", "ps1", "replicating", "119.9 s"),
        "machines db1": ("initial-replication", "p99 0 ms", "disk root"),
        "points db1": ("before-upgrade", "crash", "sequence", "Any instant can be chosen"),
    }
    for command, expected in words.items():
        shown = (await operator(*command.split())).output
        assert max(map(len, shown.splitlines())) <= 80, shown
        for word in expected:
            assert any(word in line for line in shown.splitlines()), (word, shown)


async def test_a_machine_is_protected_and_shows_its_process_server(operator: Operator, cast: Cast) -> None:
    nobody = await operator("protect", "db1")
    assert nobody.status != 0  # no process server has reported yet
    assert "next step:" in nobody.errors
    await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
    for _ in range(2):
        ended = await operator("protect", "db1", "--json")
        assert ended.status == 0, ended.output
        assert ended.json["process_server"] == "ps1"
    listed = await operator("machines", "--json")
    assert listed.json["machines"][0]["process_server"] == "ps1"
    assert "ps1" in (await operator("machines")).output


async def test_a_point_is_tagged_and_then_listed(operator: Operator, cast: Cast) -> None:
    await cast.protect()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(cast.make_marks(100))
        tagged = tasks.create_task(operator("tag", "db1", "before-upgrade", "--json"))
    assert tagged.result().status == 0, tagged.result().output
    assert tagged.result().json["sequence"] == 100
    assert tagged.result().json["stored"] is False
    await cast.report_stored(100)
    listed = await operator("points", "db1", "--json")
    assert [(point["name"], point["stored"]) for point in listed.json["points"]] == [("before-upgrade", True)]
    shown = await operator("points", "db1")
    assert "before-upgrade" in shown.output


async def test_tagging_waits_until_the_point_is_stored(operator: Operator, cast: Cast) -> None:
    await cast.protect()
    async with asyncio.TaskGroup() as tasks:
        tagged = tasks.create_task(operator("tag", "db1", "safe", "--wait-stored", "--json"))
        await cast.make_marks(100)
        await asyncio.sleep(0.3)
        assert not tagged.done()
        await cast.report_stored(100)
    assert tagged.result().json["stored"] is True


async def test_tagging_gives_up_in_time_and_says_what_it_waits_for(operator: Operator, cast: Cast) -> None:
    await cast.protect()
    ended = await operator("tag", "db1", "never", "--timeout", "1", "--json")
    assert ended.status == 75
    assert ended.json["command_id"]
    assert ended.json["hint"]


async def test_without_settings_the_error_says_what_to_set(tmp_path: Path, operator: Operator) -> None:
    nowhere = Operator(tmp_path / "missing.toml", operator.environment)
    ended = await nowhere("status", "--json")
    assert ended.status == 1
    assert "missing.toml" in ended.json["message"]
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    ended = await Operator(empty, operator.environment)("status", "--json")
    assert "REPLICAR_IDENTITY" in ended.json["hint"]
    identity_only = tmp_path / "identity.toml"
    identity_only.write_text("\n".join(operator.settings.read_text().splitlines()[:2]))
    ended = await Operator(identity_only, operator.environment)("verify", "db1", "--json")
    assert "[storage]" in ended.json["hint"]


async def test_settings_that_can_not_be_honoured_are_refused(operator: Operator) -> None:
    for text, said in (
        ("identitty = 'x'", "identitty"),
        ("identity = ", "no TOML"),
        ("[storage]\ncontainer = 'logs'", "no credential"),
        ("[storage]\nendpoint = 'https://a.b'\ncontainer = 'logs'\naccount_kee = 'x'", "account_kee"),
    ):
        operator.settings.write_text(text + "\n")
        ended = await operator("status", "--json")
        assert ended.status == 1
        assert said in ended.json["message"]


async def test_the_environment_beats_the_file(operator: Operator, cast: Cast) -> None:
    operator.environment["REPLICAR_CONFIG_SERVER"] = "127.0.0.1:1"
    ended = await operator("machines", "--json")
    assert ended.status == 75
    assert "127.0.0.1:1" in ended.json["message"]


async def test_help_names_every_command(operator: Operator) -> None:
    ended = await operator("--help")
    for name in ("status", "machines", "protect", "points", "tag", "recover", "verify", "demo"):
        assert name in ended.output
    assert "[storage]" in ended.output
    assert (await operator("--version")).output.startswith("replicar ")
