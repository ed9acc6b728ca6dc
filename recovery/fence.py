"""Keeps older writers out of a machine's log, without writing to it: what a failover does before it reads its end.

By the order in which process servers take a log over (create, lease, list: whoever sees a later epoch stops), a blob of
the new epoch is enough: it is made, with nothing in it, and then the leases of all older blobs are broken. A writer
that begins afterwards sees the blob and stops; one that had begun has its writes refused by storage. An empty blob is
no run, so readers pass over it, and the next process server begins at an epoch that is higher still.
"""

from __future__ import annotations

import uuid
from contextlib import suppress

from replicar.errors import ConflictError, FencedError, PermanentError
from replicar.formats import logblob
from replicar.formats.logblob import BlobName
from replicar.storage.store import PAGE_BYTES, PageBlobStore, is_gone

#: No process server writes by it: runs count from 1, and this epoch has none.
_RUN = 1


async def fence(store: PageBlobStore, machine_id: uuid.UUID, epoch: int) -> None:
    """Have every write by an epoch below `epoch` refused from here on. Doing it again changes nothing.

    Raises:
        FencedError: a writer of a later epoch is there already.
    """
    name = BlobName(machine_id, epoch, _RUN, 0)
    with suppress(ConflictError):  # an earlier try made it
        await store.create(str(name), PAGE_BYTES)
    for info in await store.list(logblob.log_prefix(machine_id)):
        found = logblob.read_name(info.name)
        if found is None or found == name:
            continue
        if found.epoch > epoch:
            raise FencedError(
                f"the log of machine {machine_id} has a writer of epoch {found.epoch} already; ours is {epoch}",
                hint="the machine was given to somebody else meanwhile: look at `replicar jobs`",
                machine_id=str(machine_id),
                epoch=epoch,
            )
        if info.leased:
            try:
                await store.break_lease(info.name)
            except PermanentError as error:
                if not is_gone(error):  # its writer took it back meanwhile
                    raise
