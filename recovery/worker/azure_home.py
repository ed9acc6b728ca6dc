"""The way home from Azure: what the managed disks of a machine that is off hold, and what it wrote to them.

    base     an incremental snapshot of each disk, from before the machine first ran
    home     another, from when it was off to be brought home: all that is read is read of this one
    between  Azure says which pages were written or cleared between the two

Where Azure can't say (there is no base, or the disk was resized) home's content is compared with the point's, which the
log has: both are read here, as far as either has data. Bytes are compared and not hashes of them, since both pass
through here anyway; a worker in the region of the disks has them cross no wide wire.

Home is taken once and read by all steps, so a machine that somebody starts meanwhile changes nothing of what is
compared, carried and verified; that it was started is met at the end (`Homeward.switch`). The next failback takes it
anew.

Weak: disks that were attached to the machine in Azure are not ours, and stay there.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from contextlib import AsyncExitStack

import aiohttp

from recovery.compute.snapshots import ManagedDisk, Moment, Snapshots
from recovery.failback.carry import Origin, unequal
from recovery.failback.exported import ExportedDisk
from recovery.failback.histories import PointDisk, data_of
from recovery.failback.spans import Spans
from recovery.view import Progress, View
from recovery.worker.made import shifted
from replicar.clock import Clock
from replicar.errors import PermanentError
from replicar.formats.record import Disk


class ManagedDisks:
    """The disks of one machine (`made`) that is off, until the stack ends.

    Args:
        disks: the point's, in its order.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        made: str,
        disks: Sequence[Disk],
        stack: AsyncExitStack,
        *,
        trust: ssl.SSLContext,
        clock: Clock,
    ) -> None:
        self._snapshots, self._made, self._disks = snapshots, made, disks
        self._stack, self._trust, self._clock = stack, trust, clock

    async def there(self) -> list[ManagedDisk]:
        """The managed disk of each.

        Raises:
            PermanentError: one is missing, or is smaller than what it was made from.
        """
        found = await self._snapshots.disks(self._made)
        if [disk.number for disk in found] != list(range(len(self._disks))):
            raise PermanentError(
                f"the machine {self._made} was made with {len(self._disks)} disks, and Azure has {len(found)} of them",
                hint="bring home by hand what is left; the failover stays committed",
            )
        return found

    async def origins(self) -> dict[str, Origin]:
        """By disk, what they hold. Raises PermanentError: one was written to where the machine's disk has ended."""
        return {
            disk.name: (await self._opened(disk, managed))[0]
            for disk, managed in zip(self._disks, await self.there(), strict=True)
        }

    async def diverged(self, view: View, progress: Progress) -> dict[str, Spans]:
        """By disk, what was written since the point. Raises as `origins`."""
        found = {}
        total, done = sum(disk.size_bytes for disk in self._disks), 0
        for disk, managed in zip(self._disks, await self.there(), strict=True):
            home, written = await self._opened(disk, managed)
            changed = await self._between(managed, home)
            if changed is None:
                either = written.union(await data_of(view, disk)).clipped(0, disk.size_bytes)
                counted = shifted(progress, done, total)
                changed = await unequal(either, home, PointDisk(view, disk), progress=counted)
            found[disk.name] = changed.clipped(0, disk.size_bytes)
            done += disk.size_bytes
            progress(done, total)
        return found

    async def _between(self, managed: ManagedDisk, home: ExportedDisk) -> Spans | None:
        if not await self._snapshots.is_there(managed, Moment.BASE):
            return None
        async with self._snapshots.link(managed, Moment.BASE) as base:
            return await home.changed_since(base)

    async def _opened(self, disk: Disk, managed: ManagedDisk) -> tuple[ExportedDisk, Spans]:
        """A disk as it was when the machine was off, and where there is data."""
        await self._snapshots.take(self._made, managed, Moment.HOME, {})
        link = await self._stack.enter_async_context(self._snapshots.link(managed, Moment.HOME))
        connector = aiohttp.TCPConnector(ssl=self._trust)
        session = await self._stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        home = await ExportedDisk.open(session, link, disk.name, disk.size_bytes, self._clock)
        written = await home.written()
        for offset, length in written.clipped(disk.size_bytes, home.vhd_bytes).pieces(1 << 20):
            if any(await home.read(offset, length)):
                raise PermanentError(
                    f"disk {disk.name} was made larger over there, and has data behind byte {disk.size_bytes}, where "
                    "the machine's ends",
                    hint="make the file system over there fit the disk at home again, or bring the disk home by hand",
                    disk=disk.name,
                )
        return home, written
