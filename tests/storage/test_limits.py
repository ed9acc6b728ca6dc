"""Azure's limits, kept where the emulator forgives, and its pace, kept under a clock that the test holds."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, strategies as st

from replicar.errors import LimitError, PermanentError
from replicar.storage import MemoryStore
from replicar.storage.limits import (
    MAX_BLOB_BYTES,
    MAX_BYTES_PER_SECOND,
    MAX_PACED_BLOBS,
    MAX_PUT_BYTES,
    MAX_REQUESTS_PER_SECOND,
    LimitedStore,
    TokenBucket,
    check_metadata,
)
from tests.storage.support import HandClock

MIB = 1 << 20


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def store(clock: HandClock) -> LimitedStore:
    made = LimitedStore(MemoryStore(clock=clock), clock=clock)
    await made.ensure_container()
    await made.create("a", 64 * MIB)
    return made


async def test_a_put_of_four_mebibytes_passes_and_a_page_more_does_not(store: LimitedStore) -> None:
    await store.put_pages("a", 0, bytes(MAX_PUT_BYTES))
    with pytest.raises(LimitError) as caught:
        await store.put_pages("a", 0, bytes(MAX_PUT_BYTES + 512))
    assert (caught.value.fields["limit"], caught.value.fields["maximum"]) == ("put_bytes", 4 * MIB)


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 513), (-512, 512), (0, 0)])
async def test_writes_that_are_no_whole_pages_are_refused(store: LimitedStore, offset: int, length: int) -> None:
    with pytest.raises(LimitError):
        await store.put_pages("a", offset, bytes(length))
    with pytest.raises(LimitError):
        await store.clear_pages("a", offset, length)


async def test_a_write_past_the_end_is_refused_and_one_up_to_it_is_not(store: LimitedStore) -> None:
    await store.put_pages("a", 64 * MIB - 512, bytes(512))
    with pytest.raises(LimitError, match="blob_end"):
        await store.put_pages("a", 64 * MIB - 512, bytes(1024))


async def test_the_end_of_a_blob_that_somebody_else_made_is_looked_up(clock: HandClock) -> None:
    inner = MemoryStore(clock=clock)
    await inner.ensure_container()
    await inner.create("a", 1024)
    store = LimitedStore(inner, clock=clock)
    with pytest.raises(LimitError, match="blob_end"):
        await store.put_pages("a", 1024, bytes(512))
    await inner.delete("a")
    await inner.create("a", 2048)
    await store.put_pages("a", 1024, bytes(512))


async def test_a_write_to_a_missing_blob_says_so_and_is_not_remembered(store: LimitedStore) -> None:
    with pytest.raises(PermanentError, match="no blob b"):
        await store.put_pages("b", 0, bytes(512))
    await store.create("b", 512)
    await store.put_pages("b", 0, bytes(512))


async def test_blobs_are_at_most_eight_tebibytes_of_whole_pages(store: LimitedStore) -> None:
    await store.create("largest", MAX_BLOB_BYTES)
    for size in (MAX_BLOB_BYTES + 512, 1000, -512):
        with pytest.raises(LimitError):
            await store.create("wrong", size)


async def test_metadata_that_would_not_come_back_as_sent_is_refused() -> None:
    check_metadata({"a_1": "x" * 8000}, "blob")
    for bad in ({"Upper": "x"}, {"with-dash": "x"}, {"1": "x"}, {"a": "ö"}, {"a": " x"}, {"a": ""}, {"a": "x\r\ny"}):
        with pytest.raises(ValueError, match="metadata"):
            check_metadata(bad, "blob")
    with pytest.raises(LimitError):
        check_metadata({"a": "x" * 8192}, "blob")


async def test_views_of_wider_items_are_a_programmers_error(store: LimitedStore) -> None:
    with pytest.raises(ValueError, match="cast"):
        await store.put_pages("a", 0, memoryview(bytes(4096)).cast("Q"))


async def test_a_second_of_bytes_passes_at_once_and_then_the_rate_holds(store: LimitedStore, clock: HandClock) -> None:
    start = clock.seconds
    for _ in range(45):  # 180 MiB at 60 MiB/s, of which the first 60 MiB were saved up
        await store.put_pages("a", 0, bytes(MAX_PUT_BYTES))
    assert clock.seconds - start == pytest.approx(2.0, abs=0.01)
    assert clock.slept[0] == pytest.approx(4 / 60, abs=0.01)


async def test_small_requests_are_held_to_five_hundred_a_second(store: LimitedStore, clock: HandClock) -> None:
    await clock.sleep(10)
    start = clock.seconds
    for number in range(1500):
        await store.put_pages("a", number * 512, bytes(512))
    assert clock.seconds - start == pytest.approx(2.0, abs=0.01)


async def test_reading_spends_the_same_budget(store: LimitedStore, clock: HandClock) -> None:
    start = clock.seconds
    for _ in range(30):
        await store.read("a", 0, MAX_PUT_BYTES)
    assert clock.seconds - start == pytest.approx(1.0, abs=0.01)


async def test_each_blob_has_its_own_budget_and_a_writer_can_find_the_free_one(
    store: LimitedStore, clock: HandClock
) -> None:
    await store.create("b", 64 * MIB)
    for _ in range(15):
        await store.put_pages("a", 0, bytes(MAX_PUT_BYTES))
    assert clock.slept == []
    assert store.budget_wait_seconds("a", MAX_PUT_BYTES) == pytest.approx(4 / 60)
    assert store.budget_wait_seconds("b", MAX_PUT_BYTES) == 0
    before = clock.seconds
    await store.put_pages("b", 0, bytes(MAX_PUT_BYTES))
    assert clock.seconds == before
    await clock.sleep(store.budget_wait_seconds("a", MAX_PUT_BYTES))
    assert store.budget_wait_seconds("a", MAX_PUT_BYTES) == pytest.approx(0, abs=1e-9)


async def test_asking_about_the_budget_spends_none(store: LimitedStore) -> None:
    for _ in range(10_000):
        assert store.budget_wait_seconds("a", MAX_PUT_BYTES) == 0


async def test_a_waiter_that_is_cancelled_does_not_stop_the_others() -> None:
    gate = asyncio.Event()

    class GatedClock(HandClock):
        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            await gate.wait()

    clock = GatedClock()
    store = LimitedStore(MemoryStore(clock=clock), clock=clock)
    await store.ensure_container()
    await store.create("a", 64 * MIB)
    for _ in range(15):
        await store.put_pages("a", 0, bytes(MAX_PUT_BYTES))
    first, second = (asyncio.create_task(store.put_pages("a", 0, b"x" * 512)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await store.read("a", 0, 512) == b"x" * 512


async def test_only_so_many_blobs_are_remembered(store: LimitedStore, clock: HandClock) -> None:
    for number in range(MAX_PACED_BLOBS + 50):
        await store.create(f"n{number}", 512)
    assert len(store._budgets) == MAX_PACED_BLOBS
    await store.put_pages("a", 0, bytes(512))


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 8 * MIB)), max_size=60))
def test_no_window_of_time_ever_carries_more_than_its_rate_and_one_burst(steps: list[tuple[float, int]]) -> None:
    bucket, now, sent = TokenBucket.full(MAX_BYTES_PER_SECOND, 0.0), 0.0, list[tuple[float, int]]()
    for pause, amount in steps:
        now += pause
        asked = bucket.wait_seconds(amount, now)
        start = now + bucket.take(amount, now)
        assert start - now == pytest.approx(asked, abs=1e-6), "the question and the deed agree"
        sent.append((start, amount))
    for index, (begin, _) in enumerate(sent):
        for end, _ in sent[index:]:
            carried = sum(amount for at, amount in sent if begin <= at <= end)
            # A burst of one second, the window itself, and the one request whose debt is still being paid.
            assert carried <= MAX_BYTES_PER_SECOND * (1 + end - begin) + 8 * MIB + 1


def test_the_constants_are_azures() -> None:
    assert (MAX_REQUESTS_PER_SECOND, MAX_BYTES_PER_SECOND) == (500, 60 * MIB)
