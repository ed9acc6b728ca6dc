"""The sample's log after it was indexed and folded, by the product itself; always the same bytes."""

from __future__ import annotations

import random

from recovery.chunks import MachineLog
from recovery.folding import Folder
from recovery.indexing import make_index
from recovery.retention import Policy, Rule
from replicar.log.tail import Stored
from replicar.storage import MemoryStore
from tests.golden import sample

_HOUR_NS = 3_600_000_000_000
#: The floor is the end of segment 3: what came later, a nanosecond each, is younger than the window.
FLOOR_SEQUENCE = 16
#: What is whole, counted from the last change; of all before it one point is kept.
_WINDOW_NS = 3
_POLICY = Policy(_WINDOW_NS, (Rule(1 << 62, 1 << 61),))


class _Clock:
    def now_ns(self) -> int:
        return sample.TIME + FLOOR_SEQUENCE + _HOUR_NS

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits here")


async def log() -> dict[str, bytes]:
    """Every blob that there is, by name."""
    clock, bytes_of = _Clock(), random.Random(20).randbytes
    store = MemoryStore(clock=clock)
    await store.ensure_container()
    blobs, digest = sample.log()
    for name, data in blobs.items():
        await store.create(name, len(data))
        await store.put_pages(name, 0, data)
    machine = MachineLog(store, sample.MACHINE, {sample.KEY_ID: sample.DATA_KEY})
    await make_index(machine, clock=clock, random=bytes_of, stored=Stored(4, 0, digest), every=1)
    for _ in range(2):
        await Folder(machine, _POLICY, clock=clock, random=bytes_of, grace_seconds=0).run()
    found = {}
    for info in await store.list(f"machines/{sample.MACHINE}/"):
        if not info.name.endswith("/lock"):
            found[info.name] = await store.read(info.name, 0, info.size_bytes)
    return found
