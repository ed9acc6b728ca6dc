"""Hands in Azure: each disk of the point becomes a fixed VHD in a page blob, from which Azure imports a managed disk.

An instant view can't be attached to a machine there, so `give_disks` makes whole disks: from the warm replica and what
the log has besides (`recovery.replica.basis`), or from the log alone, which takes as long as disks are large. After a
death a blob that is complete (its footer is written last, and says the id in its metadata) is left as it is, and one
that is not is made anew; a job's point is noted before, so it is the same bytes.

    VHDs       <made>/<number>-<disk>.vhd in the container of `[azure.disks]`, which lies in the target's account
    the rest   in the target's resource group, by names made from <made>: see `recovery.compute.azure`

The resource group is noted in the job, and so are later jobs' hands made: what a failover made is found and removed
where it is, whatever became of the target settings.

The way home is in `recovery.worker.azure_home`.

**It has not met the real cloud**: tests put the real SDK, the real config server and a real Azurite against a stand-in
for Resource Manager and for managed disks.

Weak: the VHDs stay beside the managed disks until the machine is cleaned up, since nobody here knows for how long Azure
reads from them; they are paid for twice.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote, urlsplit

from azure.core.credentials_async import AsyncTokenCredential

from recovery.compute.azure import AzureCompute, AzureTarget
from recovery.compute.machine import DiskSource, Finding, MachineSpec, Power, Proof
from recovery.compute.snapshots import Moment
from recovery.failback.carry import Origin
from recovery.failback.spans import Spans
from recovery.output import VHD_ID, write_vhd_blob
from recovery.pins import holding
from recovery.replica.basis import Basis, find_basis, make_vhd
from recovery.view import Progress, View
from recovery.worker.azure_home import ManagedDisks
from recovery.worker.made import SEEING, shifted, spec_of, wanted_of
from recovery.worker.settings import AzureSettings
from replicar.clock import Clock
from replicar.control.messages import AZURE_NEEDS, Job, TargetSettings
from replicar.errors import ConflictError, CorruptionError, PermanentError
from replicar.formats import vhd
from replicar.formats.record import Disk
from replicar.moments import format_moment
from replicar.storage.entra import TokenCredential, credential
from replicar.storage.store import PageBlobStore, is_gone
from replicar.storage.target import StorageTarget, open_store

_log = logging.getLogger(__name__)
SYSTEMS: Final = ("Linux", "Windows")


class AzureHands:
    """See `recovery.worker.hands.Hands`, and the module.

    Args:
        target: what the machine is to be made of.
        logs: where the machine's log is, and its warm replica.
        made_in: the resource group, where an earlier job has chosen it.
        tokens: gives the credential; None: the identity that the settings name.
        options: for the SDK's clients.
    """

    name = "azure"
    is_local = False
    reads = SEEING | {"firmware", "system", "replica"}

    def __init__(
        self,
        settings: AzureSettings,
        target: TargetSettings,
        evidence: Path,
        clock: Clock,
        *,
        logs: StorageTarget | None = None,
        made_in: str = "",
        tokens: Callable[[], TokenCredential] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings, self._evidence, self._clock, self._logs = settings, evidence, clock, logs
        self._target = target.model_copy(update={"resource_group": made_in}) if made_in else target
        self._tokens = tokens or (lambda: credential(settings.identity, settings.identity_client_id))
        self._options = options

    @property
    def notes(self) -> Mapping[str, str]:
        """See `Hands`."""
        return {"resource_group": self._target.resource_group}

    async def findings(self, made: str, job: Job, view: View, *, isolated: bool) -> tuple[Finding, ...]:
        """See `Hands`."""
        if missing := [name for name in AZURE_NEEDS if not getattr(self._target, name)]:
            hint = f"`replicar target set {job.machine} --help`"
            return (Finding(f"the target settings of {job.machine} do not say {', '.join(missing)}", hint),)
        if job.parameters.options.get("replica", "use") not in ("use", "leave"):
            return (Finding("the option replica is use or leave", "leave it out to use a warm replica"),)
        found = []
        if (account := account_of(self._settings.disks)) != self._target.storage_account:
            found.append(
                Finding(
                    f"this worker writes disks to the storage account {account}, and the target settings of "
                    f"{job.machine} say {self._target.storage_account}",
                    "correct either: [azure.disks] in the worker's settings, or `replicar target set`",
                )
            )
        disks = tuple(
            DiskSource(disk.name, self._url(blob_name(made, number, disk)), vhd.virtual_bytes(disk.size_bytes))
            for number, disk in enumerate(view.disks)
        )
        async with self._compute(job) as compute:
            return (*found, *await compute.findings(self._spec(made, job, disks, isolated=isolated)))

    async def network(self, job: Job) -> str:
        """See `Hands`."""
        return f"{job.parameters.network or self._target.drill_network}, which is peered with no other"

    async def give_disks(self, made: str, job: Job, view: View, progress: Progress) -> str:
        """See `Hands`: from the warm replica where there is one that will do, else from the log alone."""
        sizes = {disk.name: await view.data_bytes(disk) for disk in view.disks}
        total, done, said = sum(sizes.values()), 0, list[str]()
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(open_store(self._settings.disks, clock=self._clock))
            await store.ensure_container()
            await stack.enter_async_context(holding(view.log, view.state, clock=self._clock, random=os.urandom))
            basis = await self._basis(job, view, stack)
            for number, disk in enumerate(view.disks):
                name = blob_name(made, number, disk)
                if not await is_whole(store, name, vhd.virtual_bytes(disk.size_bytes)):
                    counted = shifted(progress, done, total)
                    said.append(await self._vhd(basis, view, disk, store, name, counted))
                done += sizes[disk.name]
                progress(done, total)
        return "; ".join(said)

    async def _basis(self, job: Job, view: View, stack: AsyncExitStack) -> Basis | None:
        """What the disks can be made from; a replica in another account is none: the service copies within one."""
        logs, is_asked = self._logs, job.parameters.options.get("replica", "use") == "use"
        if not is_asked or logs is None or logs.access().url != self._settings.disks.access().url:
            return None
        return await find_basis(view, stack, clock=self._clock, random_bytes=os.urandom)

    async def _vhd(
        self, basis: Basis | None, view: View, disk: Disk, store: PageBlobStore, name: str, progress: Progress
    ) -> str:
        why = ""
        if basis is not None and self._logs is not None:
            try:
                count = await make_vhd(
                    *(basis, view, disk, store, name),
                    container=self._logs.container,
                    clock=self._clock,
                    random_bytes=os.urandom,
                )
            except (PermanentError, CorruptionError, ConflictError) as error:
                _log.warning("disk %s is made from the log alone: %s", disk.name, error)
                why = f", since {error.message}"
            else:
                return (
                    f"{disk.name}: the replica of {format_moment(basis.point.time_ns)}, and {count:,} bytes of the log"
                )
        await write_vhd_blob(view, disk, store, name, replace=True, progress=progress, clock=self._clock)
        return f"{disk.name}: from the log alone{why}"

    async def start(self, made: str, job: Job, *, isolated: bool) -> None:
        """See `Hands`."""
        spec = self._spec(made, job, await self._disks(made), isolated=isolated)
        async with self._compute(job) as compute:
            await compute.create(spec)

    async def prove(self, made: str, job: Job, *, isolated: bool) -> Proof:
        """See `Hands`."""
        spec = self._spec(made, job, await self._disks(made), isolated=isolated)
        async with self._compute(job) as compute:
            return await compute.prove(spec, wanted_of(self._evidence / made, job.parameters.options))

    async def remove_machine(self, made: str) -> None:
        """See `Hands`; its managed disks go with it."""
        async with self._compute() as compute:
            await compute.remove(made)

    async def remove_disks(self, made: str) -> None:
        """See `Hands`."""
        async with open_store(self._settings.disks, clock=self._clock) as store:
            if not await store.container_exists():
                return
            for blob in await store.list(f"{made}/"):
                await store.delete(blob.name)

    async def complete(self, made: str, view: View, progress: Progress) -> None:
        """See `Hands`: managed disks are copies already."""

    async def shut_down(self, made: str, seconds: float) -> bool:
        """See `Hands`; what an earlier failback read its disks from is gone then."""
        async with self._compute() as compute:
            ended = await compute.shut_down(made, seconds)
            await compute.deallocate(made)
            for disk in await compute.snapshots.disks(made):
                await compute.snapshots.delete(disk, Moment.HOME)
        return ended

    async def is_running(self, made: str) -> bool:
        """See `Hands`."""
        async with self._compute() as compute:
            return await compute.power(made) is Power.RUNNING

    async def check_way_home(self, made: str, disks: Sequence[Disk]) -> None:
        """See `Hands`."""
        async with AsyncExitStack() as stack:
            await (await self._managed(made, disks, stack)).there()

    async def diverged(self, made: str, view: View, progress: Progress) -> dict[str, Spans]:
        """See `Hands`."""
        async with AsyncExitStack() as stack:
            return await (await self._managed(made, view.disks, stack)).diverged(view, progress)

    async def origins(self, made: str, disks: Sequence[Disk], stack: AsyncExitStack) -> dict[str, Origin]:
        """See `Hands`."""
        return await (await self._managed(made, disks, stack)).origins()

    async def _managed(self, made: str, disks: Sequence[Disk], stack: AsyncExitStack) -> ManagedDisks:
        compute = await stack.enter_async_context(self._compute())
        trust = ssl.create_default_context(cafile=self._settings.authority_file)
        return ManagedDisks(compute.snapshots, made, disks, stack, trust=trust, clock=self._clock)

    async def _disks(self, made: str) -> tuple[DiskSource, ...]:
        """What `give_disks` has made."""
        async with open_store(self._settings.disks, clock=self._clock) as store:
            blobs = await store.list(f"{made}/")
        return tuple(
            DiskSource(_disk_of(blob.name), self._url(blob.name), blob.size_bytes - vhd.FOOTER_BYTES) for blob in blobs
        )

    def _spec(self, made: str, job: Job, disks: tuple[DiskSource, ...], *, isolated: bool) -> MachineSpec:
        return spec_of(made, job, disks, isolated=isolated, options=job.parameters.options)

    def _url(self, blob: str) -> str:
        disks = self._settings.disks
        return f"{disks.access().url}/{disks.container}/{quote(blob)}"

    @asynccontextmanager
    async def _compute(self, job: Job | None = None) -> AsyncIterator[AzureCompute]:
        settings, tokens = self._settings, self._tokens()
        target = azure_target(settings, self._target, job)
        try:
            async with AzureCompute(
                target,
                cast(AsyncTokenCredential, tokens),
                clock=self._clock,
                authority_file=settings.authority_file,
                options=self._options,
            ) as compute:
                yield compute
        finally:
            await tokens.close()


def azure_target(settings: AzureSettings, target: TargetSettings, job: Job | None) -> AzureTarget:
    """What Resource Manager is told, of target settings and what a job asks besides.

    Everything lies in the machine's own resource group. A job's network takes the place of the settings' one; the
    subnet has the same name in both networks.

    Raises:
        PermanentError: a system that Azure does not know.
    """
    group = f"/subscriptions/{settings.subscription_id}/resourceGroups/{target.resource_group}/providers"
    asked = job.parameters.network if job is not None else ""
    system = job.parameters.options.get("system", SYSTEMS[0]) if job is not None else SYSTEMS[0]
    if system not in SYSTEMS:
        raise PermanentError(f"the option system is {' or '.join(SYSTEMS)}", hint="leave it out for Linux")

    def subnet(network: str) -> str:
        return f"{group}/Microsoft.Network/virtualNetworks/{network}/subnets/{target.subnet}" if network else ""

    chosen = target.availability_set
    availability_set = f"{group}/Microsoft.Compute/availabilitySets/{chosen}" if chosen else ""
    return AzureTarget(
        subscription_id=settings.subscription_id,
        resource_group=target.resource_group,
        location=target.location,
        size=target.size,
        subnet_id=subnet(asked or target.network),
        drill_subnet_id=subnet(asked or target.drill_network),
        storage_account_id=f"{group}/Microsoft.Storage/storageAccounts/{target.storage_account}",
        availability_set_id=availability_set,
        disk_kind=target.disk_kind,
        system=system,
        endpoint=settings.endpoint,
    )


def account_of(disks: StorageTarget) -> str:
    """The storage account that page blobs of these settings lie in."""
    return disks.account_name or (urlsplit(disks.access().url).hostname or "").partition(".")[0]


def blob_name(made: str, number: int, disk: Disk) -> str:
    """A disk's VHD; sorted by name they are in the machine's order."""
    return f"{made}/{number:02}-{re.sub(r'[^a-zA-Z0-9._-]', '-', disk.name)[:60]}.vhd"


def _disk_of(blob: str) -> str:
    return blob.rpartition("/")[2].removesuffix(".vhd")


async def is_whole(store: PageBlobStore, name: str, size: int) -> bool:
    """Whether the blob is a VHD of that size, written to its end."""
    try:
        known = (await store.properties(name)).metadata.get(VHD_ID)
        footer = vhd.read_footer(await store.read(name, size, vhd.FOOTER_BYTES))
    except CorruptionError:
        return False
    except PermanentError as error:
        if is_gone(error):
            return False
        raise
    return footer.virtual_bytes == size and str(footer.unique_id) == known
