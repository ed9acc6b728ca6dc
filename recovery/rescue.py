"""What a container holds when nobody is left who could say so: the machines in it, by their logs alone."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from replicar.formats import logblob
from replicar.storage.store import PageBlobStore

_PREFIX: Final = "machines/"


@dataclass(frozen=True, slots=True)
class FoundMachine:
    """A machine that has a log here; `space_bytes` is what its blobs may hold, not what is written in them.

    `last_modified_ns`: when something was written to it last, as far as the service tells.
    """

    machine_id: uuid.UUID
    blobs: int
    space_bytes: int
    last_modified_ns: int | None


async def machines_in(store: PageBlobStore) -> list[FoundMachine]:
    """Every machine with a log in the container, the one written to last first."""
    found: dict[uuid.UUID, FoundMachine] = {}
    for info in await store.list(_PREFIX):
        name = logblob.read_name(info.name)
        if name is None:
            continue
        before = found.get(name.machine_id, FoundMachine(name.machine_id, 0, 0, None))
        times = [time for time in (before.last_modified_ns, info.last_modified_ns) if time is not None]
        found[name.machine_id] = FoundMachine(
            name.machine_id, before.blobs + 1, before.space_bytes + info.size_bytes, max(times, default=None)
        )
    return sorted(found.values(), key=lambda machine: (-(machine.last_modified_ns or 0), machine.machine_id))
