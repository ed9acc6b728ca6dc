"""Machines in Azure, through its SDK: managed disks from VHD blobs, a network interface, a virtual machine.

    disk       created by import from the page blob that recovery wrote; the blob stays, the disk is a copy
    snapshot   of each disk, incremental, before the machine first runs: the way home asks it what was written since
               (not of a drill's)
    interface  in the target's subnet; a drill's in `drill_subnet_id`, whose network must have no peering
    machine    the disks attached, the first one as the system's; boot diagnostics on, for console and screenshot

Every resource is put by a name made from the machine's and carries the tag `replicar-machine`, so that asking again
changes nothing, and `remove` takes what carries the tag and nothing else, whatever a killed job left.

**It has not met the real cloud.** It is tested at the HTTP boundary: the real SDK against a server of ours that answers
as the reference of Azure Resource Manager says. What only Azure knows (quotas, sizes and disk kinds that don't go
together, how long an import takes) will show there first.

Weak: there are no `ports` in Azure; a check gets the resource id instead, and brings its own way to reach the machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
from azure.core.credentials_async import AsyncTokenCredential
from azure.core.exceptions import ResourceNotFoundError
from azure.mgmt.compute.aio import ComputeManagementClient
from azure.mgmt.network.aio import NetworkManagementClient

from recovery.compute.answers import said
from recovery.compute.check import run_check
from recovery.compute.console import Console
from recovery.compute.machine import Finding, Firmware, MachineSpec, Power, Proof, Wanted
from recovery.compute.snapshots import TAG, Moment, Snapshots
from replicar.clock import Clock
from replicar.errors import ConflictError, PermanentError, TransientError

SPEC_TAG: Final = "replicar-spec"
_log = logging.getLogger(__name__)
#: Azure's boot diagnostics lag behind the machine by about this much.
LOOK_SECONDS: Final = 10.0
#: What is fetched of a console or a screenshot.
MAX_EVIDENCE_BYTES: Final = 32 << 20
#: Of the links to them.
_LINK_MINUTES: Final = 10
_MIB: Final = 1 << 20
_ARM_ID: Final = re.compile(
    r"/subscriptions/[^/]+/resourceGroups/([^/]+)/providers/([^/]+)/([^/]+)/([^/]+)(?:/.+)?", re.I
)


@dataclass(frozen=True, slots=True)
class AzureTarget:
    """Where machines are made; ids are those of Azure Resource Manager.

    `endpoint` is Resource Manager's address, for clouds other than the public one; empty for that.
    """

    subscription_id: str
    resource_group: str
    location: str
    size: str
    subnet_id: str
    storage_account_id: str
    drill_subnet_id: str = ""
    availability_set_id: str = ""
    disk_kind: str = "StandardSSD_LRS"
    system: str = "Linux"
    endpoint: str = ""


class AzureCompute:
    """Machines in Azure; see the module. An asynchronous context manager.

    Args:
        credential: of azure-identity, or any that gives tokens.
        authority_file: PEM certificates to believe instead of the system's (Azure Stack Hub).
        options: for both clients of the SDK.
    """

    def __init__(
        self,
        target: AzureTarget,
        credential: AsyncTokenCredential,
        *,
        clock: Clock,
        authority_file: Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._target, self._clock = target, clock
        self._trust = ssl.create_default_context(cafile=authority_file)
        given = dict(options or {})
        if authority_file is not None:
            given["connection_verify"] = str(authority_file)
        if target.endpoint:
            given |= {"base_url": target.endpoint, "credential_scopes": [target.endpoint.rstrip("/") + "/.default"]}
        self._compute = ComputeManagementClient(credential, target.subscription_id, **given)
        self._network = NetworkManagementClient(credential, target.subscription_id, **given)
        self._stack = AsyncExitStack()
        self.snapshots = Snapshots(self._compute, target.resource_group, target.location)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._compute)
        await self._stack.enter_async_context(self._network)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def findings(self, spec: MachineSpec) -> tuple[Finding, ...]:
        """See `Compute`."""
        found = list(_unfit(spec, self._target))
        subnet = self._subnet(spec)
        match = _ARM_ID.fullmatch(subnet)
        if match is None:
            found.append(Finding(f"{subnet!r} is no subnet's id", "copy it whole, from /subscriptions/ on"))
            return tuple(found)
        async with said("look at the network"):
            try:
                network = await self._network.virtual_networks.get(match[1], match[4])
            except ResourceNotFoundError:
                found.append(Finding(f"there is no network {match[4]}", "make it, or correct the target's subnet"))
            else:
                if spec.isolated and network.virtual_network_peerings:
                    hint = "a drill's machine must reach nobody: use a network without peerings"
                    found.append(Finding(f"the network {match[4]} is peered with others", hint))
        return tuple(found)

    async def create(self, spec: MachineSpec) -> None:
        """See `Compute`."""
        blocking = [each for each in await self.findings(spec) if each.blocking]
        if blocking:
            raise PermanentError(f"{spec.name} can't be made: {blocking[0].what}", hint=blocking[0].hint)
        group, tags = self._target.resource_group, self._tags(spec)
        if (existing := await self._machine(spec.name)) is not None:
            theirs = (existing.tags or {}).get(SPEC_TAG)
            if theirs == tags[SPEC_TAG]:
                return
            raise ConflictError(
                f"there is a machine {spec.name} in {group} already, made from something else",
                hint="clean it up first, or give this one another name",
                ours=tags[SPEC_TAG],
                theirs=theirs,
            )
        disks = []
        for number, disk in enumerate(spec.disks):
            async with said(f"make the disk {disk.name} of {spec.name}"):
                made = await self._compute.disks.begin_create_or_update(
                    group, disk_name(spec, number), _disk(spec, number, self._target, tags)
                )
                disks.append(str((await made.result()).id))
        if not spec.isolated:
            await self._base(spec, tags)
        async with said(f"make the network interface of {spec.name}"):
            interface = await self._network.network_interfaces.begin_create_or_update(
                group, f"{spec.name}-nic", _interface(self._target, self._subnet(spec), tags)
            )
            interface_id = str((await interface.result()).id)
        async with said(f"make the machine {spec.name}"):
            machine = await self._compute.virtual_machines.begin_create_or_update(
                group, spec.name, _machine(self._target, disks, interface_id, tags)
            )
            await machine.result()

    async def _base(self, spec: MachineSpec, tags: Mapping[str, str]) -> None:
        """Keep what the disks hold now, if they can't have been written to yet. A failover does not fail over this: the
        way home compares disks in full that have no such snapshot."""
        for disk in await self.snapshots.disks(spec.name):
            if not disk.was_attached:
                try:
                    await self.snapshots.take(spec.name, disk, Moment.BASE, tags)
                except PermanentError as error:
                    _log.warning("%s can be brought home at the price of reading it in full: %s", spec.name, error)

    async def power(self, name: str) -> Power:
        """See `Compute`."""
        if await self._machine(name) is None:
            return Power.ABSENT
        async with said(f"look at {name}"):
            view = await self._compute.virtual_machines.instance_view(self._target.resource_group, name)
        codes = {status.code for status in view.statuses or ()}
        return Power.RUNNING if "PowerState/running" in codes else Power.STOPPED

    async def prove(self, spec: MachineSpec, wanted: Wanted) -> Proof:
        """See `Compute`."""
        wanted.evidence.mkdir(parents=True, exist_ok=True)
        log, screenshot = wanted.evidence / "console.log", wanted.evidence / "screen.bmp"
        began = self._clock.monotonic()
        banner = await self._banner(spec.name, wanted, log, screenshot)
        seconds, told_by_check = self._clock.monotonic() - began, ""
        if wanted.check is not None:
            told = {
                "REPLICAR_MACHINE": spec.name,
                "REPLICAR_CONSOLE_LOG": str(log),
                "REPLICAR_EVIDENCE": str(wanted.evidence),
                "REPLICAR_RESOURCE": await self._resource(spec.name),
            }
            told_by_check = await run_check(wanted.check, told, wanted.check_seconds)
        return Proof(banner, seconds, log, screenshot if screenshot.exists() else None, told_by_check)

    async def _banner(self, name: str, wanted: Wanted, log: Path, screenshot: Path) -> str:
        console, deadline = Console(log), self._clock.monotonic() + wanted.banner_seconds
        while True:
            is_running = await self.power(name) is Power.RUNNING
            is_late = self._clock.monotonic() > deadline
            await self._fetch(name, log, screenshot)
            found = await console.find(wanted.banner)
            if found is not None:
                return found
            if is_late or not is_running:
                raise console.silent(wanted.banner, wanted.banner_seconds, is_running=is_running)
            await self._clock.sleep(LOOK_SECONDS)

    async def shut_down(self, name: str, seconds: float) -> bool:
        """See `Compute`."""
        if await self.power(name) is not Power.RUNNING:
            return True
        async with said(f"shut {name} down"):
            await self._compute.virtual_machines.begin_power_off(self._target.resource_group, name)
        deadline = self._clock.monotonic() + seconds
        while await self.power(name) is Power.RUNNING:
            if self._clock.monotonic() > deadline:
                return False
            await self._clock.sleep(LOOK_SECONDS)
        return True

    async def deallocate(self, name: str) -> None:
        """Have the machine off for certain, and its disks still: when this returns nothing writes to them.

        One that somebody has deleted is off; its disks may be there.
        """
        if await self._machine(name) is None:
            return
        async with said(f"deallocate {name}"):
            await (await self._compute.virtual_machines.begin_deallocate(self._target.resource_group, name)).result()

    async def remove(self, name: str) -> None:
        """See `Compute`."""
        group = self._target.resource_group
        machine = await self._machine(name)
        if machine is not None and (machine.tags or {}).get(TAG) != name:
            raise PermanentError(
                f"the machine {name} in {group} is not ours", hint="it has no tag; it is left as it is"
            )
        if machine is not None:
            async with said(f"delete the machine {name}"):
                await (await self._compute.virtual_machines.begin_delete(group, name)).result()
        async with said(f"delete the network interface of {name}"):
            async for each in self._network.network_interfaces.list(group):
                if (each.tags or {}).get(TAG) == name:
                    await (await self._network.network_interfaces.begin_delete(group, str(each.name))).result()
        await self.snapshots.remove(name)
        async with said(f"delete the disks of {name}"):
            async for disk in self._compute.disks.list_by_resource_group(group):
                if (disk.tags or {}).get(TAG) == name:
                    await (await self._compute.disks.begin_delete(group, str(disk.name))).result()

    async def _machine(self, name: str) -> Any:
        async with said(f"look for {name}"):
            try:
                return await self._compute.virtual_machines.get(self._target.resource_group, name)
            except ResourceNotFoundError:
                return None

    async def _resource(self, name: str) -> str:
        machine = await self._machine(name)
        return str(machine.id) if machine is not None else ""

    async def _fetch(self, name: str, log: Path, screenshot: Path) -> None:
        """What boot diagnostics have by now; nothing, for a machine that is just being made."""
        async with said(f"look at the console of {name}"):
            try:
                found = await self._compute.virtual_machines.retrieve_boot_diagnostics_data(
                    self._target.resource_group, name, sas_uri_expiration_time_in_minutes=_LINK_MINUTES
                )
            except ResourceNotFoundError:
                return
            links = ((found.serial_console_log_blob_uri, log), (found.console_screenshot_blob_uri, screenshot))
            connector = aiohttp.TCPConnector(ssl=self._trust)
            async with aiohttp.ClientSession(connector=connector) as session:
                for link, target in links:
                    if link:
                        await _download(session, link, target)

    def _subnet(self, spec: MachineSpec) -> str:
        return self._target.drill_subnet_id if spec.isolated else self._target.subnet_id

    def _tags(self, spec: MachineSpec) -> dict[str, str]:
        digest = hashlib.sha256(repr((spec, self._target)).encode()).hexdigest()[:32]
        return {**spec.tags, TAG: spec.name, SPEC_TAG: digest}


def disk_name(spec: MachineSpec, number: int) -> str:
    """The managed disk's name: unique by its number, and readable."""
    return f"{spec.name}-{number}-{re.sub(r'[^a-zA-Z0-9_-]', '-', spec.disks[number].name)[:12]}"


