"""A log whose dead segments were swept, with zeros in the newest blob: whoever comes late reads around them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest

from recovery.folding import Folder
from recovery.indexing import make_index
from recovery.replica.warm import WarmReplica, read_journal
from recovery.retention import Policy, Rule
from recovery.sampling import verify_share
from recovery.verify import verify
from replicar.clock import SystemClock
from replicar.log.tail import Stored
from replicar.storage import MemoryStore
from tests.recovery.log_builder import LogBuilder
from tests.recovery.scene import MINUTE, NS, HandClock

SECTOR = 512
SIZES = (700 * SECTOR, 90 * SECTOR)
POLICY = Policy(10 * MINUTE, (Rule(60 * MINUTE, 15 * MINUTE),))


@dataclass
class Site:
    """A machine's log in storage, what its disks hold, and the time."""

    builder: LogBuilder
    clock: HandClock
    draw: random.Random

    @classmethod
    async def make(cls) -> Site:
        clock = HandClock()
        store = MemoryStore(clock=clock)
        await store.ensure_container()
        site = cls(LogBuilder(store), clock, random.Random(3))
        site.builder.begin(*SIZES)
        site.builder.write(0, 0, site.draw.randbytes(300 * SECTOR))
        await site.builder.seal()
        return site

    @property
    def stored(self) -> Stored:
        return Stored(self.builder.number - 1, self.builder.sequence - 1, self.builder.previous)

    async def live(self, segments: int) -> None:
        """Write to the same few places again and again, a segment every two minutes."""
        builder = self.builder
        for _ in range(segments):
            for _ in range(4):
                builder.write(0, SECTOR * self.draw.randrange(30), self.draw.randbytes(4 * SECTOR))
            builder.time_ns = max(builder.time_ns, self.clock.ns) + 2 * MINUTE
            await builder.seal()
            self.clock.ns = builder.time_ns

    async def swept(self) -> None:
        """Fold, and sweep when the grace is over."""
        await make_index(self.builder.log, clock=self.clock, random=os.urandom, stored=self.stored, every=2)
        freed = 0
        for _ in range(2):
            folded = await Folder(self.builder.log, POLICY, clock=self.clock, random=os.urandom).run()
            freed += folded.freed_bytes
            self.clock.ns += 700 * NS
        assert freed

    def replica(self) -> WarmReplica:
        # A clock whose sleep takes no time would have it renew its pin for ever.
        return WarmReplica(self.builder.log, self.builder.store, clock=SystemClock(), random=os.urandom)

    async def held(self, disk: int) -> bytes:
        """What the replica's blob holds of a disk."""
        name = f"replicas/{self.builder.machine_id}/{disk}.vhd"
        return await self.builder.store.read(name, 0, SIZES[disk])


async def folded_behind_a_replica() -> Site:
    site = await Site.make()
    async with site.replica() as replica:
        await replica.advance()
    await site.live(60)
    site.builder.write(0, 500 * SECTOR, b"kept" * 1024)
    await site.builder.seal()
    await site.live(12)
    await site.swept()
    return site


async def test_a_warm_replica_that_is_behind_the_floor_does_not_take_a_hole_for_the_logs_end() -> None:
    site = await folded_behind_a_replica()
    stored = site.stored
    async with site.replica() as replica:
        done = await replica.advance(stored_number=stored.number, stored_digest=stored.digest)
    assert done.full
    for disk, content in enumerate(site.builder.disks.values()):
        assert await site.held(disk) == bytes(content)
    await site.live(2)
    async with site.replica() as replica:
        assert not (await replica.advance()).full  # it goes on from where the log does
    journal = await read_journal(site.builder.log, site.builder.store)
    assert journal is not None
    assert journal.start.tail.number == site.builder.number - 1
    assert await site.held(0) == bytes(site.builder.disks[0])


@pytest.mark.parametrize("turn", [0, 1])
async def test_a_share_of_a_log_that_was_swept_is_as_sound_as_all_of_it(turn: int) -> None:
    site = await folded_behind_a_replica()
    whole = await verify(site.builder.log)
    share = await verify_share(site.builder.log, parts=2, turn=turn, stored_number=site.stored.number)
    assert whole.is_sound
    assert share.is_sound
    assert share.segments == whole.segments
    assert share.kept_chunks == (whole.kept_chunks if turn == 0 else 0)
