"""A process server appends while its machine's log is folded: takes it over, rolls, goes on; and nobody loses a byte.

The writer is the process server's own; between any two requests of the folder it may store segments, begin a run or
roll into new blobs, and a second indexer may have made a checkpoint.
"""

from __future__ import annotations

import random

import pytest

from process_server.logwriter import MIN_BLOB_BYTES, LogLimits
from recovery.indexing import make_index
from replicar.log.tail import Stored
from tests.recovery.faults import MeetingStore
from tests.recovery.scene import Scene

LIMITS = LogLimits(stripes=2, blob_bytes=MIN_BLOB_BYTES)


class Server:
    """Stores segments of a scene's story whenever somebody else looks away."""

    def __init__(self, scene: Scene, seed: int, *, often: float) -> None:
        self._scene, self._random, self._often = scene, random.Random(f"server {seed}"), often
        self.times = 0

    async def meet(self) -> None:
        if self._random.random() >= self._often:
            return
        self.times += 1
        scene, builder = self._scene, self._scene.builder
        builder.time_ns = max(builder.time_ns, scene.clock.ns)
        match self._random.choices(("append", "take over", "index"), (8, 1, 1))[0]:
            case "append":
                await scene.story.go_on(1)
            case "take over":
                await builder.begin_run()
            case "index":
                stored = Stored(builder.number - 1, builder.sequence - 1, builder.previous)
                await make_index(builder.log, clock=scene.clock, random=scene.bytes, stored=stored, every=2)
        scene.clock.ns = max(scene.clock.ns, builder.time_ns)


async def folded_beside_a_server(seed: int, *, rounds: int) -> int:
    """Fold again and again while a server appends; how often it did."""
    scene = await Scene(seed, limits=LIMITS).begin(14)
    server = Server(scene, seed, often=0.05)
    whole, freed = scene.store, 0
    for _ in range(rounds):
        await scene.live(4)
        freed += (await scene.folder(MeetingStore(whole, server.meet)).run()).freed_bytes
        await scene.check()
        scene.pause()
    assert freed > 0
    return server.times


async def test_a_log_that_is_written_while_it_is_folded_loses_nothing() -> None:
    assert await folded_beside_a_server(1, rounds=3) >= 5


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
async def test_logs_that_are_written_while_they_are_folded_lose_nothing(seed: int) -> None:
    assert await folded_beside_a_server(1000 + seed, rounds=8)
