"""Readers in order have fetched for them what they will ask for; others nothing."""

from __future__ import annotations

import random

from recovery.export.readahead import FIRST_BYTES, MOST_BYTES, STREAMS, ReadAhead

SIZE = 1 << 30
BLOCK = 64 << 10


def test_reads_at_random_fetch_nothing() -> None:
    ahead, random_ = ReadAhead(SIZE), random.Random(2)
    offsets = random_.sample(range(0, SIZE, 1 << 20), 500)
    assert not any(ahead.follow(offset, 4096) for offset in offsets)


def test_a_reader_in_order_is_ever_further_ahead_up_to_a_limit() -> None:
    ahead, fetched = ReadAhead(SIZE), 0
    ranges = [found for at in range(0, 64 << 20, BLOCK) if (found := ahead.follow(at, BLOCK)) is not None]
    assert ranges[0] == (2 * BLOCK, FIRST_BYTES)
    assert max(length for _, length in ranges) <= MOST_BYTES
    for offset, length in ranges:  # every byte once, in order
        assert offset == (fetched or offset)
        fetched = offset + length
    assert fetched >= 64 << 20
    assert len(ranges) < 64


def test_readers_in_order_do_not_disturb_each_other() -> None:
    ahead = ReadAhead(SIZE)
    starts = range(0, SIZE, SIZE // STREAMS)
    assert not any(ahead.follow(start, BLOCK) for start in starts)
    found = [ahead.follow(start + BLOCK, BLOCK) for start in starts]
    assert found == [(start + 2 * BLOCK, FIRST_BYTES) for start in starts]


def test_nothing_is_fetched_behind_the_disks_end() -> None:
    ahead = ReadAhead(1 << 20)
    for at in range(0, 1 << 20, BLOCK):
        found = ahead.follow(at, BLOCK)
        assert found is None or found[0] + found[1] <= 1 << 20
