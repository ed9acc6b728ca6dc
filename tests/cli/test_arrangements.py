"""Policies, target settings and alerts as commands."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Ended, Operator, operator_settings
from tests.config_server.support import Cast


@pytest.fixture
def operator(cast: Cast, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return operator_settings(cast, tmp_path_factory.mktemp("operator"))


async def test_policies_are_set_by_what_is_named_and_assigned(protected: Cast, operator: Operator) -> None:
    async def done(*words: str) -> Ended:
        ended = await operator(*words)
        assert ended.status == 0, ended.errors
        return ended

    assert "default" in (await done("policy", "list")).output
    made = await done(
        "policy", "set", "gold", "--rpo-threshold", "60", "--every-point", "24", "--tier", "7:3600", "--tier",
        "30:86400", "--crash-points", "300", "--drill-days", "30", "--replica", "warm", "--json",
    )  # fmt: skip
    assert made.json["version"] == 1
    assert [tier["every_seconds"] for tier in made.json["tiers"]] == [3600, 86_400]
    again = (await done("policy", "set", "gold", "--crash-points", "-1", "--json")).json
    assert (again["version"], again["crash_point_seconds"], again["drill_days"]) == (2, None, 30)
    shown = (await done("policy", "assign", "db1", "gold")).output
    for words in ("gold, version 2", "every 30 days", "up to 30 days", "as the agent's settings say"):
        assert words in shown
    assert (await protected.operator.machine_policy("db1")).name == "gold"
    assert (await done("policy", "show", "gold", "--json")).json == again
    none = await done("policy", "set", "gold", "--tier", "none", "--json")
    assert none.json["tiers"] == []
    assert (await done("protect", "db1", "--policy", "default")).status == 0
    assert (await protected.operator.machine_policy("db1")).name == "default"


async def test_target_settings_say_what_is_missing(protected: Cast, operator: Operator) -> None:
    shown = await operator("target", "set", "db1", "--compute", "azure", "--size", "Standard_D2s_v5", "--json")
    assert shown.status == 0, shown.errors
    assert shown.json["missing"] == [
        "storage_account", "resource_group", "location", "network", "subnet", "disk_kind"
    ]  # fmt: skip
    assert "missing: storage_account" in (await operator("target", "show", "db1")).output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("policy", "set", "gold", "--tier", "weekly"), "no tier"),
        (("policy", "set", "gold", "--rpo-threshold", "0"), "rpo_threshold_seconds can't be that"),
        (("policy", "set", "gold", "--tier", "1:7200", "--tier", "2:3600"), "contradicts itself"),
        (("policy", "set", "no name"), "name can't be that"),
        (("policy", "show", "gold"), "no policy named"),
        (("target", "set", "db1", "--disk-kind", "floppy"), "disk_kind can't be that"),
        (("target", "set", "db1", "--storage-account", "Not One"), "storage_account can't be that"),
    ],
)
async def test_what_can_not_be_meant_is_refused(
    protected: Cast, operator: Operator, words: tuple[str, ...], said: str
) -> None:
    ended = await operator(*words)
    assert ended.status == 1
    assert said in " ".join(ended.errors.split())
    assert "next step" in ended.errors


async def test_alerts_are_listed_while_they_last(protected: Cast, operator: Operator) -> None:
    house = protected.house
    assert "no alerts" in (await operator("alerts")).output
    await protected.machine.agent_heartbeat(house.machine_heartbeat(rpo_seconds=5000.0))
    await house.server.rounds().go()
    assert "threshold is 3600 s" in (await operator("alerts")).output
    await protected.machine.agent_heartbeat(house.machine_heartbeat())
    await house.server.rounds().go()
    assert (await operator("alerts", "--json")).json == {"alerts": []}
    (alert,) = (await operator("alerts", "--all", "--json")).json["alerts"]
    assert alert["cleared_ns"] > alert["raised_ns"]
