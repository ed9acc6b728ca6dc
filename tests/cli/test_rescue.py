"""`replicar rescue`: a container, the vault's key and nothing else; and verification by who may only read."""

from __future__ import annotations

import datetime
import os
import uuid
from pathlib import Path

import pytest
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from replicar.control.files import write_file
from simulator.azurite import Azurite
from tests.cli.conftest import Operator, Stored
from tests.cli.test_recover import disk, flip


@pytest.fixture
def bereft(operator: Operator, stored: Stored, tmp_path: Path) -> Operator:
    """An operator whose settings know of a storage account only, and of the key in `tmp_path`."""
    lines = operator.settings.read_text().splitlines(keepends=True)
    operator.settings.write_text("".join(lines[lines.index("[storage]\n") :]))
    write_file(tmp_path / "vault.key", (stored.cast.house.directory / "vault.key").read_bytes())
    return operator


async def test_it_lists_machines_then_points_and_recovers(bereft: Operator, stored: Stored, tmp_path: Path) -> None:
    key, machine = ("--vault-key-file", tmp_path / "vault.key"), stored.builder.machine_id
    listed = (await bereft("rescue", *key, "--json")).json["machines"]
    assert [(item["machine_id"], item["opens"]) for item in listed] == [(str(machine), True)]
    shown = (await bereft("rescue", machine, *key, "--json")).json
    assert [item["name"] for item in shown["disks"]] == ["disk0", "disk1"]
    assert {point["name"]: point["sequence"] for point in shown["points"]}.items() <= stored.points.items()
    assert len(shown["points"]) == 8
    target = ("--all", "--qcow2", tmp_path / "{disk}.qcow2")
    ended = await bereft("rescue", machine, *key, "--point", "point-3", *target, "--json")
    assert ended.status == 0, ended.output
    path = tmp_path / "disk0.raw"
    ended = await bereft("rescue", machine, *key, "--point", "point-3", "--disk", "disk0", "--raw", path)
    assert ended.status == 0, ended.errors
    assert path.read_bytes() == disk(stored, "point-3")


async def test_what_it_needs_is_said(bereft: Operator, stored: Stored, tmp_path: Path) -> None:
    machine = stored.builder.machine_id
    key = ("--vault-key-file", tmp_path / "vault.key")
    write_file(tmp_path / "other.key", os.urandom(32))
    for words, said in (
        ((*key, "--latest", "--raw", "x"), "say which machine to rescue"),
        ((machine, *key, "--latest"), "say where to recover to"),
        ((machine, *key, "--raw", "x"), "say which point"),
        ((machine, *key, "--point", "point-99", "--raw", "x"), "there is no point named"),
        ((uuid.UUID(int=1), *key), "nothing in storage of machine"),
        ((machine, "--vault-key-file", tmp_path / "other.key"), "does not open the data key"),
        ((machine, "--vault-key-file", tmp_path / "no.key"), "no.key"),
    ):
        ended = await bereft("rescue", *words, "--json")
        assert ended.status == 1, (words, ended.output)
        assert said in ended.json["message"]
        assert ended.json["hint"]
    other = await bereft("rescue", "--vault-key-file", tmp_path / "other.key", "--json")
    assert [item["opens"] for item in other.json["machines"]] == [False]


async def test_who_may_only_read_and_list_can_verify_a_share_or_all(
    operator: Operator, stored: Stored, azurite: Azurite, tmp_path: Path
) -> None:
    signature = generate_container_sas(
        azurite.account_name,
        stored.target.container,
        account_key=azurite.account_key,
        permission=ContainerSasPermissions(read=True, list=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    write_file(tmp_path / "signature", signature.encode())
    text = operator.settings.read_text().replace(
        f'account_key_file = "{tmp_path / "account.key"}"',
        f'shared_access_signature_file = "{tmp_path / "signature"}"',
    )
    lines = text.splitlines(keepends=True)
    operator.settings.write_text("".join(line for line in lines if not line.startswith("account_name")))
    whole = await operator("verify", "db1", "--bytes-per-second", 10 << 20, "--json")
    assert (whole.status, whole.json["opened"]) == (0, 8), whole.output
    opened = 0
    for turn in range(4):
        part = await operator("verify", "db1", "--share", "25%", "--turn", turn, "--json")
        assert (part.status, part.json["parts"], part.json["turn"]) == (0, 4, turn), part.output
        opened += part.json["opened"]
    assert opened == 8
    refused = await operator("recover", "db1", "--latest", "--disk", "disk0", "--blob", "x.vhd", "--json")
    assert refused.status == 1
    assert "refuses our credentials" in refused.json["message"]


async def test_a_share_finds_damage_in_its_turn(operator: Operator, stored: Stored) -> None:
    await flip(stored, 4, 250)
    statuses = [(await operator("verify", "db1", "--share", "25", "--turn", turn)).status for turn in range(4)]
    assert sorted(statuses) == [0, 0, 0, 3]


async def test_what_is_no_share_is_refused(operator: Operator, stored: Stored) -> None:
    for words in (("--share", "0%"), ("--share", "101%"), ("--share", "few"), ("--turn", "1")):
        ended = await operator("verify", "db1", *words, "--json")
        assert ended.status == 1
        assert ended.json["hint"]
