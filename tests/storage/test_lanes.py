"""Lanes: a thin link is not shared by more requests than it carries in time, and a wide one by as many as there are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from replicar.storage.lanes import Lanes

MOST = 8
LIMIT = 60  # ticks that a request may take
BODY = 40  # what one has to send


@dataclass
class Request:
    sent: float = 0.0
    ticks: int = 0


class Link:
    """A line that carries so much a tick, shared evenly by what is under way."""

    def __init__(self, lanes: Lanes, per_tick: float, *, adapts: bool = True) -> None:
        self.lanes, self.per_tick, self.adapts = lanes, per_tick, adapts
        self.requests: list[Request] = []
        self.answered = 0

    async def uploader(self) -> None:
        """One upload behind the other, each repeated until it is answered."""
        while True:
            async with self.lanes.one():
                self.requests.append(request := Request())
                while request.sent < BODY and request.ticks < LIMIT:
                    await asyncio.sleep(0)
                self.requests.remove(request)
                if request.sent >= BODY:
                    self.answered += 1
                    self.lanes.answered()
                elif self.adapts:
                    self.lanes.timed_out()

    async def run(self, ticks: int) -> None:
        tasks = [asyncio.create_task(self.uploader()) for _ in range(MOST)]
        for _ in range(ticks):
            await asyncio.sleep(0)
            for request in self.requests:
                request.sent += self.per_tick / len(self.requests)
                request.ticks += 1
            assert len(self.requests) <= MOST
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.requests.clear()


@pytest.mark.parametrize("per_tick", [0.8, 1.5, 3.0])
async def test_a_link_that_carries_one_request_in_time_carries_all_of_them(per_tick: float) -> None:
    link = Link(Lanes(MOST), per_tick)
    await link.run(20_000)
    assert link.answered * BODY > 0.4 * per_tick * 20_000  # of what it could carry; the rest went into retries


async def test_the_same_link_carries_nothing_if_all_of_them_share_it() -> None:
    link = Link(Lanes(MOST), 0.8, adapts=False)
    await link.run(20_000)
    assert link.answered == 0


async def test_a_link_that_was_thin_and_is_wide_again_is_used_by_all_lanes() -> None:
    lanes = Lanes(MOST)
    link = Link(lanes, 0.8)
    await link.run(2_000)
    assert lanes.limit < MOST
    link.per_tick = 40.0
    await link.run(2_000)
    assert lanes.limit == MOST


async def test_whoever_goes_while_it_waits_leaves_its_place_to_the_next() -> None:
    lanes = Lanes(1)
    order: list[str] = []

    async def work(name: str) -> None:
        async with lanes.one():
            order.append(name)
            await asyncio.sleep(0)

    async with lanes.one():
        waiting = [asyncio.create_task(work(name)) for name in "abc"]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
    waiting[0].cancel()  # it was just given the lane
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == ["c"]
    async with asyncio.timeout(1), lanes.one():
        pass
