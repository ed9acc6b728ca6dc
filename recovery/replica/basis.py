"""A point's disks as VHDs, made from the warm replica's point that is nearest, and what the log says lies between.

The service copies the replica's snapshot, within the account; then whatever the two points take from different places
of the log is written over it. Both directions do: a replica that is further than the point is as good as one behind it.
So a failover takes as long as what was written since the replica was brought on, not as long as disks are large.

The replica's blobs are not sealed. So what was made is compared with the log at SAMPLES places, and given up where it
differs: the log is what counts, and whoever asked makes the disk from it in full.

As long as it lasts the replica's point is pinned in the log: neither its state there nor its snapshots are given up.

Weak: a sample is one. A byte of the replica that somebody altered is met by it if it was altered widely, and by nothing
else: who may write to the container is whom this believes. `verify` on the log does not see it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from recovery.chunks import MachineLog
from recovery.failback.carry import carry, unequal
from recovery.failback.destinations import BlobDisk
from recovery.failback.histories import PointDisk, data_of, written_between
from recovery.failback.spans import Spans
from recovery.output import VHD_ID
from recovery.pins import holding
from recovery.points import AtSequence, locate
from recovery.replica.journal import Phase
from recovery.replica.points import ReplicaPoint
from recovery.replica.warm import WarmReplica, points_kept, read_journal
from recovery.view import Progress, View
from replicar.clock import Clock
from replicar.errors import ConflictError, CorruptionError, FencedError, PermanentError
from replicar.formats import vhd
from replicar.formats.record import Disk
from replicar.storage.store import PAGE_BYTES, CopySource, PageBlobStore

#: Points of the replica that are tried: one that the log does not keep any more is no basis.
TRIES: Final = 4
#: Between two looks at a copy that is under way.
LOOK_SECONDS: Final = 2.0
#: Places that are compared: half of them where there is data, half anywhere.
SAMPLES: Final = 64
SAMPLE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Basis:
    """A point of the replica, and what the log has there."""

    point: ReplicaPoint
    view: View


def nearest(points: Iterable[ReplicaPoint], sequence: int, disks: Sequence[Disk]) -> list[ReplicaPoint]:
    """Those that have just these disks, nearest first; of two that are as near the earlier one."""
    wanted = [disk.index for disk in sorted(disks, key=lambda disk: disk.index)]
    fitting = [point for point in points if [each.disk for each in point.snapshots] == wanted]
    return sorted(fitting, key=lambda point: (abs(point.sequence - sequence), point.sequence))


async def find_basis(
    view: View, stack: AsyncExitStack, *, clock: Clock, random_bytes: Callable[[int], bytes]
) -> Basis | None:
    """The replica's point nearest to the view's, pinned until the stack ends; None: there is none that will do."""
    log, place = view.log, view.state.place
    await _keep_held(log, place.sequence, clock, random_bytes)
    for point in nearest(await points_kept(log, log.store), place.sequence, view.disks)[:TRIES]:
        try:
            state = await locate(log, AtSequence(point.sequence))
            if sorted(state.disks, key=_index) == sorted(view.disks, key=_index):
                await stack.enter_async_context(holding(log, state, clock=clock, random=random_bytes))
                return Basis(point, View(log, state))
        except PermanentError:
            continue  # retention has given it up in the log, where it keeps other points than of the replica
    return None


async def make_vhd(
    basis: Basis,
    view: View,
    disk: Disk,
    store: PageBlobStore,
    name: str,
    *,
    container: str,
    clock: Clock,
    random_bytes: Callable[[int], bytes],
    progress: Progress | None = None,
) -> int:
    """Have a disk of the view as a VHD in a blob; returns the bytes that were written besides the copy.

    It may be cut off anywhere and asked again. Its metadata say that it is whole (VHD_ID) when it is, and not before.

    Args:
        store: of the same account as the log.
        container: the log's.

    Raises:
        CorruptionError: the replica is not what it says, or the log is damaged.
        PermanentError: the service does not copy it.
    """
    (snapshot,) = (each for each in basis.point.snapshots if each.disk == disk.index)
    source = CopySource(snapshot.blob, snapshot.snapshot, container)
    try:
        is_there = await store.copy(name, source)
    except ConflictError:  # what an earlier try has left, made of something else
        await store.delete(name)
        is_there = await store.copy(name, source)
    while not is_there:
        await clock.sleep(LOOK_SECONDS)
        is_there = await store.copy(name, source)
    made, footer = await BlobDisk.open(store, name), await _footer(store, name, disk)
    between = (await written_between(basis.view, view, disk)).aligned(PAGE_BYTES)
    origin = _Padded(PointDisk(view, disk))
    moved = await carry(between, origin, made, progress=progress)
    await _compare(view, disk, made, random.Random(random_bytes(8)))
    await store.set_metadata(name, {VHD_ID: str(footer.unique_id)})
    return moved.written + moved.zeroed


class _Padded:
    """A disk, and zeros up to a whole page behind it."""

    def __init__(self, disk: PointDisk) -> None:
        self._disk = disk
        self.size_bytes = -(-disk.size_bytes // PAGE_BYTES) * PAGE_BYTES

    async def read(self, offset: int, length: int) -> bytes:
        there = min(length, self._disk.size_bytes - offset)
        return (await self._disk.read(offset, there)).ljust(length, b"\0")


async def _keep_held(log: MachineLog, sequence: int, clock: Clock, random_bytes: Callable[[int], bytes]) -> None:
    """Keep what the replica's blobs hold as a point, if it is nearer than any that is kept."""
    record = await read_journal(log, log.store)
    if record is None or record.phase is not Phase.APPLIED:
        return
    distance = abs(record.sequence - sequence)
    if any(abs(point.sequence - sequence) <= distance for point in await points_kept(log, log.store)):
        return
    try:
        async with WarmReplica(log, log.store, clock=clock, random=random_bytes) as replica:
            await replica.keep_held()
    except FencedError:
        return  # somebody brings it on just now; an earlier point will do


async def _footer(store: PageBlobStore, name: str, disk: Disk) -> vhd.Footer:
    size = vhd.virtual_bytes(disk.size_bytes)
    found = vhd.read_footer(await store.read(name, size, vhd.FOOTER_BYTES))
    if found.virtual_bytes != size:
        raise CorruptionError(f"the replica of disk {disk.name} is a VHD of another size", hint=_HINT, disk=disk.name)
    return found


async def _compare(view: View, disk: Disk, made: BlobDisk, draw: random.Random) -> None:
    """Raises CorruptionError: what was made differs from the point at one of some places."""
    data = await data_of(view, disk)
    places = [_within(Spans.whole(disk.size_bytes), draw) for _ in range(SAMPLES // 2)]
    places += [_within(data, draw) for _ in range(SAMPLES // 2) if len(data)]
    sample = Spans.of((at, min(SAMPLE_BYTES, disk.size_bytes - at)) for at in places)
    if unlike := len(await unequal(sample, PointDisk(view, disk), made)):
        raise CorruptionError(
            f"the replica of disk {disk.name} does not hold what the log has, in {unlike} stretches of a sample",
            hint=_HINT,
            disk=disk.name,
        )


def _within(spans: Spans, draw: random.Random) -> int:
    """A place within some stretches, by their lengths."""
    at = draw.randrange(spans.total_bytes)
    for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True):
        if at < end - start:
            return int(start + at)
        at -= end - start
    raise AssertionError("it lies within them")


def _index(disk: Disk) -> int:
    return disk.index


_HINT: Final = "who can write to the container? Delete the machine's replica, so that it is made anew from the log"
