"""When a request is asked again, how long it waits, and what happens after an outcome nobody knows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from random import Random

import pytest

from replicar.errors import (
    ConflictError,
    CorruptionError,
    FencedError,
    LimitError,
    PermanentError,
    ReplicarError,
    TransientError,
)
from replicar.storage import MemoryStore, outcome_is_certain
from replicar.storage.retry import RetryingStore, RetryPolicy
from replicar.storage.store import Pages
from tests.storage.support import HandClock


class TroubledStore(MemoryStore):
    """Fails as its script says: before doing what was asked, or after it (the answer got lost)."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__(clock=clock)
        self.before: list[ReplicarError] = []
        self.after: list[ReplicarError] = []
        self.asked = 0
        self.proposed: list[str | None] = []

    def _before(self) -> None:
        self.asked += 1
        if self.before:
            raise self.before.pop(0)

    def _after(self) -> None:
        if self.after:
            raise self.after.pop(0)

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        self._before()
        await super().create(name, size_bytes, metadata=metadata)
        self._after()

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        self._before()
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)
        self._after()

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        self._before()
        self.proposed.append(proposed_id)
        lease = await super().acquire_lease(name, proposed_id=proposed_id)
        self._after()
        return lease

    async def release_lease(self, name: str, lease_id: str) -> None:
        self._before()
        await super().release_lease(name, lease_id)
        self._after()


def busy(seconds: float | None = None) -> TransientError:
    return TransientError("busy", retry_after_seconds=seconds, outcome_certain=True)


def lost() -> TransientError:
    return TransientError("no answer", outcome_certain=False)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def inner(clock: HandClock) -> TroubledStore:
    made = TroubledStore(clock)
    await made.ensure_container()
    await MemoryStore.create(made, "a", 4096)
    return made


@pytest.fixture
def store(inner: TroubledStore, clock: HandClock) -> RetryingStore:
    return RetryingStore(inner, clock=clock, random=Random(5))


async def test_what_is_transient_is_asked_again_until_it_works(store: RetryingStore, inner: TroubledStore) -> None:
    inner.before = [busy(), lost(), busy()]
    await store.put_pages("a", 0, b"x" * 512)
    assert inner.asked == 4
    assert await store.read("a", 0, 512) == b"x" * 512


@pytest.mark.parametrize(
    "error", [PermanentError("no"), FencedError("no"), ConflictError("no"), LimitError("no"), CorruptionError("no")]
)
async def test_nothing_else_is_asked_again(
    store: RetryingStore, inner: TroubledStore, clock: HandClock, error: ReplicarError
) -> None:
    inner.before = [error]
    with pytest.raises(type(error)):
        await store.put_pages("a", 0, bytes(512))
    assert (inner.asked, clock.slept) == (1, [])


async def test_after_so_many_tries_the_last_error_comes_out_with_their_number(
    store: RetryingStore, inner: TroubledStore
) -> None:
    inner.before = [busy() for _ in range(20)]
    with pytest.raises(TransientError) as caught:
        await store.put_pages("a", 0, bytes(512))
    assert (inner.asked, caught.value.fields["attempts"]) == (RetryPolicy().attempts,) * 2
    assert outcome_is_certain(caught.value)


async def test_one_uncertain_try_makes_the_whole_call_uncertain(store: RetryingStore, inner: TroubledStore) -> None:
    inner.before = [busy(), lost(), *(busy() for _ in range(20))]
    with pytest.raises(TransientError) as caught:
        await store.put_pages("a", 0, bytes(512))
    assert not outcome_is_certain(caught.value)


async def test_the_deadline_ends_it_before_the_tries_do(inner: TroubledStore, clock: HandClock) -> None:
    store = RetryingStore(inner, clock=clock, random=Random(5), policy=RetryPolicy(attempts=1000, deadline_seconds=30))
    inner.before = [busy(7.0) for _ in range(100)]
    start = clock.seconds
    with pytest.raises(TransientError):
        await store.put_pages("a", 0, bytes(512))
    assert clock.seconds - start <= 30
    assert inner.asked == 5


