"""A machine that is to run from recovered disks, as data, and `Compute`: what a drill or a failover asks of whoever
runs it.

Everything in it may be asked again: a job that was killed between two steps carries the step out once more, and finds
what it left. `create` and `remove` are told apart from others' machines by name, so names are the job's to choose.

    findings -> create -> power, prove -> remove
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from replicar.errors import PermanentError

#: What both QEMU's directories and Azure's resources take as a name.
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,58}[a-z0-9])?")
MAX_DISKS: Final = 64
MAX_PORTS: Final = 16


class Firmware(StrEnum):
    """What starts the first disk; a disk with a GPT and an EFI system partition wants UEFI."""

    BIOS = "bios"
    UEFI = "uefi"


class Bus(StrEnum):
    """How disks and network appear. A physical server's system may have no drivers for virtio: then SATA and e1000."""

    VIRTIO = "virtio"
    SATA = "sata"


class Power(StrEnum):
    """Whether a machine is there, and on."""

    ABSENT = "absent"
    STOPPED = "stopped"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class DiskSource:
    """A disk to run from. `place`: for QEMU a raw file's path or an NBD URI, for Azure the URL of a VHD blob."""

    name: str
    place: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine to be made. The first disk is the one it boots from.

    `isolated`: it reaches nobody, and nobody reaches it but through `ports`, TCP ports of the guest that a check may
    use. `tags` say whose it is, where the compute can keep that.

    Raises:
        PermanentError: a name that not everybody takes, no disk, too many of something.
    """

    name: str
    disks: tuple[DiskSource, ...]
    memory_mib: int = 1024
    processors: int = 1
    firmware: Firmware = Firmware.BIOS
    bus: Bus = Bus.VIRTIO
    isolated: bool = True
    ports: tuple[int, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise PermanentError(
                f"{self.name!r} can't be the name of a machine that is made",
                hint="use lower-case letters, digits and dashes between them, 60 at most",
            )
        if not 1 <= len(self.disks) <= MAX_DISKS:
            raise PermanentError(f"{self.name}: a machine has 1 to {MAX_DISKS} disks, not {len(self.disks)}")
        if len({disk.name for disk in self.disks}) < len(self.disks):
            raise PermanentError(f"{self.name}: two disks have the same name")
        if len(self.ports) > MAX_PORTS or not all(0 < port < 65536 for port in self.ports):
            raise PermanentError(f"{self.name}: at most {MAX_PORTS} ports, each from 1 to 65535")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that stands in the way of making a machine (`blocking`), or that is to be known before."""

    what: str
    hint: str
    blocking: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to prove that a machine came up.

    `banner`: a pattern that a line of its console must match. `check`: a program of the operator's, see `check`.
    `evidence`: a directory for the console's log and a screenshot.
    """

    evidence: Path
    banner: str = ""
    banner_seconds: float = 300.0
    check: Path | None = None
    check_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen of a machine that came up: the line, seconds until it, and where the rest lies."""

    banner: str
    seconds: float
    console: Path
    screenshot: Path | None
    check_said: str = ""


class Compute(Protocol):
    """Runs recovered machines."""

    async def findings(self, spec: MachineSpec) -> tuple[Finding, ...]:
        """What is missing for this machine. Asked before anything is made, and makes nothing."""
        ...

    async def create(self, spec: MachineSpec) -> None:
        """Have the machine running. One that runs from the same spec is left as it is.

        Raises:
            ConflictError: one of that name runs from something else.
            PermanentError: it can't be made; says what was tried and what the platform said.
            TransientError: the platform is busy or away.
        """
        ...

    async def power(self, name: str) -> Power:
        """Whether it is there."""
        ...

    async def prove(self, spec: MachineSpec, wanted: Wanted) -> Proof:
        """Wait until the machine shows what is wanted.

        Raises:
            PermanentError: it stopped, did not show it in time, or the check found fault; with its last words.
        """
        ...

    async def shut_down(self, name: str, seconds: float) -> bool:
        """Ask the system in it to end, and wait so long; whether it did."""
        ...

    async def remove(self, name: str) -> None:
        """Have nothing left of it: no process, no resource, no file. One that is not there is removed already.

        Raises:
            PermanentError: something of that name is not what `create` makes; it is left alone.
        """
        ...
