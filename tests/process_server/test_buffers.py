"""Buffers and slots: bounded, reused, given in turn."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from process_server.buffers import BufferPool
from process_server.cache import PAYLOAD_BYTES, SLOT_BYTES
from process_server.slots import Slots
from process_server.stream import Cutting, Stream
from replicar.errors import LimitError


async def test_a_pool_gives_so_many_and_no_more_and_the_same_again() -> None:
    pool = BufferPool(4096, 2)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.take() is None
    pool.give(first)
    assert pool.take() is first
    assert pool.in_use == 2


async def test_who_waits_longest_is_served_first_and_who_gave_up_is_passed_over() -> None:
    pool = BufferPool(4096, 1)
    held = await pool.acquire()
    waiting = [asyncio.create_task(pool.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    pool.give(held)
    assert await waiting[1] is held
    assert not waiting[2].done()
    pool.give(held)
    waiting[2].cancel()  # after it was served, before it noticed: the buffer is not lost
    await asyncio.wait([waiting[2]])
    assert pool.take() is held


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(LimitError):
        BufferPool(4096, 0)
    with pytest.raises(ValueError, match="whole pages"):
        BufferPool(1000, 1)


def test_when_buffers_run_out_the_newest_cold_slot_gives_up_its_own() -> None:
    slots, stream = Slots(8, 3 * PAYLOAD_BYTES), Stream(uuid.UUID(int=1), 0, Cutting())
    taken = []
    for _ in range(3):
        slot = slots.take(1)
        assert slot is not None
        stream.open(slot)
        slot.filled = slot.parsed = slot.durable = 100
        stream.close()
        taken.append(slot)
    assert slots.take(1) is None
    slots.settle(stream, taken[:2])
    fourth = slots.take(1)
    assert fourth is not None
    assert [slot.buffer is None for slot in taken] == [False, True, False]


def test_waiters_are_woken_in_turn_and_only_when_there_is_something() -> None:
    slots, stream, woken = Slots(4, 8 * PAYLOAD_BYTES), Stream(uuid.UUID(int=1), 0, Cutting()), []
    taken = [slots.take(1) for _ in range(4)]
    assert slots.free_bytes == 0

    def take(name: str) -> None:
        woken.append(name)
        assert slots.take(1) is not None

    slots.wait(lambda: woken.append("has hung up"))
    slots.wait(lambda: take("first"))
    slots.wait(lambda: take("second"))
    slot = taken[0]
    assert slot is not None
    stream.open(slot)
    stream.close()
    slots.settle(stream, [slot])
    assert woken == ["has hung up", "first"]
    assert slots.total_bytes == 4 * SLOT_BYTES
