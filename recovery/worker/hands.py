"""What makes machines from a point's disks, and removes them: the worker's hands, for one compute.

QEMU runs on this host from exports of the sealed log, so a machine of any size has its disks at once; what it writes
goes to overlays. Everything here may be done twice, and what is gone already is fine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, Protocol

from recovery.compute.machine import DiskSource, Finding, MachineSpec, Power, Proof
from recovery.compute.qemu import QemuCompute, QemuSettings
from recovery.failback.carry import Origin
from recovery.failback.spans import Spans
from recovery.view import Progress, View
from recovery.worker.keeper import SOCKET, Exported, Keeper
from recovery.worker.made import SEEING, spec_of, wanted_of
from recovery.worker.settings import WorkerSettings
from replicar.control.messages import Job
from replicar.formats.record import Disk
from replicar.nbd.client import NbdClient

#: How long a failed-over machine has to end by itself before it is ended.
SHUT_DOWN_SECONDS: Final = 120.0


class Hands(Protocol):
    """Makes and removes machines. `name` is how jobs ask for it, `made` below what the machine is called."""

    @property
    def name(self) -> str: ...

    @property
    def is_local(self) -> bool:
        """Whether what it makes is on this host, and nobody else's to remove."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """The options of a job that mean something to it."""
        ...

    @property
    def notes(self) -> Mapping[str, str]:
        """What later jobs have to know to find again what it makes."""
        ...

    async def network(self, job: Job) -> str:
        """The network that a drill's machine goes into, in words."""
        ...

    async def findings(self, made: str, job: Job, view: View, *, isolated: bool) -> tuple[Finding, ...]:
        """What stands in the way."""
        ...

    async def give_disks(self, made: str, job: Job, view: View, progress: Progress) -> str:
        """Have the point's disks there, to run from; says of what they were made."""
        ...

    async def start(self, made: str, job: Job, *, isolated: bool) -> None: ...

    async def prove(self, made: str, job: Job, *, isolated: bool) -> Proof: ...

    async def remove_machine(self, made: str) -> None: ...

    async def remove_disks(self, made: str) -> None: ...

    async def complete(self, made: str, view: View, progress: Progress) -> None:
        """Have the machine's disks need the log no more."""
        ...

    async def shut_down(self, made: str, seconds: float) -> bool:
        """Have the machine off and its disks still there; whether it ended by itself within that time."""
        ...

    async def is_running(self, made: str) -> bool: ...

    async def check_way_home(self, made: str, disks: Sequence[Disk]) -> None:
        """Asked before the machine is shut down. Raises PermanentError: these disks of it can't be brought home."""
        ...

    async def diverged(self, made: str, view: View, progress: Progress) -> dict[str, Spans]:
        """By disk, what a machine that is off wrote since its point (the view); nobody reads the disks meanwhile."""
        ...

    async def origins(self, made: str, disks: Sequence[Disk], stack: AsyncExitStack) -> dict[str, Origin]:
        """By disk, what a machine that is off holds, to be read until the stack ends."""
        ...


class QemuHands:
    """Machines on this host."""

    name = "qemu"
    is_local = True
    reads = SEEING | {"memory_mib", "processors", "firmware", "bus", "ports"}
    notes: Mapping[str, str] = {}

    def __init__(self, settings: WorkerSettings, settings_file: Path | None) -> None:
        self._file = settings_file
        self._keeper = Keeper(settings.directory / "disks")
        self._compute = QemuCompute(QemuSettings(settings.directory / "machines", settings.accelerator))
        self._evidence = settings.directory / "evidence"

    async def findings(self, made: str, job: Job, view: View, *, isolated: bool) -> tuple[Finding, ...]:
        """See `Hands`."""
        where = self._keeper.at(made) / SOCKET
        disks = tuple(
            DiskSource(disk.name, f"nbd+unix:///{disk.name}?socket={where}", disk.size_bytes) for disk in view.disks
        )
        return await self._compute.findings(_spec(made, job, disks, isolated=isolated))

    async def network(self, job: Job) -> str:
        """See `Hands`."""
        return "the machine's own, which leads nowhere"

    async def give_disks(self, made: str, job: Job, view: View, progress: Progress) -> str:
        """See `Hands`."""
        await self._keeper.serve(made, Exported.of(view, job.machine, view.machine_id, self._file))
        return ""

    async def start(self, made: str, job: Job, *, isolated: bool) -> None:
        """See `Hands`."""
        await self._compute.create(_spec(made, job, self._keeper.sources(made), isolated=isolated))

    async def prove(self, made: str, job: Job, *, isolated: bool) -> Proof:
        """See `Hands`."""
        wanted = wanted_of(self._evidence / made, _options(job))
        return await self._compute.prove(_spec(made, job, self._keeper.sources(made), isolated=isolated), wanted)

    async def remove_machine(self, made: str) -> None:
        """See `Hands`."""
        await self._compute.remove(made)

    async def remove_disks(self, made: str) -> None:
        """See `Hands`."""
        await self._keeper.remove(made)

    async def complete(self, made: str, view: View, progress: Progress) -> None:
        """See `Hands`."""
        await self._keeper.complete(made, view, progress)

    async def shut_down(self, made: str, seconds: float) -> bool:
        """See `Hands`."""
        ended = await self._compute.shut_down(made, seconds)
        await self._compute.remove(made)
        return ended

    async def is_running(self, made: str) -> bool:
        """See `Hands`."""
        return await self._compute.power(made) is Power.RUNNING

    async def check_way_home(self, made: str, disks: Sequence[Disk]) -> None:
        """See `Hands`: its overlays are here, or `check_host` has said so."""

    async def diverged(self, made: str, view: View, progress: Progress) -> dict[str, Spans]:
        """See `Hands`."""
        return await self._keeper.changed(made)

    async def origins(self, made: str, disks: Sequence[Disk], stack: AsyncExitStack) -> dict[str, Origin]:
        """See `Hands`."""
        await self._keeper.again(made)
        found: dict[str, Origin] = {}
        for disk in self._keeper.sources(made):
            client = await NbdClient.connect(self._keeper.at(made) / SOCKET, export=disk.name)
            found[disk.name] = await stack.enter_async_context(client)
        return found


def _options(job: Job) -> Mapping[str, str]:
    return job.parameters.options


def _spec(made: str, job: Job, disks: tuple[DiskSource, ...], *, isolated: bool) -> MachineSpec:
    return spec_of(made, job, disks, isolated=isolated, options=_options(job))