def _unfit(spec: MachineSpec, target: AzureTarget) -> Iterator[Finding]:
    if spec.isolated and not target.drill_subnet_id:
        yield Finding("the target has no network for drills", "set drill_subnet_id to a subnet that reaches nobody")
    if spec.ports:
        yield Finding("there are no forwarded ports in Azure", "have the check reach the machine by its resource id")
    for disk in spec.disks:
        if not disk.place.startswith("https://"):
            yield Finding(f"disk {disk.name}: {disk.place!r} is no blob's URL", "recover it into a page blob first")
        if disk.size_bytes % _MIB:
            yield Finding(f"disk {disk.name} is no whole number of MiB", "recover it as a VHD, which fills it up")


def _disk(spec: MachineSpec, number: int, target: AzureTarget, tags: dict[str, str]) -> Any:
    return {
        "location": target.location,
        "tags": tags,
        "sku": {"name": target.disk_kind},
        "properties": {
            "osType": target.system if number == 0 else None,
            "hyperVGeneration": "V2" if spec.firmware is Firmware.UEFI else "V1",
            "creationData": {
                "createOption": "Import",
                "sourceUri": spec.disks[number].place,
                "storageAccountId": target.storage_account_id,
            },
        },
    }


def _interface(target: AzureTarget, subnet: str, tags: dict[str, str]) -> Any:
    address = {"name": "main", "properties": {"subnet": {"id": subnet}, "privateIPAllocationMethod": "Dynamic"}}
    return {"location": target.location, "tags": tags, "properties": {"ipConfigurations": [address]}}


def _machine(target: AzureTarget, disks: list[str], interface: str, tags: dict[str, str]) -> Any:
    system, *others = disks
    return {
        "location": target.location,
        "tags": tags,
        "properties": {
            "hardwareProfile": {"vmSize": target.size},
            "availabilitySet": {"id": target.availability_set_id} if target.availability_set_id else None,
            "storageProfile": {
                "osDisk": {"createOption": "Attach", "osType": target.system, "managedDisk": {"id": system}},
                "dataDisks": [
                    {"lun": lun, "createOption": "Attach", "managedDisk": {"id": each}}
                    for lun, each in enumerate(others)
                ],
            },
            "networkProfile": {"networkInterfaces": [{"id": interface, "properties": {"primary": True}}]},
            "diagnosticsProfile": {"bootDiagnostics": {"enabled": True}},
        },
    }


async def _download(session: aiohttp.ClientSession, link: str, target: Path) -> None:
    async with session.get(link) as answer:
        if answer.status == 404:  # not written yet
            return
        if answer.status != 200:
            raise TransientError(f"boot diagnostics answer with status {answer.status}")
        data = await answer.content.read(MAX_EVIDENCE_BYTES)
    await asyncio.to_thread(target.write_bytes, data)
