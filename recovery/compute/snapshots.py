"""Incremental snapshots of managed disks, and links by which their content is read: the way out of a managed disk.

A managed disk is nobody's blob; what it holds is reached by the documented detour: an incremental snapshot of it, and
of that a link to read (`beginGetAccess`) that is good for a while. Two incremental snapshots of one disk can be asked
for what differs between them (see `recovery.failback.exported`), so one is taken of each disk before its machine first
runs.

Each has a name made from its disk's and carries the machine's tag, so taking it again changes nothing. Azure gives
links to five snapshots of a disk at a time at most; here there are two, taken back when nobody reads any more.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from azure.core.exceptions import ResourceNotFoundError
from azure.mgmt.compute.aio import ComputeManagementClient
from azure.mgmt.compute.models import GrantAccessData

from recovery.compute.answers import said
from replicar.errors import CorruptionError

TAG: Final = "replicar-machine"
#: A step reads no longer than this at a stretch; one that does has its link ended, and goes on with another.
LINK_SECONDS: Final = 24 * 3600


class Moment(StrEnum):
    """When a snapshot was taken: before the machine first ran, or when it was off to be brought home."""

    BASE = "base"
    HOME = "home"


@dataclass(frozen=True, slots=True)
class ManagedDisk:
    """A disk of a machine that we made; `was_attached`: something may have written to it."""

    number: int
    name: str
    id: str
    size_bytes: int
    was_attached: bool


class Snapshots:
    """Snapshots in one resource group. Errors are those of `recovery.compute.answers`."""

    def __init__(self, client: ComputeManagementClient, group: str, location: str) -> None:
        self._client, self._group, self._location = client, group, location

    async def disks(self, machine: str) -> list[ManagedDisk]:
        """The machine's disks, in its order."""
        found = []
        async with said(f"look for the disks of {machine}"):
            async for disk in self._client.disks.list_by_resource_group(self._group):
                match = re.fullmatch(rf"{re.escape(machine)}-(\d+)-.*", str(disk.name))
                if match is not None and (disk.tags or {}).get(TAG) == machine:
                    found.append(_managed(int(match[1]), disk))
        return sorted(found, key=lambda disk: disk.number)

    async def take(self, machine: str, disk: ManagedDisk, moment: Moment, tags: Mapping[str, str]) -> None:
        """Have a snapshot of the disk; one that is there is left as it is."""
        name = _name(disk, moment)
        async with said(f"take the snapshot {name}"):
            if not await self.is_there(disk, moment):
                begun = await self._client.snapshots.begin_create_or_update(
                    self._group, name, _snapshot(disk, self._location, {**tags, TAG: machine})
                )
                await begun.result()
        there = await self._find(name)
        if there is None or str(there.properties.creation_data.source_resource_id).lower() != disk.id.lower():
            raise CorruptionError(
                f"the snapshot {name} is not of the disk {disk.name}",
                hint="somebody made it; delete it, and ask again",
            )

    async def is_there(self, disk: ManagedDisk, moment: Moment) -> bool:
        """Whether there is such a snapshot, and complete: of one that failed nothing can be read."""
        found = await self._find(_name(disk, moment))
        return found is not None and found.properties.provisioning_state == "Succeeded"

    @asynccontextmanager
    async def link(self, disk: ManagedDisk, moment: Moment) -> AsyncIterator[str]:
        """A link to read what the snapshot holds, a fixed VHD; a secret, and good as long as the block lasts."""
        name, access = _name(disk, moment), GrantAccessData(access="Read", duration_in_seconds=LINK_SECONDS)
        async with said(f"give access to the snapshot {name}"):
            begun = await self._client.snapshots.begin_grant_access(self._group, name, access)
            link = str((await begun.result()).access_sas)
        try:
            yield link
        finally:
            await self._take_back(name)

    async def delete(self, disk: ManagedDisk, moment: Moment) -> None:
        """Have no such snapshot."""
        if await self._find(name := _name(disk, moment)) is not None:
            await self._delete(name)

    async def remove(self, machine: str) -> None:
        """Have none of the machine, whatever became of its disks."""
        async with said(f"look for the snapshots of {machine}"):
            names = [
                str(each.name)
                async for each in self._client.snapshots.list_by_resource_group(self._group)
                if (each.tags or {}).get(TAG) == machine
            ]
        for name in names:
            await self._delete(name)

    async def _delete(self, name: str) -> None:
        await self._take_back(name)  # of a reader that died: Azure deletes none that somebody may read
        async with said(f"delete the snapshot {name}"):
            await (await self._client.snapshots.begin_delete(self._group, name)).result()

    async def _take_back(self, name: str) -> None:
        async with said(f"end the access to the snapshot {name}"):
            await (await self._client.snapshots.begin_revoke_access(self._group, name)).result()

    async def _find(self, name: str) -> Any:
        async with said(f"look for the snapshot {name}"):
            try:
                return await self._client.snapshots.get(self._group, name)
            except ResourceNotFoundError:
                return None


def _name(disk: ManagedDisk, moment: Moment) -> str:
    return f"{disk.name}-{moment}"


def _managed(number: int, disk: Any) -> ManagedDisk:
    found = disk.properties
    was_attached = bool(disk.managed_by or found.last_ownership_update_time)
    return ManagedDisk(number, str(disk.name), str(disk.id), int(found.disk_size_bytes or 0), was_attached)


def _snapshot(disk: ManagedDisk, location: str, tags: Mapping[str, str]) -> Any:
    return {
        "location": location,
        "tags": dict(tags),
        "properties": {
            "incremental": True,
            "creationData": {"createOption": "Copy", "sourceResourceId": disk.id},
        },
    }
