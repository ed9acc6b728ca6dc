"""Which steps install the agent, and which remove it: pure functions from settings and places to a plan.

Removing leaves the disks as they are: the agent never wrote anything to them but what their users wrote through it.
What is taken away is the agent's own: its unit, what it froze or attached, its program if it was put there by
`install`, and its state only if that is asked for, since the state is what replication goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mobility_agent.install import unit
from mobility_agent.install.plan import Command, CopyProgram, MakeDirectory, Remove, Step, WriteFile
from mobility_agent.settings import AgentSettings, CaptureKind

#: Where an archive is put for the service to run from; a program of a package stays where it is.
PROGRAM: Final = Path("/usr/local/bin/mobility-agent.pyz")
SYSTEMCTL: Final = "systemctl"


def install(
    settings: AgentSettings,
    settings_path: Path,
    program: Path,
    *,
    units: Path = unit.DIRECTORY,
    copy_to: Path = PROGRAM,
    settings_text: str | None = None,
    start: bool,
) -> list[Step]:
    """The steps, in their order.

    Args:
        program: what runs now; an archive (.pyz) is copied to `copy_to`.
        settings_text: to be written to `settings_path`; None if that is there already.
        start: whether systemd is to be told.
    """
    steps: list[Step] = []
    if settings_text is not None:
        steps.append(WriteFile(settings_path, settings_text, 0o600))
    steps.append(MakeDirectory(settings.directory))
    if settings.capture is CaptureKind.INLINE:
        sockets = [address.path for address in settings.addresses.values() if address.path is not None]
        steps += [MakeDirectory(socket.parent, 0o700) for socket in sockets]
    if program.suffix == ".pyz":
        steps.append(CopyProgram(program, copy_to))
        program = copy_to
    steps.append(WriteFile(units / unit.NAME, unit.text(settings, settings_path, program)))
    if start:
        steps += [
            Command((SYSTEMCTL, "daemon-reload")),
            Command((SYSTEMCTL, "enable", unit.NAME)),
            Command((SYSTEMCTL, "restart", unit.NAME)),
        ]
    return steps


def uninstall(
    settings: AgentSettings,
    settings_path: Path,
    program: Path,
    *,
    units: Path = unit.DIRECTORY,
    copied_to: Path = PROGRAM,
    leftovers: list[Path],
    stop: bool,
    purge: bool,
) -> list[Step]:
    """The steps after which nothing of the agent is left but, without `purge`, its state.

    Args:
        program: what runs now, and thaws and detaches what a killed agent left.
        leftovers: paths that a killed agent left behind, as found on this machine.
        stop: whether systemd is to be told.
    """
    steps: list[Step] = []
    installed = units / unit.NAME
    if stop and installed.exists():
        steps.append(Command((SYSTEMCTL, "disable", "--now", unit.NAME)))
    steps.append(Command((str(program), "thaw", "--settings", str(settings_path))))
    steps += [Remove(path) for path in leftovers]
    steps.append(Remove(installed))
    if stop:
        steps.append(Command((SYSTEMCTL, "daemon-reload")))
    steps.append(Remove(copied_to))
    steps.append(Remove(settings.directory / "program"))  # where the archive unpacked itself
    if purge:
        steps.append(Remove(settings.directory))
    return steps
