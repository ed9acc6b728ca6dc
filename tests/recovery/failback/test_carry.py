"""What differs is carried, no more and no less, however often it is cut short."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from recovery.failback import carry as module
from recovery.failback.carry import SECTOR_BYTES, carry, check_fits, unequal, verify
from recovery.failback.spans import Spans
from replicar.errors import CorruptionError, PermanentError
from tests.recovery.failback.disks import MemoryDisk

SIZE = 96 * SECTOR_BYTES


def _diverged(seed: int, writes: int, *, size: int = SIZE) -> tuple[bytes, bytes, Spans, Spans]:
    """Two disks that agreed once, and what each had written to it since; zeros among it."""
    draw = random.Random(seed)
    agreed = draw.randbytes(size)
    sides, histories = [bytearray(agreed), bytearray(agreed)], [[], []]  # type: ignore[var-annotated]
    for _ in range(writes):
        side = draw.randrange(2)
        offset = draw.randrange(size // SECTOR_BYTES) * SECTOR_BYTES
        length = min(draw.randrange(1, 9) * SECTOR_BYTES, size - offset)
        sides[side][offset : offset + length] = draw.choice([bytes(length), draw.randbytes(length)])
        histories[side].append((offset, length))
    return bytes(sides[0]), bytes(sides[1]), Spans.of(histories[0]), Spans.of(histories[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 20), st.booleans())
async def test_both_histories_are_enough_to_make_both_sides_equal(seed: int, writes: int, compare: bool) -> None:
    theirs, ours, there, here = _diverged(seed, writes)
    origin, destination = MemoryDisk(theirs), MemoryDisk(ours)
    spans = there.union(here)
    moved = await carry(spans, origin, destination, compare=compare)
    assert destination.data == theirs
    assert moved.looked_at == spans.total_bytes
    assert moved.written == destination.written
    await verify(Spans.whole(SIZE), origin, destination, disk="root")


async def test_no_more_than_what_diverged_is_written() -> None:
    theirs, ours, there, here = _diverged(7, 12)
    origin, destination = MemoryDisk(theirs), MemoryDisk(ours)
    moved = await carry(there.union(here), origin, destination)
    assert moved.written + moved.zeroed == there.union(here).total_bytes


async def test_without_histories_the_bytes_themselves_are_compared_and_few_are_written() -> None:
    theirs = random.Random(1).randbytes(SIZE)
    ours = bytearray(theirs)
    ours[5 * SECTOR_BYTES] ^= 1
    ours[90 * SECTOR_BYTES] ^= 1
    origin, destination = MemoryDisk(theirs), MemoryDisk(bytes(ours))
    moved = await carry(Spans.whole(SIZE), origin, destination, compare=True)
    assert destination.data == theirs
    assert moved.written == 2 * SECTOR_BYTES


async def test_what_differs_within_some_stretches_is_found_and_nothing_outside_of_them() -> None:
    ours = random.Random(1).randbytes(SIZE)
    theirs = bytearray(ours)
    for sector in (3, 4, 50, 90):
        theirs[sector * SECTOR_BYTES] ^= 1
    within = Spans.of([(0, 60 * SECTOR_BYTES)])
    found = await unequal(within, MemoryDisk(ours), MemoryDisk(bytes(theirs)))
    sectors = [(start // SECTOR_BYTES, end // SECTOR_BYTES) for start, end in zip(found.start, found.end, strict=True)]
    assert sectors == [(3, 5), (50, 51)]


async def test_a_disk_whose_end_is_no_whole_sector_is_carried_to_its_last_byte() -> None:
    theirs = random.Random(2).randbytes(SIZE + 100)
    for compare in (False, True):
        destination = MemoryDisk(bytes(SIZE + 100))
        await carry(Spans.whole(SIZE + 100), MemoryDisk(theirs), destination, compare=compare)
        assert destination.data == theirs


@pytest.mark.parametrize("seed", range(20))
async def test_cut_short_at_any_write_it_goes_on_from_its_last_checkpoint(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * SECTOR_BYTES)
    monkeypatch.setattr(module, "CHECKPOINT_BYTES", 16 * SECTOR_BYTES)
    theirs, ours, there, here = _diverged(seed, 30)
    spans, origin, reached = there.union(here), MemoryDisk(theirs), [0]

    async def checkpoint(offset: int) -> None:
        reached.append(offset)

    destination = MemoryDisk(ours, fail_after=random.Random(seed).randrange(30))
    try:
        await carry(spans, origin, destination, checkpoint=checkpoint)
    except OSError:
        again = MemoryDisk(bytes(destination.data))
        await carry(spans, origin, again, start_at=reached[-1], checkpoint=checkpoint)
        destination = again
    assert destination.data == theirs
    assert reached == sorted(reached)


async def test_progress_counts_what_an_earlier_run_did() -> None:
    theirs, ours, there, here = _diverged(3, 30)
    spans, told = there.union(here), list[tuple[int, int]]()
    middle = int(spans.end[len(spans) // 2])
    await carry(
        spans,
        MemoryDisk(theirs),
        MemoryDisk(ours),
        start_at=middle,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (spans.total_bytes, spans.total_bytes)
    assert told[0][0] > spans.clipped(0, middle).total_bytes


async def test_a_side_that_is_written_by_somebody_else_is_found_before_the_switch() -> None:
    theirs, ours, there, here = _diverged(4, 10)
    origin, destination = MemoryDisk(theirs), MemoryDisk(ours)
    await carry(there.union(here), origin, destination)
    destination.data[40 * SECTOR_BYTES + 3] ^= 0xFF
    with pytest.raises(CorruptionError, match=f"first at byte {40 * SECTOR_BYTES}"):
        await verify(Spans.whole(SIZE), origin, destination, disk="root")


def test_a_smaller_disk_at_home_is_refused_before_anything_is_written() -> None:
    with pytest.raises(PermanentError, match="nothing was written") as caught:
        check_fits(MemoryDisk(bytes(1024)), MemoryDisk(bytes(512)), "root")
    assert "1024 bytes" in caught.value.message
