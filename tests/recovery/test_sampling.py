"""A share of a log at a time: damage is found in its turn, a broken chain in every turn; no faster than told."""

from __future__ import annotations

import random

import pytest

from recovery.pacing import PacedStore
from recovery.sampling import part_of, verify_share
from replicar.errors import PermanentError
from replicar.formats import segment
from replicar.storage import PageBlobStore
from tests.recovery.log_builder import LogBuilder

PARTS = 5
SEGMENTS = 40


@pytest.fixture
async def sound(store: PageBlobStore) -> LogBuilder:
    builder = LogBuilder(store, stripe_count=2, model=False)
    builder.begin(1 << 20)
    random_ = random.Random(5)
    for _ in range(SEGMENTS):
        for _ in range(6):
            builder.write(0, 512 * random_.randrange(2000), random_.randbytes(4096))
        await builder.seal()
    return builder


async def flip(builder: LogBuilder, number: int, at: int) -> None:
    blob, offset, _ = builder.placed[number]
    page = (offset + at) // 512 * 512
    data = bytearray(await builder.store.read(blob, page, 512))
    data[offset + at - page] ^= 1
    await builder.store.put_pages(blob, page, bytes(data))


async def test_in_as_many_turns_as_there_are_parts_every_segment_is_opened_once(sound: LogBuilder) -> None:
    reports = [await verify_share(sound.log, parts=PARTS, turn=turn) for turn in range(7, 7 + PARTS)]
    assert all(report.is_sound for report in reports)
    assert [report.segments for report in reports] == [SEGMENTS] * PARTS
    assert sum(report.opened for report in reports) == SEGMENTS
    assert all(report.opened < SEGMENTS // 2 for report in reports)


async def test_a_flipped_bit_of_data_is_found_in_its_turn_and_only_then(sound: LogBuilder) -> None:
    await flip(sound, 13, segment.HEADER_BYTES + 50)
    part = part_of(sound.log, 13, PARTS)
    for turn in range(PARTS):
        report = await verify_share(sound.log, parts=PARTS, turn=turn)
        if turn != part:
            assert report.is_sound
            continue
        (problem,) = report.problems
        assert (problem.number, problem.blob) == (13, sound.placed[13][0])


async def test_a_broken_table_is_found_in_every_turn(sound: LogBuilder) -> None:
    blob, offset, length = sound.placed[3]
    header = segment.read_header(await sound.store.read(blob, offset, segment.HEADER_BYTES))
    assert header is not None
    await flip(sound, 3, header.table_offset + 20)
    for turn in range(PARTS):
        report = await verify_share(sound.log, parts=PARTS, turn=turn, stored_number=SEGMENTS)
        assert not report.is_sound
        assert "segment 3" in report.problems[0].text
    assert length


async def test_a_log_that_was_cut_short_is_found(sound: LogBuilder) -> None:
    blob, offset, length = sound.placed[SEGMENTS]
    await sound.store.clear_pages(blob, offset, length)
    report = await verify_share(sound.log, parts=PARTS, turn=0, stored_number=SEGMENTS)
    assert "was reported as stored" in report.problems[0].text


async def test_where_there_is_no_log_that_is_said(store: PageBlobStore) -> None:
    with pytest.raises(PermanentError, match="nothing in storage"):
        await verify_share(LogBuilder(store).log, parts=PARTS, turn=0)


class HandClock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now_ns(self) -> int:
        return int(self.seconds * 1e9)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


async def test_reads_go_no_faster_than_told(store: PageBlobStore) -> None:
    clock = HandClock()
    paced = PacedStore(store, 1 << 20, clock=clock)
    await store.create("blob", 1 << 20)
    for _ in range(160):
        await paced.read("blob", 0, 1 << 16)
    assert 8.9 < clock.seconds < 9.1  # 10 MiB, of which one second's worth was saved up
