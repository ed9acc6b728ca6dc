"""Checkpoints: every point opens as it would without them, with little to read, and they may be damaged or missing."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from recovery.points import AtSequence, Instant, Latest, Named, locate
from recovery.verify import verify
from recovery.view import View
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import indexblob
from replicar.formats.indexblob import BlobKind
from replicar.log.index import open_index
from replicar.log.reader import LogReader
from replicar.log.tail import Stored, sound_tail
from replicar.storage import MemoryStore, PageBlobStore
from tests.recovery.faults import CountingStore, Stopped, StoppingStore
from tests.recovery.indexed import SECTOR, Story, contents, index_of
from tests.recovery.log_builder import LogBuilder


async def _store() -> MemoryStore:
    memory = MemoryStore()
    await memory.ensure_container()
    return memory


@given(st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_point_is_the_same_with_checkpoints_as_it_was(seed: int) -> None:
    async def tale() -> None:
        story = Story(await _store(), seed)
        builder, random_ = story.builder, random.Random(seed)
        for _ in range(random_.randrange(1, 5)):
            await story.go_on(random_.randrange(1, 9))
            await index_of(builder)
        await story.end_gap()
        chosen = random_.choices(story.offered, k=4)
        for sequence in {*chosen, story.offered[-1], story.ends[-1]}:
            state = await locate(builder.log, AtSequence(sequence))
            assert state.place.sequence == sequence
            view = View(builder.log, state, memory_bytes=16 * SECTOR)
            assert await contents(view) == builder.expected[sequence]
            assert (await locate(builder.log, Instant(builder.times[sequence]))).place == state.place
        latest = await locate(builder.log, Latest(), stored_number=builder.number - 1, stored_digest=builder.previous)
        assert await contents(View(builder.log, latest)) == builder.expected[story.offered[-1]]
        for name, sequence in random_.sample(sorted(story.marks.items()), min(3, len(story.marks))):
            assert (await locate(builder.log, Named(name))).place.sequence == sequence
        for sequence in random_.sample(range(1, builder.sequence), 5):
            if sequence not in story.offered:
                with pytest.raises(PermanentError, match="gap"):
                    await locate(builder.log, AtSequence(sequence))

    asyncio.run(tale())


@pytest.fixture
async def long(store: PageBlobStore) -> Story:
    story = Story(store, 11)
    await story.go_on(120)
    await story.end_gap()
    await index_of(story.builder, every=4)
    return story


async def test_opening_a_point_of_a_long_log_reads_little_of_it(long: Story) -> None:
    builder = long.builder
    counting = CountingStore(builder.store)
    builder.store = counting
    most = 0
    for sequence in long.offered[:: len(long.offered) // 20]:
        before = counting.reads
        view = View(builder.log, await locate(builder.log, AtSequence(sequence), stored_number=builder.number - 1))
        await view.read(view.disks[0], 0, SECTOR)
        most = max(most, counting.reads - before)
    assert most <= 40, "four segments behind a checkpoint, a few tiers, one chunk"
    before = counting.reads
    tail = await sound_tail(LogReader(builder.store, builder.machine_id, {1: builder.key}), Stored(builder.number - 1))
    assert tail.number == builder.number - 1
    assert counting.reads - before <= 40


async def test_audits_are_remembered_over_checkpoints(builder: LogBuilder) -> None:
    disk = 64 * SECTOR
    builder.begin(disk)
    builder.write(0, 0, b"a" * disk)
    builder.audit(0, 0, disk)
    await builder.seal()
    builder.write(0, SECTOR, b"b" * SECTOR)
    await builder.seal()
    plain = await locate(builder.log, Latest())
    said = await plain.audited(plain.disks[0])
    assert (said.audited_bytes, said.proven_bytes) == (disk, disk - SECTOR)
    await index_of(builder, every=1)
    indexed = await locate(builder.log, Latest())
    assert indexed.checkpoint
    assert await indexed.audited(indexed.disks[0]) == said


async def test_a_damaged_checkpoint_is_passed_over_and_a_damaged_tier_is_said(long: Story) -> None:
    builder, last = long.builder, long.offered[-1]
    known = await open_index(builder.store, builder.machine_id, {1: builder.key})
    newest = str(known.listing.checkpoints[-1])
    sound = await locate(builder.log, AtSequence(last))
    await _flip(builder.store, newest, indexblob.HEADER_BYTES + 7)
    older = await locate(builder.log, AtSequence(last))
    assert older.checkpoint != sound.checkpoint
    assert await contents(View(builder.log, older)) == builder.expected[last]
    for tier in known.listing.tiers:
        await _flip(builder.store, str(tier), indexblob.HEADER_BYTES + 7)
    with pytest.raises(CorruptionError, match="does not open"):
        await contents(View(builder.log, await locate(builder.log, AtSequence(last))))


async def test_a_checkpoint_of_a_history_that_was_replaced_is_not_used(builder: LogBuilder) -> None:
    builder.begin(SECTOR)
    await builder.seal()
    state = (builder.number, builder.sequence, builder.previous)
    builder.write(0, 0, b"x" * SECTOR)
    await builder.seal()
    await index_of(builder, every=1)
    builder.number, builder.sequence, builder.previous = state
    builder._first = builder._frame_first = builder.sequence
    await builder.begin_run(epoch=2)
    last = builder.write(0, 0, b"y" * SECTOR)
    await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    assert view.state.place.sequence == last
    assert await view.read(view.disks[0], 0, SECTOR) == b"y" * SECTOR


async def test_a_log_that_holds_another_segment_than_was_reported_is_found_behind_a_checkpoint_too(
    builder: LogBuilder,
) -> None:
    builder.begin(SECTOR)
    for number in range(4):
        builder.write(0, 0, bytes([number]) * SECTOR)
        await builder.seal()
    await index_of(builder, every=2)
    for number in (3, 4):
        with pytest.raises(CorruptionError, match="is not the one that was reported as stored"):
            await locate(builder.log, Latest(), stored_number=number, stored_digest=bytes(32))


async def test_a_wrong_key_is_said_and_never_taken_for_an_empty_log(long: Story) -> None:
    long.builder.key = bytes(32)
    with pytest.raises(CorruptionError, match="sealed with another key"):
        await locate(long.builder.log, Latest())


async def test_an_indexer_that_dies_anywhere_is_followed_by_one_that_finishes(store: PageBlobStore) -> None:
    story = Story(store, 5)
    await story.go_on(9)
    await story.end_gap()
    builder = story.builder
    for step in range(200):
        builder.store = StoppingStore(store, step, applied=bool(step % 2))
        try:
            await index_of(builder, every=3, seed=step)
        except Stopped:
            builder.store = store
            state = await locate(builder.log, Latest())
            assert await contents(View(builder.log, state)) == builder.expected[state.place.sequence]
            continue
        break
    assert step > 20
    builder.store = store
    known = await open_index(store, builder.machine_id, {1: builder.key})
    assert known.listing.checkpoints
    report = await verify(builder.log, stored_number=builder.number - 1)
    assert report.is_sound


async def test_two_indexers_at_once_do_no_harm(store: PageBlobStore) -> None:
    story = Story(store, 6)
    await story.go_on(12)
    await story.end_gap()
    await asyncio.gather(*(index_of(story.builder, every=3, seed=seed) for seed in (1, 2)))
    for sequence in story.offered[::7]:
        state = await locate(story.builder.log, AtSequence(sequence))
        assert await contents(View(story.builder.log, state)) == story.builder.expected[sequence]


async def _flip(store: PageBlobStore, name: str, offset: int) -> None:
    page = offset // SECTOR * SECTOR
    data = bytearray(await store.read(name, page, SECTOR))
    data[offset - page] ^= 0x20
    await store.put_pages(name, page, bytes(data))


def test_an_index_blobs_name_says_its_place_and_nothing_else_is_taken_for_one() -> None:
    machine = LogBuilder(MemoryStore()).machine_id
    name = indexblob.IndexName(machine, BlobKind.CHECKPOINT, 7, 9, "0123abcd")
    assert indexblob.read_name(str(name)) == name
    for other in (str(name).upper(), f"{name}x", str(name).replace("index", "log"), "a"):
        assert indexblob.read_name(other) is None
