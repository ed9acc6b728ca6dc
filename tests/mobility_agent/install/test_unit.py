"""The unit asks for what its capture needs, and systemd understands it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mobility_agent.install import unit
from mobility_agent.settings import AgentSettings
from tests.support.tools import need


def settings(directory: Path, **fields: Any) -> AgentSettings:
    disk = {"name": "data", "path": directory / "data.img"}
    return AgentSettings(**{"directory": directory / "state", "disks": [disk], **fields})


def line(text: str, key: str) -> str:
    return next(line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}="))


def test_a_disk_that_is_served_needs_no_right_over_the_host(tmp_path: Path) -> None:
    made = unit.text(settings(tmp_path), tmp_path / "agent.toml", Path("/usr/bin/mobility-agent"))
    assert "CAP_SYS_ADMIN" not in line(made, "CapabilityBoundingSet")
    assert line(made, "ProtectSystem") == "strict"


def test_a_disk_that_is_traced_leaves_the_agent_the_hosts_mounts(tmp_path: Path) -> None:
    made = unit.text(settings(tmp_path, capture="trace"), tmp_path / "agent.toml", Path("/usr/bin/mobility-agent"))
    assert {"CAP_SYS_ADMIN", "CAP_BPF"} <= set(line(made, "CapabilityBoundingSet").split())
    assert "ProtectSystem" not in made  # in a name space of its own it would freeze what nobody else has mounted


def test_a_disk_that_is_shown_as_a_file_is_kept_over_a_stop(tmp_path: Path) -> None:
    disk = {"name": "data", "path": tmp_path / "data.img", "file": tmp_path / "shown" / "data"}
    made = unit.text(settings(tmp_path, disks=[disk]), tmp_path / "agent.toml", Path("/usr/bin/mobility-agent"))
    assert "CAP_SYS_ADMIN" in line(made, "CapabilityBoundingSet")  # it mounts
    assert "ProtectSystem" not in made  # where everybody sees it
    assert line(made, "KillMode") == "process"  # the keeper stays


def test_only_what_the_agent_writes_to_is_writable(tmp_path: Path) -> None:
    disk = {"name": "data", "path": tmp_path / "images" / "data.img", "nbd": str(tmp_path / "run" / "data.sock")}
    found = unit.writable(settings(tmp_path, disks=[disk]))
    assert found == sorted(str(tmp_path / name) for name in ("state", "images/data.img", "run"))


def test_what_lies_in_a_writable_directory_is_not_named_again(tmp_path: Path) -> None:
    disk = {"name": "data", "path": tmp_path / "state" / "data.img"}
    assert unit.writable(settings(tmp_path, disks=[disk])) == [str(tmp_path / "state")]


@pytest.mark.parametrize("name", ["a b", "50%", "$HOME", 'quo"te', "back\\slash"])
def test_a_path_with_signs_that_mean_something_to_systemd_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    made = unit.text(settings(directory), directory / "agent.toml", Path("/usr/bin/mobility-agent"))
    assert verified(made, tmp_path) == ""


def test_an_archive_unpacks_itself_in_the_agents_own_directory(tmp_path: Path) -> None:
    made = unit.text(settings(tmp_path), tmp_path / "agent.toml", Path("/usr/local/bin/mobility-agent.pyz"))
    assert line(made, "Environment") == f"SHIV_ROOT={tmp_path / 'state' / 'program'}"


@pytest.mark.parametrize("capture", ["inline", "trace"])
def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path, capture: str) -> None:
    made = unit.text(settings(tmp_path, capture=capture), tmp_path / "agent.toml", Path("/bin/true"))
    assert verified(made, tmp_path) == ""


def verified(text: str, directory: Path) -> str:
    """What systemd's own checker says about a unit."""
    path = directory / unit.NAME
    path.write_text(text.replace("/usr/bin/mobility-agent", "/bin/true"))  # it looks whether the program is there
    command = [need("systemd-analyze"), "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if unit.NAME in line]  # not what it thinks of other units
    return "\n".join(said) + ("" if done.returncode in (0, 1) else f"\nstatus {done.returncode}")
