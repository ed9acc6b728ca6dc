"""`config-server` as a person meets it: as a command, with files, ports, signals and mistakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from config_server.settings import load_settings
from config_server.vault import PASSPHRASE_FILE
from replicar.control.client import ControlClient
from replicar.control.enrolment import RegistrationKey, enrol, read_passphrase
from replicar.control.identity import Identity, Role
from replicar.errors import PermanentError, TransientError


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "config_server.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`config-server run` as a process, and the port it says it listens on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "config_server.cli", "run", "-d", directory, "--listen", "127.0.0.1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listening on 127.0.0.1:" in line
        yield process, int(line.split("127.0.0.1:")[1].split(",")[0])
    finally:
        process.kill()
        process.communicate()


async def test_from_nothing_to_an_enrolled_machine_and_through_a_kill(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vault = tmp_path / "vault"
    made = command("init", "--vault", "demo", "--directory", vault, "--address", f"127.0.0.1:{port}", "--json")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    passphrase = read_passphrase(facts["passphrase_file"])
    assert passphrase.get_secret_value() not in made.stdout + made.stderr
    assert os.stat(facts["passphrase_file"]).st_mode & 0o777 == 0o600
    operator = Identity.load(facts["operator_identity"])
    with serving(vault, "--port", str(port)) as (process, _):
        await enrol(
            config_server=facts["address"],
            role=Role.MACHINE,
            name="db1",
            passphrase=passphrase,
            directory=tmp_path / "db1",
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        async with ControlClient(operator) as client:
            with pytest.raises(TransientError, match=f"127.0.0.1:{port}.*config-server run"):
                await client.machines()
    with serving(vault, "--port", str(port)) as (process, _):
        async with ControlClient(operator) as client:
            assert [machine.name for machine in await client.machines()] == ["db1"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_a_port_that_is_taken_is_named_with_the_setting(vault_directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = command("run", "-d", vault_directory, "--listen", "127.0.0.1", REPLICAR_CONFIG_SERVER_PORT=str(port))
    assert run.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in run.stderr
    assert "--port" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_second_server_on_the_same_vault_is_refused(vault_directory: Path) -> None:
    with serving(vault_directory, "--port", "0"):
        run = command("run", "-d", vault_directory, "--listen", "127.0.0.1", "--port", "0")
    assert run.returncode == 1
    assert "another config server runs on the vault" in run.stderr


def test_a_registration_key_and_an_operator_are_made_beside_a_running_server(
    vault_directory: Path, tmp_path: Path
) -> None:
    with serving(vault_directory, "--port", "0"):
        key = command("registration-key", "-d", vault_directory, "-o", tmp_path / "key", "--json")
        made = command("operator", "alice", "-d", vault_directory, "-o", tmp_path / "alice", "--json")
    assert key.returncode == made.returncode == 0, key.stderr + made.stderr
    loaded = RegistrationKey.load(tmp_path / "key")
    assert loaded.key_id == json.loads(key.stdout)["key_id"]
    assert loaded.key.get_secret_value() not in key.stdout
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert Identity.load(tmp_path / "alice").role is Role.OPERATOR


def test_a_vault_is_not_founded_over_something(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "photo.jpg").touch()
    made = command("init", "--vault", "demo", "-d", tmp_path / "there")
    assert made.returncode == 1
    assert "is not empty" in made.stderr
    for name in ("", "a/b", "ü"):
        made = command("init", "--vault", name, "-d", tmp_path / "new")
        assert made.returncode == 1
        assert "is no name for a vault" in made.stderr
    made = command("init", "--vault", "demo", "-d", tmp_path / "new", "--address", "https://x")
    assert "no address of a config server" in made.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_running_without_a_vault_says_how_to_make_one(tmp_path: Path) -> None:
    run = command("run", "-d", tmp_path / "none")
    assert run.returncode == 1
    assert f"config-server init --vault NAME --directory {tmp_path / 'none'}" in run.stderr


def test_help_names_the_commands_and_the_way_to_begin() -> None:
    shown = command("--help", COLUMNS="200", NO_COLOR="1").stdout
    for word in ("init", "run", "registration-key", "operator", "passphrase", "Back the vault's directory up"):
        assert word in shown


def test_settings_come_from_options_environment_and_file_in_that_order(
    vault_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = vault_directory / "config-server.toml"
    file.write_text("port = 1111\nheartbeat_seconds = 3\n")
    assert load_settings(directory=vault_directory).port == 1111
    monkeypatch.setenv("REPLICAR_CONFIG_SERVER_PORT", "2222")
    assert load_settings(directory=vault_directory).port == 2222
    given = load_settings(directory=vault_directory, port=3333, listen=None)
    assert (given.port, given.heartbeat_seconds, given.listen) == (3333, 3, "0.0.0.0")  # noqa: S104


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1\n", "'prot'"),
        ("port = 70000\n", "'port'"),
        ("port = \n", "no TOML"),
        ("heartbeat_seconds = 0\n", "'heartbeat_seconds'"),
    ],
)
def test_a_setting_that_can_not_be_honoured_is_refused(vault_directory: Path, text: str, words: str) -> None:
    (vault_directory / "config-server.toml").write_text(text)
    with pytest.raises(PermanentError, match=words):
        load_settings(directory=vault_directory)
    with pytest.raises(PermanentError, match="no settings file at"):
        load_settings(vault_directory / "missing.toml")


def test_the_vault_listens_on_the_port_that_everybody_is_told(tmp_path: Path) -> None:
    for number, (given, port) in enumerate(
        (
            (["--address", "config.example.org:18443"], 18443),
            (["--address", "config.example.org"], 443),
            (["--address", "config.example.org:18443", "--port", "8443"], 8443),
            ([], 443),
        )
    ):
        made = command("init", "--vault", "demo", "-d", tmp_path / str(number), *given)
        assert made.returncode == 0, made.stderr
        assert f"listen on 0.0.0.0:{port}." in made.stdout
        assert f"port = {port}\n" in (tmp_path / str(number) / "config-server.toml").read_text()


def test_the_passphrase_may_be_taken_away_from_the_vault(vault_directory: Path) -> None:
    (vault_directory / PASSPHRASE_FILE).unlink()
    with serving(vault_directory, "--port", "0") as (process, port):
        assert port > 0
        process.terminate()
        assert process.wait(timeout=10) == 0
