"""Settings and the look at the machine before the start: everything that is not right is named, with the next step."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mobility_agent import preflight, traced
from mobility_agent.settings import AgentSettings, NbdAddress, load_settings
from replicar.errors import PermanentError

DISK = '[[disks]]\nname = "root"\npath = "root.img"\n'
SAME_DISK = '[[disks]]\nname = "other"\npath = "./root.img"\n'
LONG = "x" * 120
BAD_NAME = '[[disks]]\nname = "no slash/"\npath = "root.img"\n'


def written(directory: Path, text: str) -> Path:
    path = directory / "agent.toml"
    path.write_text(text)
    return path


def refusal(directory: Path, text: str) -> str:
    with pytest.raises(PermanentError) as caught:
        load_settings(written(directory, text))
    return str(caught.value)


def test_a_file_with_directory_and_one_disk_is_enough(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, f'directory = "state"\n{DISK}'))
    assert settings.directory == tmp_path / "state"
    (disk,) = settings.disks
    assert disk.path == tmp_path / "root.img"
    assert settings.addresses[disk.name].listen == tmp_path / "state" / "nbd" / "root.sock"
    assert settings.journal_bytes == 4 << 30


def test_the_disks_are_audited_gently_and_points_named_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, f'directory = "/s"\n{DISK}'))
    assert (settings.audit_bytes_per_second, settings.mark_every_seconds) == (4 << 20, 300)
    text = f'directory = "/s"\naudit_bytes_per_second = 0\nmark_every_seconds = 0\n{DISK}'
    settings = load_settings(written(tmp_path, text))
    assert (settings.audit_bytes_per_second, settings.mark_every_seconds) == (0, 0)
    text = f'directory = "/s"\naudit_bytes_per_second = "20 MiB"\nmark_every_seconds = 60\n{DISK}'
    settings = load_settings(written(tmp_path, text))
    assert (settings.audit_bytes_per_second, settings.mark_every_seconds) == (20 << 20, 60)


def test_a_traced_machine_has_no_sockets_whose_paths_could_be_too_long(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, f'directory = "/{LONG}"\ncapture = "trace"\n{DISK}'))
    assert settings.capture == "trace"
    assert settings.freeze_budget_seconds == 0.5


def test_sizes_may_be_written_for_people(tmp_path: Path) -> None:
    text = f'directory = "/s"\njournal_bytes = "2 GiB"\njournal_file_bytes = 33554432\n{DISK}'
    settings = load_settings(written(tmp_path, text))
    assert (settings.journal_bytes, settings.journal_file_bytes) == (2 << 30, 32 << 20)


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, f'directory = "/s"\njournal_bytes = "2 GiB"\n{DISK}')
    monkeypatch.setenv("REPLICAR_AGENT_JOURNAL_BYTES", "8GiB")
    monkeypatch.setenv("REPLICAR_AGENT_DISKS", '[{"name": "data", "path": "/dev/sdb", "nbd": "127.0.0.1:10809"}]')
    settings = load_settings(path)
    assert settings.journal_bytes == 8 << 30
    assert [disk.name for disk in settings.disks] == ["data"]
    assert settings.addresses["data"].listen == ("127.0.0.1", 10809)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f'directory = "/s"\njurnal_bytes = 5\n{DISK}', "jurnal_bytes: is no setting of the agent"),
        (f'directory = "/s"\n{DISK}sice = 5\n', "disks.0.sice: is no setting"),
        (f"{DISK}", "directory: is missing"),
        ('directory = "/s"\n', "disks: is missing"),
        ('directory = "/s"\ndisks = []\n', "disks: "),
        (f'directory = "/s"\njournal_bytes = "much"\n{DISK}', "journal_bytes: "),
        (f'directory = "/s"\njournal_bytes = "100 MiB"\n{DISK}', "at least twice journal_file_bytes"),
        (f'directory = "/s"\njournal_file_bytes = 4096\n{DISK}', "journal_file_bytes: "),
        (f'directory = "/s"\nseal_delay_seconds = -1\n{DISK}', "seal_delay_seconds: "),
        (f'directory = "/s"\nheartbeat_seconds = 3600\n{DISK}', "heartbeat_seconds: "),
        (f'directory = "/s"\naudit_bytes_per_second = -1\n{DISK}', "audit_bytes_per_second: "),
        (f'directory = "/s"\nmark_every_seconds = -1\n{DISK}', "mark_every_seconds: "),
        (f'directory = "/s"\nmark_every_seconds = 0.5\n{DISK}', "mark_every_seconds: "),
        (f'directory = "/s"\nmark_every_seconds = 86401\n{DISK}', "mark_every_seconds: "),
        (f'directory = "/s"\n{DISK}{DISK}', "two disks have the name root"),
        (f'directory = "/s"\n{DISK}{SAME_DISK}', "two disks have the path "),
        (
            f'directory = "/s"\n{DISK}nbd = "a.sock"\n[[disks]]\nname = "b"\npath = "b"\nnbd = "./a.sock"\n',
            "two disks have the nbd address ",
        ),
        (f'directory = "/s"\n{BAD_NAME}', "disks.0.name: "),
        (f'directory = "/s"\n{DISK}nbd = "0.0.0.0:10809"\n', "set nbd_tls"),
        (f'directory = "/s"\n{DISK}nbd = "localhost:port"\n', "neither a socket path nor host:port"),
        (f'directory = "/s"\n{DISK}nbd = "/{LONG}.sock"\n', "longer than the 107 bytes"),
        (f'directory = "/s"\n{DISK}capture = "trace"\n', "capture is set for the whole machine"),
        (f'directory = "/s"\ncapture = "trace"\n{DISK}nbd = "/run/a.sock"\n', "disk root has an nbd address"),
        (f'directory = "/s"\ncapture = "guess"\n{DISK}', "capture: "),
        (f'directory = "/s"\ncapture = "scan"\n{DISK}nbd = "/run/a.sock"\n', 'with capture = "scan" no disk is served'),
        (
            f'directory = "/s"\ncapture = "scan"\ncopy_free_space = false\n{DISK}',
            "copy_free_space = false can't be had",
        ),
        (
            f'directory = "/s"\ncapture = "trace"\ncopy_free_space = false\n{DISK}',
            "copy_free_space = false can't be had",
        ),
        ("directory = \n", "not valid TOML"),
        ("directory = 5\n" + DISK, "directory: "),
        ("disks = 7\ndirectory = '/s'\n", "disks: "),
    ],
)
def test_what_is_not_right_is_named(tmp_path: Path, text: str, named: str) -> None:
    message = refusal(tmp_path, text)
    assert named in message
    assert str(tmp_path / "agent.toml") in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="No such file") as caught:
        load_settings(tmp_path / "none.toml")
    assert "--settings" in caught.value.hint


def test_an_unknown_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICAR_AGENT_JURNAL_BYTES", "5")
    assert "REPLICAR_AGENT_JURNAL_BYTES" in refusal(tmp_path, f'directory = "/s"\n{DISK}')


def test_a_variable_that_is_no_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICAR_AGENT_DISKS", "root")
    assert "disks" in refusal(tmp_path, f'directory = "/s"\n{DISK}')


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/run/a.sock", "/run/a.sock"),
        ("unix:/run/a", "/run/a"),
        ("[::1]:10809", "[::1]:10809"),
        ("localhost:1", "localhost:1"),
    ],
)
def test_an_nbd_address_reads_back_as_it_is_written(text: str, shown: str) -> None:
    address = NbdAddress.parse(text)
    assert str(address) == shown
    assert NbdAddress.parse(shown) == address


def checked(tmp_path: Path, **fields: object) -> AgentSettings:
    state = tmp_path / "s"
    state.mkdir(exist_ok=True)
    disk = {"name": "root", "path": str(tmp_path / "root.img"), "nbd": str(tmp_path / "n.sock")}
    return AgentSettings.model_validate({"directory": state, "disks": [disk], "journal_bytes": 128 << 20, **fields})


def test_a_journal_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="journal_bytes is 4503599627370496") as caught:
        preflight.check(checked(tmp_path, journal_bytes=1 << 52), tmp_path / "s" / "log")
    assert caught.value.fields["free_bytes"] > 0
    assert caught.value.hint


def test_what_the_journal_takes_already_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "s" / "log"
    settings = checked(tmp_path)
    log.mkdir()
    with (log / "changes.hrl").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 96 << 20)
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[4] = (64 << 20) // real.f_frsize  # f_bavail: 64 MiB are free
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    preflight.check_journal_space(settings, log)
    (log / "changes.hrl").unlink()
    with pytest.raises(PermanentError, match="has room for"):
        preflight.check_journal_space(settings, log)


def test_a_socket_that_somebody_serves_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "n.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(PermanentError, match="another process serves there") as caught:
            preflight.check(checked(tmp_path), tmp_path / "log")
    assert caught.value.fields["disk"] == "root"
    preflight.check(checked(tmp_path), tmp_path / "log")  # the one who served it is gone; the socket lies there still


def test_a_disk_that_can_not_be_traced_is_named_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "root.img").write_bytes(bytes(512))
    settings = load_settings(written(tmp_path, f'directory = "state"\ncapture = "trace"\n{DISK}'))
    with pytest.raises(PermanentError, match=r"disk root can't be captured by trace: .* is no block device"):
        traced.check(settings, tmp_path / "state" / "log")


def test_a_file_in_a_sockets_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "n.sock").write_text("mine")
    with pytest.raises(PermanentError, match="no socket lies there"):
        preflight.check(checked(tmp_path), tmp_path / "log")
    assert (tmp_path / "n.sock").read_text() == "mine"


def test_a_socket_without_a_directory_is_named(tmp_path: Path) -> None:
    disk = {"name": "root", "path": "/r", "nbd": str(tmp_path / "none" / "n.sock")}
    with pytest.raises(PermanentError, match="there is no directory"):
        preflight.check(checked(tmp_path, disks=[disk]), tmp_path / "log")


def test_a_disk_that_is_shown_as_a_file_is_served_over_nbd_only_where_that_is_said(tmp_path: Path) -> None:
    disk = '[[disks]]\nname = "root"\npath = "/dev/sdb"\nfile = "shown/disk"\n'
    settings = load_settings(written(tmp_path, f'directory = "/s"\n{disk}'))
    assert settings.files == {"root": tmp_path / "shown" / "disk"}
    assert settings.addresses == {}
    settings = load_settings(written(tmp_path, f'directory = "/s"\n{disk}nbd = "127.0.0.1:10809"\n'))
    assert settings.addresses["root"].port == 10809


@pytest.mark.parametrize("file", ["/disk", "/run/../etc/disk"])
def test_a_file_whose_directory_is_not_its_own_is_refused(tmp_path: Path, file: str) -> None:
    path = written(tmp_path, f'directory = "/s"\n[[disks]]\nname = "root"\npath = "/dev/sdb"\nfile = "{file}"\n')
    with pytest.raises(PermanentError, match="has to be a path like"):
        load_settings(path)


def test_two_files_in_one_directory_are_refused(tmp_path: Path) -> None:
    disks = "".join(f'[[disks]]\nname = "{n}"\npath = "/dev/sd{n}"\nfile = "/run/shown/{n}"\n' for n in "bc")
    with pytest.raises(PermanentError, match="two disks have the directory of its file /run/shown"):
        load_settings(written(tmp_path, f'directory = "/s"\n{disks}'))


def test_a_traced_disk_has_no_file(tmp_path: Path) -> None:
    text = 'directory = "/s"\ncapture = "trace"\n[[disks]]\nname = "b"\npath = "/dev/sdb"\nfile = "/run/shown/b"\n'
    with pytest.raises(PermanentError, match="has a file, but"):
        load_settings(written(tmp_path, text))
