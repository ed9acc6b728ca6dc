"""Buffers and slots: bounded, reused, given in turn."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from process_server.buffers import BufferPool
from process_server.cache import PAYLOAD_BYTES, SLOT_BYTES
from process_server.slots import Slots
from process_server.stream import Cutting, Slot, Stream
from process_server.watermarks import Level
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


def holder(number: int = 1, *, weight: int = 1) -> Stream:
    return Stream(uuid.UUID(int=number), 0, Cutting(), weight=weight)


def hold(slots: Slots, stream: Stream, count: int) -> list[Slot]:
    """So many closed slots of the stream, each with something in it that is durable and not stored."""
    taken = []
    for _ in range(count):
        slot = slots.take(stream)
        assert slot is not None
        stream.open(slot)
        slot.filled = slot.parsed = slot.durable = 100
        stream.close()
        taken.append(slot)
    return taken


def let_go(slots: Slots, stream: Stream, slot: Slot) -> None:
    slot.cut = slot.parsed
    slots.settle(stream, [slot])


def test_when_buffers_run_out_the_newest_cold_slot_gives_up_its_own() -> None:
    slots, stream = Slots(8, 3 * PAYLOAD_BYTES), holder()
    taken = hold(slots, stream, 3)
    assert slots.take(stream) is None
    slots.settle(stream, taken[:2])
    assert slots.take(stream) is not None
    assert [slot.buffer is None for slot in taken] == [False, True, False]


def test_waiters_are_woken_in_turn_and_only_when_there_is_something() -> None:
    slots, woken = Slots(4, 8 * PAYLOAD_BYTES), list[str]()
    streams = [holder(number) for number in range(4)]
    taken = [hold(slots, stream, 1)[0] for stream in streams]
    assert slots.free_bytes == 0

    def take(name: str, stream: Stream) -> None:
        woken.append(name)
        assert slots.take(stream) is not None

    slots.wait(streams[1], lambda: woken.append("has hung up"))
    slots.wait(streams[2], lambda: take("first", streams[2]))
    slots.wait(streams[3], lambda: take("second", streams[3]))
    let_go(slots, streams[0], taken[0])
    assert woken == ["has hung up", "first"]
    assert slots.total_bytes == 4 * SLOT_BYTES


def test_a_machine_waits_in_one_place_however_often_it_connects() -> None:
    slots, woken = Slots(4, 8 * PAYLOAD_BYTES), list[str]()
    streams = [holder(number) for number in range(4)]
    taken = [hold(slots, stream, 1)[0] for stream in streams]
    for number in range(1000):
        slots.wait(streams[1], lambda number=number: woken.append(f"connection {number}"))  # type: ignore[misc]
    slots.wait(streams[2], lambda: woken.append("another machine"))
    assert slots.waiting == 2
    let_go(slots, streams[0], taken[0])
    assert woken == ["connection 999", "another machine"]


def test_who_holds_its_share_lets_others_pass_and_keeps_its_place() -> None:
    slots, woken = Slots(20, 64 * PAYLOAD_BYTES), list[str]()
    greedy, modest = holder(1), holder(2)
    held = []
    while (more := slots.take(greedy)) is not None:
        greedy.open(more)
        more.filled = more.parsed = more.durable = 100
        greedy.close()
        held.append(more)
    assert len(held) == 13
    slots.wait(greedy, lambda: woken.append("greedy"))
    others = hold(slots, modest, 3)
    assert slots.level is Level.CRITICAL
    slots.wait(modest, lambda: woken.append("modest"))
    let_go(slots, modest, others[0])
    assert woken == ["modest"]
    while "greedy" not in woken:
        let_go(slots, greedy, held.pop())
    assert len(held) <= 12
