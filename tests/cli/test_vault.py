"""What the operator asks the config server, and the settings that say where it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

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
