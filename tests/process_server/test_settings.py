"""Settings: what can't be honoured is refused, with the name of the setting and where to look."""

from __future__ import annotations

import base64
import json
import uuid
from datetime import datetime
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from process_server import assignments
from process_server.cli import app
from process_server.health import load_status, stored_before
from process_server.settings import Settings, load_settings
from replicar.control.keys import key_number
from replicar.control.messages import ProcessServerAssignment, ProcessServerInstructions
from replicar.errors import CorruptionError, PermanentError
from replicar.log.tail import Stored

STORAGE = (
    '[storage]\nendpoint = "https://a.blob.example.org"\naccount_name = "a"\naccount_key = "QUJD"\ncontainer = "c-1"\n'
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def test_a_file_with_storage_alone_gives_the_defaults(file: Path) -> None:
    file.write_text(STORAGE)
    settings = load_settings(file)
    assert (settings.port, settings.compression_level, settings.segment_age_seconds) == (9443, 1, 0.2)
    assert settings.tuning().log.blob_bytes == 4 << 30
    assert settings.advertised_host()
    assert "QUJD" not in repr(settings)


def test_bandwidth_and_weights_are_read_as_the_help_shows_them(file: Path) -> None:
    shown = CliRunner().invoke(app, ["run", "--help"]).output
    begin, end = shown.index("[bandwidth]"), shown.index("shop = 4")
    file.write_text(STORAGE + shown[begin:end] + "shop = 4\n")
    settings = load_settings(file)
    schedule = settings.bandwidth.schedule()
    assert schedule.rate_at(datetime(2026, 11, 23, 12)) == 5_000_000  # noqa: DTZ001 - local time, as a clock shows it
    assert schedule.rate_at(datetime(2026, 11, 22, 12)) is None  # noqa: DTZ001
    assert settings.tuning().weights == {"shop": 4}


def test_the_environment_beats_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(f"port = 1234\ncompression_level = 3\n{STORAGE}")
    monkeypatch.setenv("REPLICAR_PS_PORT", "4321")
    monkeypatch.setenv("REPLICAR_PS_STORAGE__CONTAINER", "other")
    settings = load_settings(file)
    assert (settings.port, settings.compression_level) == (4321, 3)
    assert settings.storage.container == "other"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cahce_bytes = 1\n" + STORAGE, "cahce_bytes"),
        ("cache_bytes = 1000\n" + STORAGE, "cache_bytes"),
        ("port = 70000\n" + STORAGE, "port"),
        ("compression_level = 99\n" + STORAGE, "compression_level"),
        ("log_blob_bytes = 16777217\n" + STORAGE, "log_blob_bytes"),
        ("port = 1\n", "storage"),
        (STORAGE + "colour = 1\n", "storage.colour"),
        (STORAGE + "[weights]\nshop = 0\n", "weights.shop"),
        (STORAGE + "[bandwidth]\nbytes_per_second = 1000\n", "bandwidth"),
        (STORAGE + '[[bandwidth.windows]]\nstart = "8"\nend = "18:00"\nbytes_per_second = 0\n', "windows.0.start"),
        (STORAGE + '[[bandwidth.windows]]\nstart = "08:00"\nend = "08:00"\nbytes_per_second = 0\n', "windows.0"),
        (
            STORAGE + '[[bandwidth.windows]]\ndays = ["mon"]\nstart = "08:00"\nend = "18:00"\nbytes_per_second = 0\n',
            "windows.0.days.0",
        ),
        ("port = \n", "no TOML"),
        (STORAGE.replace("https", "http"), "unprotected"),
        (STORAGE + 'account_key_file = "/k"\n', "both set"),
    ],
)
def test_nonsense_is_refused_by_name(file: Path, text: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(PermanentError, match=named):
        load_settings(file)


def test_an_unknown_variable_and_a_missing_file_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermanentError, match="no settings file"):
        load_settings(file)
    file.write_text(STORAGE)
    monkeypatch.setenv("REPLICAR_PS_CAHCE_BYTES", "1")
    with pytest.raises(PermanentError, match="REPLICAR_PS_CAHCE_BYTES"):
        load_settings(file)


def test_every_setting_is_in_the_help() -> None:
    shown = CliRunner().invoke(app, ["run", "--help"]).output
    assert [name for name in Settings.model_fields if name not in shown] == []


def an_assignment(**fields: object) -> ProcessServerAssignment:
    return ProcessServerAssignment.model_validate(
        {
            "machine_id": uuid.UUID(int=1),
            "name": "m1",
            "epoch": 1,
            "incarnation": 0,
            "data_key": base64.b64encode(bytes(range(32))).decode(),
            "wrapped_key": base64.b64encode(bytes(40)).decode(),
            "key_id": str(uuid.UUID(int=(5 << 64) + 9)),
            **fields,
        }
    )


def test_assignments_are_kept_for_their_owner_alone_and_come_back_whole(tmp_path: Path) -> None:
    assert assignments.load(tmp_path) is None
    instructions = ProcessServerInstructions(assignments=(an_assignment(),), heartbeat_seconds=1.0)
    assignments.save(tmp_path, instructions)
    kept = tmp_path / assignments.ASSIGNMENTS_FILE
    assert kept.stat().st_mode & 0o777 == 0o600
    again = assignments.load(tmp_path)
    assert again is not None
    [assignment] = assignments.read_assignments(again.assignments)
    assert (assignment.writer.data_key, assignment.writer.key_id) == (bytes(range(32)), 5)
    assert "data_key" not in repr(assignment)
    kept.chmod(0o644)
    with pytest.raises(PermanentError, match="read by others"):
        assignments.load(tmp_path)
    kept.chmod(0o600)
    kept.write_text("{")
    with pytest.raises(PermanentError, match="damaged"):
        assignments.load(tmp_path)


def test_an_assignment_with_keys_that_are_none_is_refused() -> None:
    for fields in ({"wrapped_key": "AAAA"}, {"data_key": SecretStr("AAAA")}):
        with pytest.raises(CorruptionError):
            assignments.read_assignment(an_assignment(**fields))
    with pytest.raises(PermanentError, match="no data key"):
        assignments.read_assignment(an_assignment(key_id="primary"))


def test_a_keys_number_is_the_upper_half_of_its_uuid_or_itself() -> None:
    assert key_number("7") == 7
    assert key_number("00000000-0000-0005-0000-000000000009") == 5
    for bad in ("", "-1", str(1 << 64), "x"):
        with pytest.raises(PermanentError):
            key_number(bad)


def test_a_status_that_is_missing_is_an_error_for_people_and_none_for_the_server(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="can't read the status"):
        load_status(tmp_path)
    assert stored_before(tmp_path) == {}
    machine = {"machine_id": str(uuid.UUID(int=3)), "incarnation": 1, "stored_segment": 12}
    machine |= {"stored_sequence": 70, "stored_digest": "ab" * 32}
    (tmp_path / "status.json").write_text(json.dumps({"machines": [machine]}))
    assert stored_before(tmp_path) == {(uuid.UUID(int=3), 1): Stored(12, 70, b"\xab" * 32)}
    (tmp_path / "status.json").write_text("[]")
    assert stored_before(tmp_path) == {}
