"""The wrapped data keys in headers of log and index: replaced when the vault's key changed, destroyed with a machine.

A blob's header is written once like everything else in it, but for this one field: another wrapped form of the *same*
data key may take its place at any time, and a reader sees the old form or the new one, both good. Only log blobs that
nobody writes are touched; a writer's own have the form of its assignment. Index blobs have headers of their own, since
of a log that was folded a key may be left there alone; one with a header is finished, whoever still has its lease.

Destroying is for ever, so it begins with shutting out whoever still writes: an empty blob in the name of a higher epoch
(`tombstone`) makes every writer of before see that somebody newer is there. Whoever got in earlier has made its blobs
by then, so that they are listed, and their leases are broken. Then each header is overwritten, and each blob deleted,
until nothing but the tombstone is left; doing it again goes on where it was.

Weak: what storage keeps on its own account of overwritten and deleted blobs (snapshots, versions) is not reached; that
holds wrapped keys, which the vault's key opens. A header of before in somebody's copy of the container, too. Who makes
an index meanwhile takes the form that the newest log blob had when it began: so it is done again, until nothing had to
be replaced. An index blob of version 1 keeps the form that it was written with.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from replicar.errors import ConflictError, FencedError, PermanentError, TransientError
from replicar.formats import indexblob, logblob
from replicar.formats.indexblob import IndexName
from replicar.formats.logblob import BlobName
from replicar.storage.store import BlobInfo, PageBlobStore, is_gone

#: Rounds of listing and deleting; a writer that was shut out leaves one blob more at most.
ROUNDS: Final = 5
_PAGE_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What became of a machine's blobs: replaced, as wanted already, of a key nobody named, held by a writer, sealed
    with the form that they have (index blobs of version 1)."""

    changed: int = 0
    current: int = 0
    unknown: int = 0
    in_use: int = 0
    sealed: int = 0

    def __add__(self, other: Rewrapped) -> Rewrapped:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Rewrapped(*(one + another for one, another in zip(mine, theirs, strict=True)))


async def rewrap(store: PageBlobStore, machine_id: uuid.UUID, wrapped: Mapping[int, bytes]) -> Rewrapped:
    """Put the wanted wrapped form into the header of every blob of log and index.

    Args:
        wrapped: the form wanted, by key id.

    Raises:
        CorruptionError: a header that can't be read.
        TransientError, PermanentError: storage.
    """
    found = Rewrapped()
    for info in await store.list(logblob.log_prefix(machine_id)):
        if logblob.read_name(info.name) is not None:
            found += await _rewrap(store, info, wrapped)
    for info in await store.list(indexblob.index_prefix(machine_id)):
        name = indexblob.read_name(info.name)
        if name is not None:
            found += await _rewrap_index(store, name, info, wrapped)
    return found


async def _rewrap_index(
    store: PageBlobStore, name: IndexName, info: BlobInfo, wrapped: Mapping[int, bytes]
) -> Rewrapped:
    try:
        header = indexblob.read_header(await store.read(info.name, 0, indexblob.HEADER_BYTES), name)
        if header is None:
            return Rewrapped()
        wanted = wrapped.get(header.key_id)
        if wanted is None:
            return Rewrapped(unknown=1)
        if header.wrapped_key == wanted:
            return Rewrapped(current=1)
        if not header.is_rewrappable:
            return Rewrapped(sealed=1)
        if info.leased:
            await store.break_lease(info.name)
        lease_id = await store.acquire_lease(info.name, proposed_id=str(uuid.uuid4()))
        try:
            data = dataclasses.replace(header, wrapped_key=wanted).pack()
            await store.put_pages(info.name, 0, data, lease_id=lease_id)
        finally:
            await store.release_lease(info.name, lease_id)
    except FencedError:
        return Rewrapped(in_use=1)
    except PermanentError as error:
        if not is_gone(error):
            raise
        return Rewrapped()  # a fold removed it meanwhile
    return Rewrapped(changed=1)


async def _rewrap(store: PageBlobStore, info: BlobInfo, wrapped: Mapping[int, bytes]) -> Rewrapped:
    header = logblob.read_header(await store.read(info.name, 0, logblob.HEADER_BYTES))
    if header is None:
        return Rewrapped()
    wanted = wrapped.get(header.key_id)
    if wanted is None:
        return Rewrapped(unknown=1)
    if header.wrapped_key == wanted:
        return Rewrapped(current=1)
    if info.leased:
        return Rewrapped(in_use=1)
    try:
        lease_id = await store.acquire_lease(info.name, proposed_id=str(uuid.uuid4()))
    except FencedError:
        return Rewrapped(in_use=1)
    try:
        data = dataclasses.replace(header, wrapped_key=wanted).pack()
        await store.put_pages(info.name, 0, data, lease_id=lease_id)
    finally:
        await store.release_lease(info.name, lease_id)
    return Rewrapped(changed=1)


def tombstone(machine_id: uuid.UUID, epoch: int) -> BlobName:
    """The blob that shuts out every writer of an epoch before."""
    return BlobName(machine_id, epoch, 1, 0)


async def destroy(store: PageBlobStore, machine_id: uuid.UUID, epoch: int) -> int:
    """Overwrite every header of the machine's log and delete all that is stored of it; returns how many blobs.

    Args:
        epoch: above that of any writer, ever.

    Raises:
        TransientError: blobs keep appearing, or storage is away; do it again.
    """
    last = str(tombstone(machine_id, epoch))
    with suppress(ConflictError):  # an earlier try made it
        await store.create(last, _PAGE_BYTES)
    count = 0
    for _ in range(ROUNDS):
        left = [info for info in await store.list(f"machines/{machine_id}/") if info.name != last]
        if not left:
            return count
        await asyncio.gather(*(_destroy(store, info.name) for info in left))
        count += len(left)
    raise TransientError(
        f"blobs of machine {machine_id} keep appearing while they are destroyed",
        hint="see that no process server serves it any more (`process-server status`), and do it again",
        machine_id=str(machine_id),
    )


async def _destroy(store: PageBlobStore, name: str) -> None:
    try:
        await store.break_lease(name)
        lease_id = await store.acquire_lease(name, proposed_id=str(uuid.uuid4()))
        await store.put_pages(name, 0, bytes(_PAGE_BYTES), lease_id=lease_id)
        await store.delete(name, lease_id=lease_id)
    except FencedError as error:
        raise TransientError(f"somebody took {name} back while it was destroyed", hint="do it again") from error
    except PermanentError as error:
        if not is_gone(error):  # else it is gone already
            raise
