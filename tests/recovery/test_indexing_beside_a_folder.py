"""A log is indexed so slowly that others index and fold it meanwhile, and free what it was begun with.

Between any two of the slow one's requests ten minutes may pass, and a whole round of somebody else.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from recovery.indexing import make_index
from replicar.errors import FencedError
from tests.recovery.faults import MeetingStore
from tests.recovery.scene import Scene


class Others:
    """Do a round of their own whenever the slow one looks away, one at a time, whatever becomes of it."""

    def __init__(self, scene: Scene, seed: int, *, often: float) -> None:
        self._scene, self._random, self._often = scene, random.Random(f"others {seed}"), often
        self._round: asyncio.Task[None] | None = None

    async def meet(self) -> None:
        if self._round is None and self._random.random() < self._often:
            self._round = asyncio.create_task(self._go())
        await self.settled()

    async def settled(self) -> None:
        if self._round is not None:
            await asyncio.shield(self._round)

    async def _go(self) -> None:
        await self._scene.live(2)
        await self._scene.fold()
        self._round = None


async def indexed_slowly(seed: int, *, rounds: int) -> tuple[int, int]:
    """Index again and again while others fold; how often it was done, and how often somebody was in the way."""
    scene = await Scene(seed).begin(20)
    others = Others(scene, seed, often=0.02)
    log = replace(scene.builder.log, store=MeetingStore(scene.store, others.meet))
    done = fenced = 0
    for _ in range(rounds):
        await scene.go_on(12)
        try:
            await make_index(log, clock=scene.clock, random=scene.bytes, every=2)
            done += 1
        except FencedError:
            fenced += 1
        await others.settled()
        await scene.check()
        await scene.fold()
        await scene.fold()
        await scene.check()
    return done, fenced


async def test_a_log_that_is_folded_while_it_is_indexed_loses_nothing() -> None:
    done, fenced = await indexed_slowly(1, rounds=8)
    assert done
    assert fenced


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(50))
async def test_logs_that_are_folded_while_they_are_indexed_lose_nothing(seed: int) -> None:
    await indexed_slowly(2000 + seed, rounds=12)
