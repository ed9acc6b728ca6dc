"""A plan does what is left to do, stops where it can't go on, and may be run again."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from mobility_agent.capture.trace.choice import Choice, Method
from mobility_agent.install import clients, clock, findings, steps, unit
from mobility_agent.install.findings import DiskFacts
from mobility_agent.install.plan import Command, Remove, Step, WriteFile, carry_out, run_command
from mobility_agent.settings import AgentSettings, CaptureKind, DiskSettings, NbdAddress
from replicar.errors import PermanentError

TRACEABLE = Choice(Method.BPF, "eBPF works")
UNTRACEABLE = Choice(Method.NONE, "it is a zoned disk")


class Machine:
    """A machine's directories, and the commands that it was given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: list[str] = []
        self.commands: list[tuple[str, ...]] = []
        self.program = directory / "download" / "mobility-agent.pyz"
        self.program.parent.mkdir()
        self.program.write_bytes(b"an archive")
        self.settings = AgentSettings(
            directory=directory / "state", disks=(DiskSettings(name="data", path=directory / "data.img"),)
        )

    def install(self) -> list[Step]:
        return steps.install(
            self.settings,
            self.directory / "agent.toml",
            self.program,
            units=self.directory / "units",
            copy_to=self.directory / "bin" / "mobility-agent.pyz",
            settings_text="directory = 'state'\n",
            start=True,
        )

    def uninstall(self, *, purge: bool) -> list[Step]:
        return steps.uninstall(
            self.settings,
            self.directory / "agent.toml",
            self.program,
            units=self.directory / "units",
            copied_to=self.directory / "bin" / "mobility-agent.pyz",
            leftovers=[self.directory / "state" / "nbd" / "data.sock"],
            stop=True,
            purge=purge,
        )

    def run(self, words: Sequence[str]) -> None:
        self.commands.append(tuple(words))

    def carry_out(self, plan: Sequence[Step]) -> None:
        self.said.clear()
        carry_out(plan, self.said.append, run=self.run)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_an_installed_agent_is_enabled_and_runs_the_copy_of_the_archive(machine: Machine) -> None:
    machine.carry_out(machine.install())
    made = (machine.directory / "units" / unit.NAME).read_text()
    assert f"ExecStart={machine.directory}/bin/mobility-agent.pyz run" in made
    assert [words[1] for words in machine.commands] == ["daemon-reload", "enable", "restart"]
    assert (machine.directory / "bin" / "mobility-agent.pyz").stat().st_mode & 0o777 == 0o755


def test_installing_again_writes_nothing_again(machine: Machine) -> None:
    machine.carry_out(machine.install())
    machine.carry_out(machine.install())
    assert all(said.startswith("run systemctl") for said in machine.said)


def test_an_uninstalled_agent_leaves_its_state_alone(machine: Machine) -> None:
    machine.carry_out(machine.install())
    machine.carry_out(machine.uninstall(purge=False))
    assert sorted(path.name for path in machine.directory.rglob("*") if path.is_file()) == [
        "agent.toml",
        "mobility-agent.pyz",  # the download
    ]
    assert (machine.directory / "state").is_dir()


def test_a_purged_agent_leaves_no_state(machine: Machine) -> None:
    machine.carry_out(machine.install())
    machine.carry_out(machine.uninstall(purge=True))
    assert not (machine.directory / "state").exists()


def test_uninstalling_stops_the_agent_before_anything_is_removed(machine: Machine) -> None:
    machine.carry_out(machine.install())
    plan = machine.uninstall(purge=True)
    first_removal = next(number for number, step in enumerate(plan) if isinstance(step, Remove))
    assert Command(("systemctl", "disable", "--now", unit.NAME)) in plan[:first_removal]


def test_a_step_that_fails_names_itself_and_ends_the_plan(machine: Machine) -> None:
    blocked = machine.directory / "file"
    blocked.write_text("no directory")
    after = machine.directory / "after"
    with pytest.raises(PermanentError, match=f"could not write {blocked}/below"):
        machine.carry_out([WriteFile(blocked / "below", ""), WriteFile(after, "")])
    assert not after.exists()


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(PermanentError, match=r"status 3: no such unit"):
        run_command(["sh", "-c", "echo no such unit >&2; exit 3"])


def test_a_connected_client_is_counted_and_one_that_left_is_not(tmp_path: Path) -> None:
    address = NbdAddress(path=tmp_path / "data.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address.path))
        server.listen()
        assert clients.count(address) == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(address.path))
            accepted, _ = server.accept()
            assert clients.count(address) == 1
            accepted.close()
        assert clients.count(address) == 0


def test_a_client_over_tcp_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            with accepted:
                assert clients.count(NbdAddress(host="127.0.0.1", port=port)) == 1


def disk(*mountpoints: str, trace: Choice | None = TRACEABLE) -> DiskFacts:
    return DiskFacts("data", Path("/dev/sdb"), trace is not None, 1 << 30, mountpoints, trace)


def test_a_disk_that_nobody_has_mounted_is_served() -> None:
    assert findings.suggest([disk(), disk(trace=None)])[0] is CaptureKind.INLINE


def test_a_mounted_disk_is_followed_where_it_is() -> None:
    kind, why = findings.suggest([disk("/srv"), disk()])
    assert kind is CaptureKind.TRACE
    assert "/srv" in why


@pytest.mark.parametrize("other", [disk(trace=None), disk("/var", trace=UNTRACEABLE)])
def test_disks_that_nothing_fits_alike_are_refused(other: DiskFacts) -> None:
    with pytest.raises(PermanentError, match="can't be"):
        findings.suggest([disk("/srv"), other])


def test_serving_a_mounted_disk_is_found_to_fail() -> None:
    found = findings.judge(disk("/srv"), CaptureKind.INLINE, "a socket")
    assert found.verdict is findings.Verdict.FAILED
    assert "trace" in found.hint


def test_a_disk_that_can_not_be_traced_says_why() -> None:
    found = findings.judge(disk(trace=UNTRACEABLE), CaptureKind.TRACE, "")
    assert found.verdict is findings.Verdict.FAILED
    assert UNTRACEABLE.reason in found.text


def test_the_kernels_word_on_its_clock_can_be_had() -> None:
    assert clock.is_synchronised() in (True, False)
