"""Verification finds what is wrong, says where, and goes on behind it; recovery says what it can't give."""

from __future__ import annotations

import random

import pytest

from recovery.audits import Audited
from recovery.points import AtSequence, Latest, Named, Request, locate
from recovery.verify import Report, verify
from recovery.view import View
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import logblob, segment
from replicar.storage import PageBlobStore
from tests.recovery.log_builder import LogBuilder

SECTOR = 512
DISK = 256 * SECTOR


@pytest.fixture(params=[1, 3], ids=["one stripe", "three stripes"])
async def sound(request: pytest.FixtureRequest, store: PageBlobStore) -> LogBuilder:
    """Eight segments of random writes, in two runs, with audits; each of the same length."""
    builder = LogBuilder(store, stripe_count=request.param)
    builder.begin(DISK)
    builder.mark("start")
    random_ = random.Random(5)
    for number in range(1, 9):
        for _ in range(12):
            builder.write(0, random_.randrange(200) * SECTOR, random_.randbytes(8 * SECTOR))
        builder.audit(0, 0, DISK // 2)
        builder.zero(0, number * SECTOR, SECTOR)
        builder.mark(f"mark-{number}")
        await builder.seal()
        if number == 4:
            await builder.begin_run(epoch=2)
    return builder


async def checked(builder: LogBuilder) -> Report:
    return await verify(builder.log, stored_number=builder.number - 1, stored_digest=builder.previous)


async def flip(builder: LogBuilder, number: int, at: int) -> None:
    """Change one bit of a segment in storage, `at` bytes from its start."""
    blob, offset, _ = builder.placed[number]
    page = (offset + at) // SECTOR * SECTOR
    data = bytearray(await builder.store.read(blob, page, SECTOR))
    data[offset + at - page] ^= 0x10
    await builder.store.put_pages(blob, page, bytes(data))


def texts(report: Report) -> str:
    return "\n".join(problem.text for problem in report.problems)


async def test_a_sound_log_is_sound_to_the_last_byte(sound: LogBuilder) -> None:
    report = await checked(sound)
    assert report.problems == []
    assert report.is_sound
    assert (report.segments, report.last_number, report.last_sequence) == (8, 8, sound.sequence - 1)
    assert report.descriptors == sound.sequence - 1
    assert (report.audits, report.audits_skipped) == (7, 1)  # the first segment holds a gap
    assert report.sealed_bytes == sum(length for _, _, length in sound.placed.values())
    assert report.as_dict()["sound"] is True


@pytest.mark.parametrize("where", ["header", "first chunk", "last chunk", "table"])
async def test_a_flipped_bit_is_found_and_the_rest_is_checked_all_the_same(sound: LogBuilder, where: str) -> None:
    blob, offset, length = sound.placed[3]
    header = segment.read_header(await sound.store.read(blob, offset, length))
    assert header is not None
    at = {
        "header": 100,
        "first chunk": segment.HEADER_BYTES + 10,
        "last chunk": header.table_offset - 20,
        "table": header.table_offset + 30,
    }[where]
    await flip(sound, 3, at)
    report = await checked(sound)
    assert not report.is_sound
    assert any(problem.blob == blob and problem.offset is not None for problem in report.problems)
    assert report.last_number == 8
    if where != "header":
        assert {problem.number for problem in report.problems} == {3}
        assert report.segments == 8
    else:
        assert "segment 3 is missing" in texts(report)
        assert report.segments == 7


async def test_a_flipped_bit_in_a_chunk_stops_recovery_of_what_needs_it_only(sound: LogBuilder) -> None:
    await flip(sound, 8, segment.HEADER_BYTES + 10)
    state = await locate(sound.log, Latest(), stored_number=8)
    view = View(sound.log, state)
    with pytest.raises(CorruptionError) as caught:
        await view.read(view.disks[0], 0, DISK)
    assert caught.value.fields["number"] == 8
    assert caught.value.fields["blob"] == sound.placed[8][0]
    before = View(sound.log, await locate(sound.log, Named("mark-7")))
    assert await before.read(before.disks[0], 0, DISK) == sound.expected[before.state.place.sequence][0]


async def test_an_end_that_was_torn_while_it_was_written_is_left_out(
    sound: LogBuilder,
) -> None:
    """Its process server died in the middle of an upload: the table is there, a chunk before it is not."""
    await flip(sound, 8, segment.HEADER_BYTES + 10)
    view = View(sound.log, await locate(sound.log, Latest(), stored_number=7))
    assert await view.read(view.disks[0], 0, DISK) == sound.expected[view.state.place.sequence][0]
    with pytest.raises(PermanentError, match="is not in the log") as caught:
        await locate(sound.log, AtSequence(sound.sequence - 1), stored_number=7)
    assert "can be read up to segment 7" in caught.value.hint


async def test_swapped_segments_are_found(store: PageBlobStore) -> None:
    builder = LogBuilder(store)
    builder.begin(DISK)
    await builder.seal()
    for number in range(4):
        builder.write(0, number * SECTOR, bytes([number + 1]) * SECTOR)
        builder.mark(f"mark-{number}")
        await builder.seal()
    (blob, offset, length), (_, other, other_length) = builder.placed[2], builder.placed[3]
    assert length == other_length
    first, second = await store.read(blob, offset, length), await store.read(blob, other, length)
    await store.put_pages(blob, offset, second)
    await store.put_pages(blob, other, first)
    report = await checked(builder)
    assert "segment 2 is missing" in texts(report)
    assert "segment 2 lies where" in texts(report)
    with pytest.raises(CorruptionError):
        await locate(builder.log, Latest(), stored_number=5)


async def test_a_replayed_segment_is_found(sound: LogBuilder) -> None:
    blob, offset, length = sound.placed[2]
    other_blob, other, _ = sound.placed[6]
    await sound.store.put_pages(other_blob, other, await sound.store.read(blob, offset, length))
    report = await checked(sound)
    assert not report.is_sound
    assert "written for another log or run" in texts(report) or "lies where segment" in texts(report)


async def test_a_missing_segment_is_found_and_named(sound: LogBuilder) -> None:
    blob, offset, length = sound.placed[6]
    await sound.store.clear_pages(blob, offset, length)
    report = await checked(sound)
    assert "segment 6 is missing" in texts(report)
    assert report.last_number == 8
    with pytest.raises(CorruptionError, match="segment 6"):
        await locate(sound.log, Latest(), stored_number=8)


async def test_a_truncated_log_is_found_by_what_was_reported_as_stored(sound: LogBuilder) -> None:
    blob, offset, length = sound.placed[8]
    await sound.store.clear_pages(blob, offset, length)
    report = await checked(sound)
    assert "ends at segment 7, but segment 8 was reported as stored" in texts(report)
    with pytest.raises(CorruptionError, match="segment 8 was reported as stored"):
        await locate(sound.log, Latest(), stored_number=8)
    report = await verify(sound.log)  # who knows nothing of segment 8 can't miss it
    assert report.is_sound


async def test_another_segment_than_the_one_that_was_stored_is_found(sound: LogBuilder) -> None:
    report = await verify(sound.log, stored_number=8, stored_digest=bytes(32))
    assert "an older state was put back" in texts(report)


async def test_a_deleted_stripe_is_found(sound: LogBuilder) -> None:
    await sound.store.delete(sound.placed[7][0])
    report = await checked(sound)
    assert not report.is_sound


async def test_a_half_written_segment_behind_the_stored_ones_is_the_end_and_no_problem(sound: LogBuilder) -> None:
    stored, digest = sound.number - 1, sound.previous
    sound.write(0, 0, b"n" * 16 * SECTOR)
    await sound.seal()
    await flip(sound, stored + 1, 50)
    report = await verify(sound.log, stored_number=stored, stored_digest=digest)
    assert report.is_sound, texts(report)
    assert f"behind segment {stored}" in report.note
    report = await verify(sound.log)
    assert not report.is_sound  # who does not know what was stored has to be told


async def test_a_wrong_key_is_a_problem_of_every_segment(sound: LogBuilder) -> None:
    sound.key = bytes(32)
    report = await checked(sound)
    assert report.problem_count == 8
    assert "another key" in texts(report)


async def test_a_log_blob_with_anothers_header_is_found(sound: LogBuilder) -> None:
    blob = sound.placed[8][0]
    header = bytearray(await sound.store.read(blob, 0, logblob.HEADER_BYTES))
    header[20] ^= 1
    await sound.store.put_pages(blob, 0, bytes(header))
    report = await checked(sound)
    assert f"log blob {blob}" in texts(report)


async def test_an_audit_that_recovery_would_not_match_is_a_problem(builder: LogBuilder) -> None:
    builder.begin(DISK)
    await builder.seal()
    builder.write(0, 0, b"1" * SECTOR)
    builder.audit(0, 0, DISK, digest=bytes(16))
    await builder.seal()
    report = await checked(builder)
    assert f"at sequence 5 the source held other bytes at 0 of disk disk0 ({DISK} bytes)" in texts(report)


async def test_an_audit_that_fails_does_not_keep_the_others_from_being_compared(builder: LogBuilder) -> None:
    builder.begin(DISK)
    await builder.seal()
    builder.audit(0, 0, SECTOR, digest=bytes(16))
    builder.write(0, 0, b"1" * SECTOR)
    builder.audit(0, 0, DISK)
    builder.audit(0, SECTOR, SECTOR, digest=bytes(16))
    await builder.seal()
    report = await checked(builder)
    assert (report.audits, report.audits_failed, report.audits_skipped, report.problem_count) == (3, 2, 0, 2)
    assert "at 0 of disk disk0" in texts(report)
    assert f"at {SECTOR} of disk disk0" in texts(report)


async def audited(builder: LogBuilder, request: Request) -> tuple[Audited, int]:
    """What is proven of the disk at a point, and the point's time."""
    state = await locate(builder.log, request)
    return await state.audited(state.disks[0]), state.place.time_ns


async def test_a_state_says_how_much_of_it_was_audited_and_when(builder: LogBuilder) -> None:
    builder.begin(DISK)
    before = builder.sequence - 1
    await builder.seal()
    first = builder.audit(0, 0, 3 * SECTOR)
    second = builder.audit(0, SECTOR, SECTOR)
    await builder.seal()
    assert await audited(builder, AtSequence(before)) == (Audited(), builder.times[before])
    early = builder.times[first]
    for sequence in (first, second):
        held, _ = await audited(builder, AtSequence(sequence))
        assert held == Audited(3 * SECTOR, early, 3 * SECTOR, early)
    builder.audit(0, 0, DISK)
    await builder.seal()
    held, time_ns = await audited(builder, Latest())
    assert held == Audited(DISK, time_ns, DISK, time_ns)
    assert early < builder.times[second] < time_ns


async def test_an_audit_holds_for_what_was_not_written_since(builder: LogBuilder) -> None:
    builder.begin(DISK)
    builder.write(0, 0, b"old" * SECTOR)
    audit = builder.audit(0, 0, DISK)
    at = builder.times[audit]
    builder.write(0, SECTOR, b"n" * SECTOR)  # in the audit's own segment, and behind it
    await builder.seal()
    assert (await audited(builder, Latest()))[0] == Audited(DISK, at, DISK - SECTOR, at)
    builder.zero(0, 8 * SECTOR, 2 * SECTOR)
    await builder.seal()
    assert (await audited(builder, Latest()))[0] == Audited(DISK, at, DISK - 3 * SECTOR, at)
    again = builder.audit(0, SECTOR, SECTOR)
    await builder.seal()
    assert (await audited(builder, Latest()))[0] == Audited(DISK, at, DISK - 2 * SECTOR, at)
    assert (await audited(builder, AtSequence(audit)))[0] == Audited(DISK, at, DISK, at)
    builder.audit(0, 0, DISK)
    await builder.seal()
    held, time_ns = await audited(builder, Latest())
    # Zeros that were written have no place in the log: an audit of them is not held against them, nor for them.
    assert held == Audited(DISK, time_ns, DISK - 2 * SECTOR, time_ns)
    assert builder.times[again] < time_ns


async def test_audits_inside_a_gap_are_not_compared(builder: LogBuilder) -> None:
    builder.begin(DISK)
    builder.gap_begin("the journal was full")
    await builder.seal()
    builder.audit(0, 0, DISK, digest=bytes(16))
    await builder.seal()
    report = await checked(builder)
    assert report.is_sound
    assert (report.audits, report.audits_skipped) == (0, 1)


async def test_of_a_segment_only_the_audits_between_its_gaps_are_compared(builder: LogBuilder) -> None:
    builder.begin(DISK)
    builder.gap_begin("trace capture orders per mark")
    await builder.seal()
    for digest in (None, bytes(16)):  # a point, as of disks that are followed: what is told there has its place
        builder.audit(0, 0, DISK, digest=bytes(16))
        builder.gap_end()
        builder.audit(0, 0, DISK, digest=digest)
        builder.mark("point")
        builder.gap_begin("trace capture orders per mark")
        builder.audit(0, 0, DISK, digest=bytes(16))
        await builder.seal()
    report = await checked(builder)
    assert (report.audits, report.audits_failed, report.audits_skipped) == (2, 1, 4)


async def test_there_is_nothing_to_verify_of_an_unknown_machine(builder: LogBuilder) -> None:
    with pytest.raises(PermanentError, match="nothing in storage"):
        await verify(builder.log)
