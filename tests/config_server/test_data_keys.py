"""Data keys and the vault's key: rotated, told, destroyed, forgotten; and who may ask for them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from config_server import data_keys
from config_server.cli import app
from config_server.registry import Registry
from config_server.vault import Vault
from replicar.control.identity import Identity
from replicar.control.vault_key import VaultKey
from replicar.errors import CorruptionError, LimitError, PermanentError
from tests.config_server.support import Cast, SetClock, running


async def assigned(cast: Cast) -> tuple[bytes, list[bytes], bytes]:
    (found,) = (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).assignments
    wrapped = base64.b64decode(found.wrapped_key)
    return found.data_key_bytes(), [key.data_key_bytes() for key in found.former_keys], wrapped


async def test_a_rotated_machine_has_a_new_key_and_keeps_the_old_ones(cast: Cast) -> None:
    await cast.protect()
    (first, former, _), first_id = await assigned(cast), (await cast.operator.key("db1")).key_id
    assert former == []
    await cast.operator.rotate_key("db1")
    cast.house.clock.move(seconds=1)
    await cast.operator.rotate_key("db1")
    third, former, _ = await assigned(cast)
    assert former[1] == first
    assert len({third, *former}) == 3
    told = await cast.operator.key("db1")
    assert (told.data_key_bytes(), [key.data_key_bytes() for key in told.former_keys]) == (third, former)
    assert told.former_keys[1].key_id == first_id
    assert first.hex() not in repr(told)
    assert told.former_keys[1].data_key.get_secret_value() not in repr(told)


async def test_a_rotation_is_news_to_the_process_server_at_once(cast: Cast) -> None:
    await cast.protect()
    known = (await cast.server.process_server_heartbeat(cast.house.server_heartbeat())).version
    await cast.operator.rotate_key("db1")
    heartbeat = cast.house.server_heartbeat(known_version=known, wait_seconds=20)
    assert (await cast.server.process_server_heartbeat(heartbeat)).version != known


async def test_a_machine_that_is_not_protected_has_no_key_to_rotate(cast: Cast) -> None:
    with pytest.raises(PermanentError, match="is not protected"):
        await cast.operator.rotate_key("db1")


async def test_rotations_have_a_limit(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_keys, "MAX_FORMER_KEYS", 1)
    await cast.protect()
    await cast.operator.rotate_key("db1")
    with pytest.raises(LimitError, match="1 is the limit"):
        await cast.operator.rotate_key("db1")


def files_of(cast: Cast) -> bytes:
    return b"".join(path.read_bytes() for path in cast.house.directory.glob("registry.sqlite*"))


async def test_destroyed_keys_are_in_no_file_of_the_vault_and_nobody_is_given_them(cast: Cast, tmp_path: Path) -> None:
    await cast.protect()
    _, _, first = await assigned(cast)
    await cast.operator.rotate_key("db1")
    _, _, second = await assigned(cast)
    assert first in files_of(cast)
    assert second in files_of(cast)
    with pytest.raises(PermanentError, match="was not removed"):
        await cast.operator.destroy_keys("db1")
    await cast.operator.remove("db1")
    assert (await cast.operator.key("db1")).former_keys, "removed only, it can still be recovered"
    await cast.operator.destroy_keys("db1")
    await cast.operator.destroy_keys("db1")
    assert first not in files_of(cast)
    assert second not in files_of(cast)
    with pytest.raises(PermanentError, match="were destroyed"):
        await cast.operator.key("db1")
    assert (await cast.operator.points("db1")).points == ()
    # Enrolled again it is protected with a key of its own, and above the epoch that shut its writers out.
    await cast.house.enrol(tmp_path / "again", "db1")
    await cast.operator.protect("db1")
    key, former, _ = await assigned(cast)
    assert (len(key), former) == (32, [])
    assert (await cast.operator.machine("db1")).epoch == 2
    actions = await cast.house.server.registry.run(
        lambda c: [row["action"] for row in c.execute("SELECT action FROM audit WHERE subject = 'machine db1'")]
    )
    assert {"rotate-key", "remove", "destroy-keys", "key"} <= set(actions)


async def test_an_auditor_is_given_keys_and_may_change_nothing(cast: Cast, tmp_path: Path) -> None:
    await cast.protect()
    made = CliRunner().invoke(app, ["auditor", "eve", "-o", str(tmp_path / "eve"), "-d", str(cast.house.directory)])
    assert made.exit_code == 0, made.output
    auditor = Identity.load(tmp_path / "eve")
    async with cast.house.client(auditor) as client:
        assert (await client.key("db1")).data_key_bytes() == (await cast.operator.key("db1")).data_key_bytes()
        assert (await client.status()).machines
        for wrong in (
            client.protect("db1"),
            client.move("db1"),
            client.remove("db1"),
            client.destroy_keys("db1"),
            client.rotate_key("db1"),
            client.mark("db1", "m", wait_seconds=0),
        ):
            with pytest.raises(PermanentError, match="may not"):
                await wrong
    asked = await cast.house.server.registry.run(
        lambda c: [row["party_id"] for row in c.execute("SELECT party_id FROM audit WHERE action = 'key'")]
    )
    assert str(auditor.id) in asked


# --- the vault's key ---


@contextmanager
def registry(directory: Path) -> Iterator[Registry]:
    opened = Registry(directory / "registry.sqlite")
    try:
        yield opened
    finally:
        opened.close()


async def test_the_vaults_key_is_rotated_and_the_former_one_forgotten(
    vault_directory: Path, clock: SetClock, tmp_path: Path
) -> None:
    async with running(vault_directory, clock) as house:
        refused = CliRunner().invoke(app, ["vault-key", "rotate", "-d", str(vault_directory)])
        assert isinstance(refused.exception, PermanentError)
        assert "another config server runs" in str(refused.exception)
        await house.enrol(tmp_path / "db1", "db1")
    with registry(vault_directory) as opened:
        vault = Vault.load(vault_directory)
        (row,) = opened.run(lambda c: c.execute("SELECT id FROM machines").fetchall())
        before = vault.new_data_key()
        opened.run(lambda c: c.execute("UPDATE machines SET key_id = '1', wrapped_key = ?", (before,)))
    plain = vault.unwrap(before)

    rotated = CliRunner().invoke(app, ["vault-key", "rotate", "-d", str(vault_directory), "--json"])
    assert '"keys": 2' in rotated.output
    with registry(vault_directory) as opened:
        (row,) = opened.run(lambda c: c.execute("SELECT wrapped_key FROM machines").fetchall())
    newer = Vault.load(vault_directory)
    assert row["wrapped_key"] != before
    assert newer.unwrap(row["wrapped_key"]) == newer.unwrap(before) == plain
    with pytest.raises(CorruptionError):
        vault.unwrap(row["wrapped_key"])

    warned = CliRunner().invoke(app, ["vault-key", "forget", "-d", str(vault_directory)])
    assert warned.exit_code == 2
    forgotten = CliRunner().invoke(app, ["vault-key", "forget", "--headers-rewrapped", "-d", str(vault_directory)])
    assert forgotten.exit_code == 0, forgotten.output
    last = Vault.load(vault_directory)
    assert last.unwrap(row["wrapped_key"]) == plain
    with pytest.raises(CorruptionError):
        last.unwrap(before)


async def test_a_rotation_that_died_after_the_file_is_finished_by_the_next_start(
    vault_directory: Path, clock: SetClock, tmp_path: Path
) -> None:
    async with running(vault_directory, clock) as house:
        await house.enrol(tmp_path / "db1", "db1")
        old = house.server.vault.new_data_key()
        await house.server.registry.run(
            lambda c: c.execute("UPDATE machines SET key_id = '1', wrapped_key = ?", (old,))
        )
    VaultKey.read(vault_directory / "vault.key").rotated().save(vault_directory / "vault.key")
    async with running(vault_directory, clock) as house:
        row = await house.server.registry.run(lambda c: c.execute("SELECT wrapped_key FROM machines").fetchone())
        assert house.server.vault.key.is_present(row["wrapped_key"])
