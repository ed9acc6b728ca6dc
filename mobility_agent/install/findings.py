"""What `install` finds out about a machine before anything is changed: kernel, privileges, space, clock, and for each
disk what captures it and why.

A finding is a fact in words with a verdict. Only `FAILED` stands in the way; a `DOUBTFUL` one is for the operator to
weigh. Nothing here writes, and disks are not even opened for reading where sysfs and the mount table can tell.
"""

from __future__ import annotations

import asyncio
import os
import platform
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from mobility_agent.capture.trace.choice import Choice, Method, choose
from mobility_agent.capture.trace.freeze import filesystems_on
from mobility_agent.capture.trace.tracked import BlockDevice
from mobility_agent.install import clock, unit
from mobility_agent.preflight import check_journal_space
from mobility_agent.settings import AgentSettings, CaptureKind, DiskSettings
from mobility_agent.state import StateDirectory
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.control.messages import MAX_CLOCK_SKEW_SECONDS
from replicar.errors import PermanentError, ReplicarError

#: Below this, eBPF has no ring buffer, and trace capture falls back to tracefs.
RING_BUFFER_KERNEL: Final = (5, 8)
#: Off by more than this, points by the clock are surprising; off by MAX_CLOCK_SKEW_SECONDS, the machine is refused.
DOUBTFUL_SKEW_SECONDS: Final = 2.0
#: How long the config server may take to say what time it is.
ASK_SECONDS: Final = 10.0


