"""The promise itself: every prefix of an ordered stream is recovered as the disks really were."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from recovery.points import AtSequence, Instant, Latest, Named, locate
from recovery.view import View
from replicar.errors import PermanentError
from replicar.formats.record import DiskAction
from replicar.storage import MemoryStore
from tests.recovery.log_builder import TICK_NS, LogBuilder

SECTOR = 512
SIZES = (64 * SECTOR, 24 * SECTOR)


async def contents(builder: LogBuilder, view: View) -> dict[int, bytes]:
    """Every disk of a view twice: read at random, and put together from its pieces; they must agree."""
    disks = {}
    for disk in view.disks:
        whole = await view.read(disk, 0, disk.size_bytes)
        image = bytearray(disk.size_bytes)
        async for offset, data in view.pieces(disk):
            image[offset : offset + len(data)] = data
        assert bytes(image) == whole
        disks[disk.index] = whole
    return disks


async def random_log(seed: int) -> LogBuilder:
    random_ = random.Random(seed)
    store = MemoryStore()
    await store.ensure_container()
    builder = LogBuilder(
        store, stripe_count=random_.choice([1, 3]), frame_descriptors=random_.choice([1, 5, 40]), blob_bytes=1 << 20
    )
    builder.begin(*SIZES)
    for number in range(random_.randrange(1, 60)):
        disk = random_.choice(sorted(builder.disks))
        sectors = SIZES[disk] // SECTOR
        start = random_.randrange(sectors)
        length = random_.randrange(1, sectors - start + 1)
        match random_.choice("wwwwwzzmsr"):
            case "w":
                builder.write(disk, start * SECTOR, random_.randbytes(length * SECTOR))
            case "z":
                builder.zero(disk, start * SECTOR, length * SECTOR)
            case "m":
                builder.mark(f"mark{number}")
            case "s":
                builder.cut_frame()
                if builder.sequence > builder._first:
                    await builder.seal()
            case _:
                if builder.sequence == builder._first:
                    await builder.begin_run()
    builder.mark("end")
    await builder.seal()
    return builder


@given(st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_prefix_of_a_stream_is_the_disks_as_they_were(seed: int) -> None:
    async def story() -> None:
        builder = await random_log(seed)
        first_offered = len(SIZES) + 2  # GAP_END of the initial replication
        last = builder.sequence - 1
        chosen = random.Random(seed).choices(range(first_offered, last + 1), k=3)
        for sequence in {first_offered, last, *chosen}:
            state = await locate(builder.log, AtSequence(sequence))
            assert state.place.sequence == sequence
            # So little memory makes many windows of each disk.
            view = View(builder.log, state, memory_bytes=16 * SECTOR)
            assert await contents(builder, view) == builder.expected[sequence]
            by_time = await locate(builder.log, Instant(builder.times[sequence]))
            assert by_time.place == state.place
            if sequence < last:
                between = await locate(builder.log, Instant(builder.times[sequence] + TICK_NS // 2))
                assert between.place == state.place
        latest = await locate(builder.log, Latest(), stored_number=builder.number - 1)
        named = await locate(builder.log, Named("end"))
        assert latest.place.sequence == named.place.sequence == last
        assert await contents(builder, View(builder.log, named)) == builder.expected[last]

    asyncio.run(story())


async def test_a_disk_that_shrinks_and_grows_again_comes_back_with_zeros(builder: LogBuilder) -> None:
    builder.begin(16 * SECTOR)
    builder.write(0, 0, b"a" * 16 * SECTOR)
    builder.disk(0, "disk0", 8 * SECTOR)
    small = builder.mark("small")
    builder.disk(0, "disk0", 16 * SECTOR)
    large = builder.mark("large")
    await builder.seal()
    for sequence, size in ((small, 8 * SECTOR), (large, 16 * SECTOR)):
        view = View(builder.log, await locate(builder.log, AtSequence(sequence)))
        assert await contents(builder, view) == builder.expected[sequence]
        assert view.disk("disk0").size_bytes == size


async def test_a_disk_is_there_only_between_its_adding_and_its_removal(builder: LogBuilder) -> None:
    before = builder.begin(SECTOR)
    builder.disk(1, "data", 2 * SECTOR)
    with_it = builder.write(1, 0, b"d" * 2 * SECTOR)
    await builder.seal()
    builder.disk(1, "data", 0, DiskAction.REMOVED)
    without = builder.mark("without")
    builder.disk(1, "other", SECTOR)
    again = builder.mark("again")
    await builder.seal()
    names = {}
    for sequence in (before, with_it, without, again):
        view = View(builder.log, await locate(builder.log, AtSequence(sequence)))
        names[sequence] = [disk.name for disk in view.disks]
        assert await contents(builder, view) == builder.expected[sequence]
    assert list(names.values()) == [["disk0"], ["disk0", "data"], ["disk0"], ["disk0", "other"]]


async def test_a_run_that_replaces_the_end_of_another_is_the_one_that_counts(builder: LogBuilder) -> None:
    builder.begin(SECTOR)
    await builder.seal()
    state = (builder.number, builder.sequence, builder.previous)
    builder.write(0, 0, b"x" * SECTOR)
    await builder.seal()  # by a writer that was fenced before it could report this segment
    builder.number, builder.sequence, builder.previous = state
    builder._first = builder._frame_first = builder.sequence
    await builder.begin_run(epoch=2)
    last = builder.write(0, 0, b"y" * SECTOR)
    await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    assert view.state.place.sequence == last
    assert await view.read(view.disk("disk0"), 0, SECTOR) == b"y" * SECTOR


async def test_an_unknown_disk_is_refused_with_the_names_there_are(builder: LogBuilder) -> None:
    builder.begin(SECTOR, SECTOR)
    await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    with pytest.raises(PermanentError) as caught:
        view.disk("system")
    assert "disk0, disk1" in caught.value.hint