async def test_what_the_service_asks_for_is_the_least_that_is_waited(
    store: RetryingStore, inner: TroubledStore, clock: HandClock
) -> None:
    inner.before = [busy(9.0)]
    await store.put_pages("a", 0, bytes(512))
    assert clock.slept == [9.0]


def test_delays_double_up_to_the_longest_and_are_spread_over_all_of_it() -> None:
    policy, random = RetryPolicy(base_seconds=1, longest_seconds=10), Random(1)
    for failures, ceiling in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (500, 10)]:
        delays = [policy.delay_seconds(failures, None, random) for _ in range(2000)]
        assert 0 <= min(delays) < 0.05 * ceiling
        assert 0.95 * ceiling < max(delays) <= ceiling


async def test_a_seed_repeats_every_delay(inner: TroubledStore) -> None:
    runs = []
    for _ in range(2):
        clock = HandClock()
        inner.before = [busy() for _ in range(5)]
        await RetryingStore(inner, clock=clock, random=Random(99)).put_pages("a", 0, bytes(512))
        runs.append(clock.slept)
    assert runs[0] == runs[1]
    assert len(runs[0]) == 5


async def test_a_conditional_write_with_an_unknown_outcome_goes_to_the_caller_who_must_raise_the_number(
    store: RetryingStore, inner: TroubledStore
) -> None:
    inner.after = [lost()]
    with pytest.raises(TransientError) as caught:
        await store.put_pages("a", 0, b"x" * 512, if_sequence_number_lt=1)
    assert not outcome_is_certain(caught.value)
    assert inner.asked == 1
    inner.before = [busy()]
    await store.put_pages("a", 0, b"y" * 512, if_sequence_number_lt=1)
    assert inner.asked == 3, "a certain outcome is retried"


async def test_a_create_whose_answer_was_lost_finds_its_own_blob(store: RetryingStore, inner: TroubledStore) -> None:
    inner.after = [lost()]
    await store.create("b", 1024, metadata={"run": "7", "nonce": "abc"})
    assert inner.asked == 2
    assert (await store.properties("b")).size_bytes == 1024


@pytest.mark.parametrize(("size", "metadata"), [(2048, {"nonce": "abc"}), (1024, {"nonce": "other"}), (1024, {})])
async def test_a_create_that_finds_somebody_elses_blob_shows_both(
    store: RetryingStore, inner: TroubledStore, size: int, metadata: dict[str, str]
) -> None:
    await MemoryStore.create(inner, "b", size, metadata=metadata)
    inner.before = [lost()]
    with pytest.raises(ConflictError) as caught:
        await store.create("b", 1024, metadata={"nonce": "abc"})
    assert caught.value.ours == {"size_bytes": 1024, "metadata": {"nonce": "abc"}}
    assert caught.value.theirs == {"size_bytes": size, "metadata": metadata}


@pytest.mark.parametrize("failures", [[], [busy]])
async def test_a_create_that_certainly_never_happened_takes_no_equal_blob_for_its_own(
    store: RetryingStore, inner: TroubledStore, failures: list[Callable[[], TransientError]]
) -> None:
    await MemoryStore.create(inner, "b", 1024)
    inner.before = [make() for make in failures]
    with pytest.raises(ConflictError):
        await store.create("b", 1024)


async def test_a_lease_whose_answer_was_lost_is_ours_at_the_second_try(
    store: RetryingStore, inner: TroubledStore
) -> None:
    inner.after = [lost()]
    lease = await store.acquire_lease("a")
    assert inner.proposed == [lease, lease]
    assert uuid.UUID(lease).version == 4
    await store.put_pages("a", 0, bytes(512), lease_id=lease)


async def test_every_lease_has_another_id(store: RetryingStore) -> None:
    first = await store.acquire_lease("a")
    await store.release_lease("a", first)
    assert await store.acquire_lease("a") != first


async def test_a_release_whose_answer_was_lost_has_released(store: RetryingStore, inner: TroubledStore) -> None:
    lease = await store.acquire_lease("a")
    inner.after = [lost()]
    await store.release_lease("a", lease)
    assert not (await store.properties("a")).leased
    with pytest.raises(FencedError):
        await store.release_lease("a", lease)