class Verdict(StrEnum):
    GOOD = "good"
    DOUBTFUL = "doubtful"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` was looked at, what was found in words, and the next step where it is not good."""

    what: str
    verdict: Verdict
    text: str
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """A disk as the system shows it. `mountpoints`: of the writable file systems on it; `trace`: None for a file."""

    name: str
    path: Path
    is_block_device: bool
    size_bytes: int
    mountpoints: tuple[str, ...]
    trace: Choice | None


def look(settings: AgentSettings) -> list[Finding]:
    """Everything that is known before the agent runs."""
    return [
        *_machine(settings),
        *_clock(settings),
        *(finding for disk in settings.disks for finding in _disk(settings, disk)),
    ]


def disk_facts(name: str, path: Path, log_directory: Path) -> DiskFacts:
    """Raises:
    PermanentError: there is no such disk.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise PermanentError(
            f"disk {name}: {path} can't be looked at: {error.strerror}",
            hint="check the path",
            disk=name,
            path=str(path),
        ) from None
    if not stat.S_ISBLK(found.st_mode):
        return DiskFacts(name, path, False, found.st_size, (), None)
    device = BlockDevice(path)
    mounted = tuple(str(system.mountpoint) for system in filesystems_on(device.family()))
    size = int((device.directory / "size").read_text()) << 9
    return DiskFacts(name, path, True, size, mounted, choose(path, log_directory=log_directory))


def suggest(disks: list[DiskFacts]) -> tuple[CaptureKind, str]:
    """How to capture these disks, one way for all of them, and why.

    Raises:
        PermanentError: there is no way that fits all of them.
    """
    in_use = [disk for disk in disks if disk.mountpoints]
    if not in_use:
        return CaptureKind.INLINE, "no disk is mounted here: each is served over NBD, and every write is a point"
    served = [disk for disk in disks if not disk.is_block_device]
    if served:
        raise PermanentError(
            f"disk {in_use[0].name} is mounted here, and disk {served[0].name} is a file: they can't be captured alike",
            hint=f"unmount {in_use[0].path} and have it served; or protect them as two machines",
            disk=served[0].name,
        )
    for disk in in_use:
        if disk.trace is None or disk.trace.method is Method.NONE:
            raise PermanentError(
                f"disk {disk.name} is mounted at {disk.mountpoints[0]} and can't be traced:"
                f" {disk.trace.reason if disk.trace is not None else 'it is a file'}",
                hint=f"unmount {disk.path} and have it served",
                disk=disk.name,
            )
    return CaptureKind.TRACE, f"{in_use[0].path} is mounted at {in_use[0].mountpoints[0]} and stays so: it is followed"


def judge(facts: DiskFacts, capture: CaptureKind, served_at: str) -> Finding:
    """Whether a disk can be captured as the settings say, and what that means for it."""
    what = f"disk {facts.name}"
    if capture is CaptureKind.TRACE:
        if facts.trace is None or facts.trace.method is Method.NONE:
            reason = facts.trace.reason if facts.trace is not None else f"{facts.path} is no block device"
            return Finding(what, Verdict.FAILED, f"can't be traced: {reason}", 'or set capture = "inline"')
        where = f"mounted at {', '.join(facts.mountpoints)}" if facts.mountpoints else "not mounted now"
        text = f"trace by {facts.trace.method}, {where}, points at marks only: {facts.trace.reason}"
        return Finding(what, Verdict.GOOD, text)
    if capture is CaptureKind.SCAN:
        return Finding(what, Verdict.GOOD, f"scan of {facts.path}: a point where two passes find the same")
    if facts.mountpoints:
        return Finding(
            what,
            Verdict.FAILED,
            f"{facts.path} is mounted at {', '.join(facts.mountpoints)}: its writes would pass the agent by",
            'unmount it and use it through the agent; or set capture = "trace", which follows it where it is',
        )
    return Finding(what, Verdict.GOOD, f"inline, served at {served_at}: every write through it is a point")


def _machine(settings: AgentSettings) -> Iterator[Finding]:
    release = platform.release()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal())
    if settings.capture is CaptureKind.TRACE and version < RING_BUFFER_KERNEL:
        text = f"Linux {release} is older than 5.8: changes are followed by tracefs, at a higher cost"
        yield Finding("kernel", Verdict.DOUBTFUL, text, "a newer kernel halves that cost")
    else:
        yield Finding("kernel", Verdict.GOOD, f"Linux {release} on {platform.machine()}")
    if os.geteuid() == 0:
        yield Finding(
            "privileges", Verdict.GOOD, "root, of which the unit keeps " + ", ".join(unit.capabilities(settings))
        )
    elif unit.needs_host(settings):
        yield Finding("privileges", Verdict.FAILED, "not root", "this way of capture needs root")
    else:
        yield Finding("privileges", Verdict.DOUBTFUL, "not root", "the unit can be written and started by root only")
    yield _space(settings)
    yield _identity(settings)


def _space(settings: AgentSettings) -> Finding:
    existing = next(path for path in (settings.directory, *settings.directory.parents) if path.exists())
    try:
        check_journal_space(settings, settings.directory / "log", where=existing)
    except PermanentError as error:
        return Finding("space", Verdict.FAILED, error.message, error.hint)
    return Finding("space", Verdict.GOOD, f"the change log's {int(settings.journal_bytes):,} bytes fit at {existing}")


def _identity(settings: AgentSettings) -> Finding:
    path = settings.directory / "identity"
    try:
        identity = Identity.load(path)
    except ReplicarError as error:
        hint = f"enrol it: `mobility-agent enrol --directory {settings.directory}`"
        return Finding("identity", Verdict.FAILED, error.message, hint)
    return Finding("identity", Verdict.GOOD, f"enrolled as {identity.name} with the vault {identity.vault}")


def _clock(settings: AgentSettings) -> Iterator[Finding]:
    synchronised = clock.is_synchronised()
    if synchronised:
        yield Finding("clock", Verdict.GOOD, "is kept right by a time service")
    elif synchronised is None:
        yield Finding("clock", Verdict.DOUBTFUL, "the kernel does not say whether it is kept right")
    else:
        hint = "run chrony or systemd-timesyncd: recovery points carry this machine's time"
        yield Finding("clock", Verdict.DOUBTFUL, "nothing keeps it right", hint)
    try:
        identity = Identity.load(settings.directory / "identity")
    except ReplicarError:
        return  # `_identity` says so
    try:
        skew = asyncio.run(_skew_seconds(identity))
    except (ReplicarError, TimeoutError) as error:
        text = f"the config server could not be asked: {error or 'no answer'}"
        yield Finding("config server", Verdict.DOUBTFUL, text, "replication begins once it can be reached")
        return
    text = f"{identity.config_server} answers; the clocks differ by {abs(skew):.1f} s"
    if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
        yield Finding("config server", Verdict.FAILED, text, "set this machine's clock; it is refused like this")
    elif abs(skew) > DOUBTFUL_SKEW_SECONDS:
        yield Finding("config server", Verdict.DOUBTFUL, text, "have both kept right by the same time service")
    else:
        yield Finding("config server", Verdict.GOOD, text)


def _served_at(settings: AgentSettings, disk: DiskSettings) -> str:
    return " and ".join(str(found[disk.name]) for found in (settings.addresses, settings.files) if disk.name in found)


async def _skew_seconds(identity: Identity) -> float:
    async with asyncio.timeout(ASK_SECONDS), ControlClient(identity) as client:
        before = time.time_ns()
        told = (await client.vault()).time_ns
        return (told - (before + time.time_ns()) / 2) / 1e9


def _disk(settings: AgentSettings, disk: DiskSettings) -> Iterator[Finding]:
    what = f"disk {disk.name}"
    try:
        facts = disk_facts(disk.name, disk.path, settings.directory / "log")
    except PermanentError as error:
        yield Finding(what, Verdict.FAILED, error.message, error.hint)
        return
    yield judge(facts, settings.capture, _served_at(settings, disk))
    if settings.directory.is_dir() and StateDirectory(settings.directory).is_running():
        return  # its own agent holds the disk
    if os.geteuid() == 0 or os.access(disk.path, os.R_OK):
        size = facts.size_bytes
        if not size or size % 512:
            text = f"{disk.path} has {size} bytes, which is no whole number of sectors of 512"
            yield Finding(what, Verdict.FAILED, text, f"`truncate -s %512 {disk.path}`")
    else:
        yield Finding(what, Verdict.FAILED, f"{disk.path} can't be read by this user", "run as root")
