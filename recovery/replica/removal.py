"""Removing a warm replica that nobody wants any more: what goes is a plan, made of what there is.

Snapshots go before their blobs, which can't be without them; and the journal goes before the blobs of which it says
what they hold. So whoever dies in it leaves a whole replica without points, or blobs of which nothing is known: the
next removal removes them, the next round makes them anew.

Nothing is removed while one of its points is pinned: a recovery copies from it. A reader that pins it in the moment in
which it goes finds its copy refused, and makes its disks from the log.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from recovery.chunks import MachineLog
from recovery.pins import pinned_sequences
from recovery.replica.fenced import FencedBlob
from recovery.replica.points import read_snapshot_info
from recovery.replica.warm import journal_name, prefix
from replicar.clock import Clock
from replicar.errors import FencedError, PermanentError, TransientError
from replicar.storage.store import BlobInfo, PageBlobStore, is_gone

#: Rounds of listing and deleting a replica that is destroyed.
ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """What goes, in this order: snapshots (blob, id), then blobs. `read`: points that somebody reads; then nothing."""

    snapshots: tuple[tuple[str, str], ...] = ()
    blobs: tuple[str, ...] = ()
    read: tuple[int, ...] = ()


def plan_removal(
    blobs: Iterable[BlobInfo], snapshots: Iterable[BlobInfo], pinned: Collection[int], journal: str
) -> RemovalPlan:
    """What is to be removed of a replica that has these blobs and snapshots, while these sequences are pinned."""
    there = list(snapshots)
    points = {point.sequence for each in there if (point := read_snapshot_info(each)) is not None}
    if read := points.intersection(pinned):
        return RemovalPlan(read=tuple(sorted(read)))
    return RemovalPlan(
        snapshots=tuple(sorted((each.name, each.snapshot or "") for each in there)),
        blobs=tuple(sorted((each.name for each in blobs), key=lambda name: (name != journal, name))),
    )


async def destroy_replica(store: PageBlobStore, machine_id: uuid.UUID) -> int:
    """Have nothing left of a replica, whoever reads it or brings it on: its machine is destroyed. How many blobs went.

    Raises:
        TransientError: blobs keep appearing, or storage is away; do it again.
    """
    where, count = prefix(MachineLog(store, machine_id, {})), 0
    for _ in range(ROUNDS):
        if not (blobs := await store.list(where)):
            return count
        for info in blobs:
            with suppress(FencedError):  # whoever took it back is met by the next round
                await (await FencedBlob.take(store, info.name)).delete()
                count += 1
    raise TransientError(
        f"blobs of the replica of machine {machine_id} keep appearing while they are destroyed",
        hint="see that no worker brings it on any more, and do it again",
        machine_id=str(machine_id),
    )


async def remove_replica(log: MachineLog, *, clock: Clock) -> RemovalPlan:
    """Have nothing left of a machine's replica; what was removed. It may be cut off anywhere, and asked again.

    Raises:
        FencedError: somebody reads from it, or has taken it over; it is left as it is.
    """
    store, journal = log.store, journal_name(log)
    if not (blobs := await store.list(prefix(log))):
        return RemovalPlan()
    held = await FencedBlob.take(store, journal) if any(each.name == journal for each in blobs) else None
    # Behind the lease: whoever was at work is shut out, and makes no other snapshot.
    pinned = await pinned_sequences(log, clock)
    plan = plan_removal(blobs, await store.snapshots(prefix(log)), pinned, journal)
    if plan.read:
        if held is not None:
            await held.release()
        raise FencedError(
            f"the replica of machine {log.machine_id} is being read, at sequence {plan.read[0]}",
            hint="nothing to do: it is removed when that recovery has ended",
            machine_id=str(log.machine_id),
        )
    for name, snapshot in plan.snapshots:
        await store.delete_snapshot(name, snapshot)
    for name in plan.blobs:
        try:
            blob = held if held is not None and name == journal else await FencedBlob.take(store, name)
            await blob.delete()
        except PermanentError as error:
            if not is_gone(error):
                raise
    return plan
