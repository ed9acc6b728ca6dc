"""The systemd unit of an agent, made from its settings, so that it asks for no more than its capture needs.

    inline, by NBD alone, or scan     a mount name space of its own, in which only what it writes to is writable
    inline, with files                the host's mounts, to which it adds
    trace                             the host's mounts, which it freezes

The capabilities are the same for all but for CAP_SYS_ADMIN, CAP_BPF and CAP_PERFMON, which only the last two have:
freezing, mounting and eBPF need them. CAP_SETUID and CAP_SETGID let hooks act as a database's own user. A disk is
opened by its owner's rights or its group's; CAP_DAC_READ_SEARCH and CAP_DAC_OVERRIDE are for those of neither.

A stop waits for the log and the disks to be made durable; SIGTERM goes to the agent alone, since its guards and its
keeper must outlive it by a moment. What was left frozen by a kill of both agent and guard is thawed afterwards.

Weak: systemd applies the hardening; where another supervisor runs the agent, it has whatever rights that one gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mobility_agent.settings import AgentSettings, CaptureKind

NAME: Final = "replicar-agent.service"
DIRECTORY: Final = Path("/etc/systemd/system")
#: The agent makes its log and disks durable within this when it is stopped.
STOP_SECONDS: Final = 90

BASE_CAPABILITIES: Final = ("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SETGID", "CAP_SETUID", "CAP_KILL")
HOST_CAPABILITIES: Final = ("CAP_SYS_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_SYS_RESOURCE")

_COMMON: Final = """\
[Unit]
Description=Replicar mobility agent: replicates this machine's disks
Wants=network-online.target
After=network-online.target local-fs.target
# It is the only thing that sees the disks' changes: it is started again for ever.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={program} run --settings {settings}
ExecReload=/bin/kill -HUP $MAINPID
ExecStopPost=-{program} thaw --settings {settings}
Restart=always
RestartSec=2
KillMode={kill_mode}
TimeoutStopSec={stop_seconds}
OOMScoreAdjust=-900
LimitNOFILE=65536
{environment}\
UMask=0077
RuntimeDirectory=replicar
RuntimeDirectoryPreserve=yes
CapabilityBoundingSet={capabilities}
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
KeyringMode=private
"""

_ISOLATED: Final = """\
ProtectSystem=strict
ReadWritePaths={writable}
PrivateTmp=yes
ProtectHome=read-only
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectClock=yes
RestrictNamespaces=yes
"""

_TARGET: Final = """
[Install]
WantedBy=multi-user.target
"""


def needs_host(settings: AgentSettings) -> bool:
    """Whether the agent has to see, freeze or make the host's mounts."""
    return settings.capture is CaptureKind.TRACE or bool(settings.files)


def capabilities(settings: AgentSettings) -> tuple[str, ...]:
    """What the unit leaves the agent of root's rights."""
    return (*BASE_CAPABILITIES, *HOST_CAPABILITIES) if needs_host(settings) else BASE_CAPABILITIES


def text(settings: AgentSettings, settings_path: Path, program: Path) -> str:
    """The unit file.

    Args:
        settings: checked; what `settings_path` says.
        program: the agent's command, or the archive that it is.
    """
    environment = ""
    if program.suffix == ".pyz":
        # Where the archive unpacks itself; by default that is the home directory, which a service should not use.
        environment = f"Environment=SHIV_ROOT={_quoted(str(settings.directory / 'program'))}\n"
    unit = _COMMON.format(
        program=_quoted(str(program)),
        settings=_quoted(str(settings_path)),
        stop_seconds=STOP_SECONDS,
        # The keeper of a file that is in use has to outlive a stop, or whoever uses it gets errors.
        kill_mode="process" if settings.files else "mixed",
        environment=environment,
        capabilities=" ".join(capabilities(settings)),
    )
    if not needs_host(settings) and settings.application is None:
        # (hooks are other people's programs, and reach their applications wherever these are)
        unit += _ISOLATED.format(writable=" ".join(_quoted(path) for path in writable(settings)))
    return unit + _TARGET


def writable(settings: AgentSettings) -> list[str]:
    """The directories that an agent writes below: its own, its sockets', and those of disks that are files."""
    paths = {settings.directory.absolute()}
    sockets = [address.path for address in settings.addresses.values() if address.path is not None]
    paths.update(socket.absolute().parent for socket in sockets)
    for disk in settings.disks:
        if not disk.path.is_block_device():
            paths.add(disk.path.absolute())
    within = {path for path in paths if any(other in path.parents for other in paths)}
    return sorted(str(path) for path in paths - within)


def _quoted(word: str) -> str:
    """One word of a unit's line; systemd's specifiers and variables have no meaning in it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or " " in word else word
