"""The registry and the vault's directory: whole transactions, damage that is named, limits that hold."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid
from functools import partial
from pathlib import Path

import pytest

from config_server import lives, parties, points, registry
from config_server.registry import Registry, RegistryThread
from config_server.vault import Vault, new_passphrase
from replicar.control.identity import MAX_INCARNATION, Role
from replicar.control.messages import GapReport, LifeState, MarkReport
from replicar.errors import CorruptionError, LimitError, PermanentError, TransientError

#: The tables that came with jobs and policies.
CIRCLE = (
    "jobs",
    "drills",
    "lives",
    "recovery_workers",
    "policies",
    "arrangements",
    "alerts",
    "tokens",
    "upkeep",
    "retentions",
)


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "r.sqlite")

    def half(connection: sqlite3.Connection) -> None:
        parties.admit(connection, Role.MACHINE, "db1", 1)
        raise ValueError

    with pytest.raises(ValueError):
        opened.run(half)
    assert opened.run(lambda c: parties.by_name(c, Role.MACHINE, "db1")) is None
    opened.close()


def test_a_registry_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    Registry(tmp_path / "r.sqlite").close()
    with sqlite3.connect(tmp_path / "r.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(PermanentError, match="has schema 99"):
        Registry(tmp_path / "r.sqlite")


def test_a_registry_of_the_first_version_is_taken_over_with_what_it_counted(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "r.sqlite")
    party = opened.run(lambda c: parties.admit(c, Role.MACHINE, "db1", 1))
    opened.run(lambda c: c.execute("UPDATE machines SET bytes_received = 700, bytes_stored = 300"))
    for column in ("counted_since", "counted_received", "counted_stored"):
        opened.connection.execute(f"ALTER TABLE machines DROP COLUMN {column}")
    opened.connection.execute("ALTER TABLE marks DROP COLUMN pause_seconds")
    for table in ("group_points", *CIRCLE, "former_keys"):
        opened.connection.execute(f"DROP TABLE {table}")
    opened.connection.execute("ALTER TABLE machines DROP COLUMN destroyed_ns")
    opened.connection.execute("PRAGMA user_version = 1")
    opened.close()
    for _ in range(2):
        opened = Registry(tmp_path / "r.sqlite")
        row = opened.run(lambda c: c.execute("SELECT * FROM machines").fetchone())
        assert row["id"] == str(party.id)
        assert (row["bytes_received"], row["counted_received"]) == (700, 700)
        assert (row["bytes_stored"], row["counted_stored"], row["counted_since"]) == (300, 300, "")
        opened.close()


def test_machines_that_were_protected_before_there_were_lives_still_are(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "r.sqlite")
    ids = [opened.run(partial(parties.admit, role=Role.MACHINE, name=name, now_ns=1)).id for name in ("db1", "db2")]
    server = opened.run(lambda c: parties.admit(c, Role.PROCESS_SERVER, "ps1", 1))
    opened.run(
        lambda c: c.execute("UPDATE machines SET process_server_id = ? WHERE id = ?", (str(server.id), str(ids[0])))
    )
    for table in (*CIRCLE, "former_keys"):
        opened.connection.execute(f"DROP TABLE {table}")
    opened.connection.execute("ALTER TABLE machines DROP COLUMN destroyed_ns")
    opened.connection.execute("PRAGMA user_version = 4")
    opened.close()
    opened = Registry(tmp_path / "r.sqlite")
    states = [opened.run(partial(lives.stored, machine_id=machine_id)).state for machine_id in ids]
    assert states == [LifeState.PROTECTED, LifeState.UNPROTECTED]
    opened.close()


def test_a_file_that_is_no_registry_is_corruption_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(CorruptionError, match=r"r\.sqlite is damaged") as refusal:
        Registry(tmp_path / "r.sqlite")
    assert "backup" in refusal.value.hint


def test_a_registry_that_somebody_else_holds_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUSY_SECONDS", 0.1)
    opened = Registry(tmp_path / "r.sqlite")
    other = sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransientError, match="locked"):
        opened.run(lambda c: c.execute("SELECT 1"))
    other.execute("ROLLBACK")
    other.close()
    assert opened.run(lambda c: c.execute("SELECT 1").fetchone()[0]) == 1
    opened.close()


def test_a_full_disk_is_transient_and_nothing_is_half_written(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "r.sqlite")
    pages = opened.connection.execute("PRAGMA page_count").fetchone()[0]
    opened.connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    def fill(connection: sqlite3.Connection) -> None:
        for number in range(2000):
            parties.admit(connection, Role.MACHINE, f"m{number}", 1)

    with pytest.raises(TransientError, match="full"):
        opened.run(fill)
    assert opened.run(lambda c: c.execute("SELECT count(*) FROM parties").fetchone()[0]) == 0
    opened.close()


def test_a_mistake_in_a_statement_is_not_dressed_up(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "r.sqlite")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        opened.run(lambda c: c.execute("SELECT * FROM nowhere"))
    opened.close()


async def test_the_thread_takes_so_many_and_then_says_that_it_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MAX_WAITING", 3)
    gate = threading.Event()
    async with RegistryThread(tmp_path / "r.sqlite") as thread:
        waiting = [asyncio.create_task(thread.run(lambda _: gate.wait(10))) for _ in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(TransientError, match="busy"):
            await thread.run(lambda c: c.execute("SELECT 1"))
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert await thread.run(lambda c: c.execute("SELECT 5").fetchone()[0]) == 5


def test_the_catalogue_of_points_is_bounded_and_keeps_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "MAX_MARKS", 10)
    monkeypatch.setattr(points, "MAX_GAPS", 4)
    monkeypatch.setattr(points, "MAX_POINTS_LISTED", 6)
    opened = Registry(tmp_path / "r.sqlite")
    machine_id = opened.run(lambda c: parties.admit(c, Role.MACHINE, "db1", 1)).id
    marks = [MarkReport(name=f"m{number}", sequence=number, time_ns=number) for number in range(1, 26)]
    gaps = [GapReport(first_sequence=number, last_sequence=number) for number in range(1, 10)]
    opened.run(lambda c: points.record_marks(c, machine_id, marks, 20))
    opened.run(lambda c: points.record_gaps(c, machine_id, gaps))
    listed, truncated = opened.run(lambda c: points.list_points(c, machine_id, 0))
    assert [point.sequence for point in listed] == [25, 24, 23, 22, 21, 20]
    assert [point.stored for point in listed] == [False] * 5 + [True]
    assert truncated
    assert opened.run(lambda c: c.execute("SELECT count(*) FROM marks").fetchone()[0]) == 10
    assert [gap.first_sequence for gap in opened.run(lambda c: points.list_gaps(c, machine_id))] == [6, 7, 8, 9]
    opened.close()


def test_points_by_the_clock_do_not_drive_out_those_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "MAX_SCHEDULED", 3)
    opened = Registry(tmp_path / "r.sqlite")
    machine_id = opened.run(lambda c: parties.admit(c, Role.MACHINE, "db1", 1)).id
    asked = [MarkReport(name=f"m{at}", sequence=at, time_ns=at, command_id=f"c{at}") for at in (1, 5)]
    timed = [MarkReport(name=f"auto-{at}", sequence=at, time_ns=at) for at in (2, 3, 4, 6, 7, 8)]
    for marks in (asked, timed[:2], timed[2:]):
        opened.run(partial(points.record_marks, machine_id=machine_id, marks=marks, stored_sequence=20))
    listed, truncated = opened.run(lambda c: points.list_points(c, machine_id, 0))
    assert [point.name for point in listed] == ["auto-8", "auto-7", "auto-6", "m5", "m1"]
    assert not truncated
    opened.close()


def test_a_vault_has_so_many_parties_and_a_name_so_many_incarnations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parties, "MAX_PARTIES", 2)
    opened = Registry(tmp_path / "r.sqlite")
    opened.run(lambda c: [parties.admit(c, Role.MACHINE, name, 1) for name in ("a", "b", "a")])
    with pytest.raises(LimitError, match="2 is the limit"):
        opened.run(lambda c: parties.admit(c, Role.MACHINE, "c", 1))
    opened.run(lambda c: c.execute("UPDATE parties SET incarnation = ? WHERE name = 'a'", (MAX_INCARNATION,)))
    with pytest.raises(LimitError, match="was enrolled 32767 times"):
        opened.run(lambda c: parties.admit(c, Role.MACHINE, "a", 1))
    opened.close()


def test_a_vault_wraps_keys_for_itself_only(vault_directory: Path, tmp_path: Path) -> None:
    vault = Vault.load(vault_directory)
    wrapped = vault.new_data_key()
    assert len(vault.unwrap(wrapped)) == 32
    assert len(wrapped) == 40
    other = Vault.create(tmp_path / "other", "other", 10**18)
    flipped = bytes([wrapped[0] ^ 1]) + wrapped[1:]
    for bad_vault, bad in ((other, wrapped), (vault, flipped), (vault, b""), (vault, wrapped[:-8])):
        with pytest.raises(CorruptionError):
            bad_vault.unwrap(bad)


@pytest.mark.parametrize("name", ["vault.key", "enrolment.key", "authority/key.pem", "authority/certificate.pem"])
def test_a_vault_with_a_damaged_or_missing_file_is_not_opened(vault_directory: Path, name: str) -> None:
    (vault_directory / name).write_bytes(b"short")
    with pytest.raises(PermanentError, match=r"bytes, not 32|damaged"):
        Vault.load(vault_directory)
    (vault_directory / name).unlink()
    with pytest.raises(PermanentError, match=name):
        Vault.load(vault_directory)


def test_a_vault_whose_key_others_may_read_is_not_opened(vault_directory: Path) -> None:
    (vault_directory / "vault.key").chmod(0o604)
    with pytest.raises(PermanentError, match="may be read by others"):
        Vault.load(vault_directory)


def test_passphrases_are_long_and_never_the_same() -> None:
    made = {new_passphrase().get_secret_value() for _ in range(50)}
    assert len(made) == 50
    assert {len(passphrase) for passphrase in made} == {39}


def test_a_nonce_is_taken_once_and_forgotten_later(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "r.sqlite")
    nonce = uuid.uuid4().hex

    def take(at_seconds: int) -> bool:
        return opened.run(lambda c: parties.take_nonce(c, nonce, at_seconds * 10**9, 900))

    taken = [take(at_seconds) for at_seconds in (0, 899, 1801)]
    assert taken == [True, False, True]
    opened.close()
