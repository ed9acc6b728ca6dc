"""Reading a log back: over runs and stripes, past writers that died, and never past what was altered."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given, settings, strategies as st

from replicar.errors import CorruptionError, PermanentError
from replicar.formats import frame, logblob, segment
from replicar.log.reader import LogReader, Tail
from replicar.storage.memory import MemoryStore
from tests.formats import independent_decoder
from tests.golden import sample
from tests.log.support import BLOB_BYTES, KEY, MACHINE, Writer, flip, read, reader


async def _numbers(store: MemoryStore) -> list[int]:
    found, _ = await read(store)
    return [item.number for item in found]


async def test_a_log_that_nobody_began_is_empty() -> None:
    store = MemoryStore()
    await store.ensure_container()
    assert await read(store) == ([], Tail())


async def test_a_container_that_is_gone_is_an_error_and_no_empty_log() -> None:
    with pytest.raises(PermanentError):
        await read(MemoryStore())


async def test_segments_come_back_in_order_over_stripes() -> None:
    store = MemoryStore()
    writer = await (await Writer(store, stripes=3).begin()).write(20, order=(2, 0, 0, 1, 2))
    found, tail = await read(store, stored_number=20, stored_digest=writer.digest)
    assert [item.number for item in found] == list(range(1, 21))
    assert (tail.number, tail.sequence, tail.digest, tail.damaged) == (20, 40, writer.digest, False)
    assert tail.reason == "segment 21 is not there"
    log = reader(store)
    for item in found:
        run = await log.read_run(item)
        segment.check_run(item.table, run)
        assert await log.read_chunk(item, 0) == run


@settings(max_examples=40, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(0, 6), st.sets(st.integers(0, 5)), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    )
)
async def test_any_writers_dying_anywhere_leave_the_log_of_what_was_whole(
    lives: list[tuple[int, set[int], int]],
) -> None:
    """Each writer takes over at the tail it reads, writes some, and dies with some of its last writes not landed."""
    store = MemoryStore()
    await store.ensure_container()
    expected: list[bytes] = []
    for life, (count, lost, stripes) in enumerate(lives):
        log = reader(store)
        digests = [item.table.digest async for item in log.segments()]
        assert digests == expected
        writer = await Writer(store, run=life + 1, stripes=stripes, after=log.tail).begin()
        whole = True
        for index in range(count):
            data = writer.seal()
            whole = whole and index not in lost
            if index in lost:
                writer.place(data, index % stripes)
            else:
                await writer.put(data, index % stripes)
            if whole:
                expected.append(writer.digest)
    assert [item.table.digest for item in (await read(store))[0]] == expected


async def test_a_reader_goes_on_from_where_it_was() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(3)
    _, tail = await read(store)
    await writer.write(2)
    found, end = await read(store, after=tail)
    assert [item.number for item in found] == [4, 5]
    following = await (await Writer(store, run=2, after=end).begin()).write(2)
    found, end = await read(store, after=tail)
    assert [item.number for item in found] == [4, 5, 6, 7]
    assert end.digest == following.digest


async def test_a_run_that_was_made_and_never_written_changes_nothing() -> None:
    store = MemoryStore()
    await (await Writer(store).begin()).write(3)
    await Writer(store, run=2).begin(headers=False)
    assert await _numbers(store) == [1, 2, 3]


async def test_what_a_fenced_writer_wrote_too_late_is_not_read() -> None:
    store = MemoryStore()
    late = await (await Writer(store).begin()).write(3)
    new = await (await Writer(store, epoch=2, after=late.tail).begin()).write(2)
    await late.write(4)  # storage refuses that; were it not to, nobody would read it
    found, tail = await read(store)
    assert [item.blob for item in found] == [late.name()] * 3 + [new.name()] * 2
    assert tail.digest == new.digest


async def test_a_run_that_begins_earlier_replaces_all_that_is_newer() -> None:
    store = MemoryStore()
    one = await (await Writer(store).begin()).write(2)
    early = one.tail
    await one.write(4)
    await (await Writer(store, run=2, after=one.tail).begin()).write(3)
    three = await (await Writer(store, run=3, after=early).begin()).write(2)
    found, tail = await read(store)
    assert [(item.number, item.blob) for item in found[2:]] == [(3, three.name()), (4, three.name())]
    assert (tail.number, tail.digest) == (4, three.digest)


async def test_a_half_written_stripe_does_not_hide_what_lies_in_the_others() -> None:
    """Segment 3 is stored and acknowledged while 4, in the stripe that is looked at first, is half there."""
    store = MemoryStore()
    writer = await (await Writer(store, stripes=2).begin()).write(2, order=(0, 1))
    third = writer.seal()
    fourth = writer.seal()
    name, offset = writer.place(fourth, 0)
    await store.put_pages(name, offset, b"\xff" * 512)
    await writer.put(third, 1)
    found, tail = await read(store, stored_number=3)
    assert [item.number for item in found] == [1, 2, 3]
    assert tail.damaged
    assert "no segment begins here" in tail.reason


async def test_a_last_segment_whose_table_did_not_land_is_the_end() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    data = writer.seal()
    name, offset = writer.place(data)
    header = segment.read_header(data)
    assert header is not None
    await store.put_pages(name, offset, data[:512].ljust(len(data), b"\0"))
    assert len(data) > 512
    found, tail = await read(store)
    assert ([item.number for item in found], tail.damaged) == ([1, 2], True)
    with pytest.raises(CorruptionError, match="segment 3 was reported as stored"):
        await read(store, stored_number=3)


# -- what was altered ------------------------------------------------------------------------------------------------


async def test_a_log_that_was_cut_off_is_found_by_whoever_knows_how_far_it_went() -> None:
    store = MemoryStore()
    writer = await Writer(store).begin()
    places = [await writer.put(writer.seal()) for _ in range(5)]
    name, offset = places[3]
    await store.clear_pages(name, offset, BLOB_BYTES - offset)
    found, tail = await read(store)
    assert ([item.number for item in found], tail.number) == ([1, 2, 3], 3)
    with pytest.raises(CorruptionError, match="ends before segment 4") as caught:
        await read(store, stored_number=5)
    assert caught.value.fields["last_sequence"] == 6


async def test_every_byte_of_a_segments_header_and_table_counts() -> None:
    store = MemoryStore()
    writer = await Writer(store).begin()
    places = [await writer.put(writer.seal()) for _ in range(3)]
    name, offset = places[1]
    header = segment.read_header(await store.read(name, offset, 192))
    assert header is not None
    end = header.table_offset + header.table_bytes
    for place in itertools.chain(range(0, 192, 5), range(header.table_offset, end, 3)):
        await flip(store, name, offset + place)
        with pytest.raises(CorruptionError):
            await read(store, stored_number=3)
        await flip(store, name, offset + place)
    assert len((await read(store, stored_number=3))[0]) == 3


async def test_an_altered_chunk_is_found_when_it_is_read() -> None:
    store = MemoryStore()
    writer = await Writer(store).begin()
    name, offset = await writer.put(writer.seal())
    await flip(store, name, offset + 200)
    found, _ = await read(store)
    with pytest.raises(CorruptionError, match="chunk 0 of segment 1"):
        await reader(store).read_run(found[0])
    with pytest.raises(CorruptionError, match="chunk 0 of segment 1"):
        await reader(store).read_chunk(found[0], 0)


async def test_two_segments_that_were_exchanged_are_found() -> None:
    store = MemoryStore()
    writer = await Writer(store).begin()
    places = [await writer.put(writer.seal()) for _ in range(4)]
    sizes = [end - start for (_, start), (_, end) in itertools.pairwise(places)]
    assert sizes[1] == sizes[2]
    second = await store.read(*places[1], sizes[1])
    await store.put_pages(*places[1], await store.read(*places[2], sizes[2]))
    await store.put_pages(*places[2], second)
    with pytest.raises(CorruptionError, match="ends before segment 2"):
        await read(store, stored_number=4)


async def test_a_segment_of_another_run_or_machine_is_found_at_once() -> None:
    for changed in ({"run": 7}, {"machine": uuid.UUID(int=3)}):
        store = MemoryStore()
        writer = await (await Writer(store).begin()).write(1)
        await writer.put(writer.seal(**changed))
        with pytest.raises(CorruptionError, match=r"segment 2 in .* is run"):
            await read(store)


async def test_a_segment_that_was_replayed_breaks_the_chain() -> None:
    """The same place, sealed twice with different neighbours: the older one put back is not followed by the newer."""
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(1)
    other = Writer(store, after=writer.tail)
    other.digest = b"o" * 32
    await writer.put(other.seal())
    with pytest.raises(CorruptionError, match="chain of digests"):
        await read(store)


async def test_an_older_state_that_was_put_back_is_found_by_its_digest() -> None:
    store = MemoryStore()
    one = await (await Writer(store).begin()).write(2)
    early = one.tail
    await one.write(1)
    two = await (await Writer(store, run=2, after=early).begin()).write(1)
    assert (await read(store, stored_number=3, stored_digest=two.digest))[1].number == 3
    await store.delete(two.name())
    assert (await read(store, stored_number=3))[1].number == 3
    with pytest.raises(CorruptionError, match="not the one that was reported"):
        await read(store, stored_number=3, stored_digest=two.digest)


async def test_a_log_without_its_beginning_is_damaged_and_not_empty() -> None:
    store = MemoryStore()
    one = await (await Writer(store).begin()).write(2)
    await (await Writer(store, run=2, after=one.tail).begin()).write(2)
    await store.delete(one.name())
    with pytest.raises(CorruptionError, match="begins at segment 3"):
        await read(store)


async def test_a_run_without_its_end_is_damaged_when_a_newer_one_follows() -> None:
    store = MemoryStore()
    one = await Writer(store).begin()
    places = [await one.put(one.seal()) for _ in range(3)]
    await (await Writer(store, run=2, after=one.tail).begin()).write(2)
    name, offset = places[2]
    await store.clear_pages(name, offset, 512)
    with pytest.raises(CorruptionError, match="a newer run says that segment 3 was there"):
        await read(store)


async def test_a_wrong_key_is_an_error_and_no_empty_log() -> None:
    store = MemoryStore()
    await (await Writer(store).begin()).write(2)
    with pytest.raises(CorruptionError, match="another key"):
        [item async for item in reader(store, b"w" * 32).segments()]
    with pytest.raises(PermanentError, match="under key 1"):
        [item async for item in LogReader(store, MACHINE, {2: KEY}).segments()]


async def test_a_hole_with_more_behind_it_than_can_be_under_way_is_damage() -> None:
    store = MemoryStore()
    writer = await Writer(store, stripes=2).begin()
    places = [await writer.put(writer.seal(), index % 2) for index in range(logblob.MAX_UNDER_WAY + 6)]
    name, offset = places[4]
    await flip(store, name, offset + 20)
    with pytest.raises(CorruptionError, match="segment 5 is missing or damaged, but 70 is there") as caught:
        await read(store)
    assert caught.value.fields["number"] == 5


async def test_a_hole_with_little_behind_it_is_where_a_writer_died() -> None:
    store = MemoryStore()
    writer = await (await Writer(store, stripes=2).begin()).write(4, order=(0, 1))
    writer.place(writer.seal(), 0)
    await writer.put(writer.seal(), 1)
    assert await _numbers(store) == [1, 2, 3, 4]


async def test_a_blob_under_another_name_is_found() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(1)
    data = await store.read(writer.name(), 0, 4096)
    other = Writer(store, run=9)
    await store.create(other.name(), 4096)
    await store.put_pages(other.name(), 0, data)
    with pytest.raises(CorruptionError, match="holds the header of"):
        await read(store)


async def test_a_stripe_0_that_is_gone_is_found() -> None:
    store = MemoryStore()
    writer = await (await Writer(store, stripes=2).begin()).write(4, order=(0, 1))
    await store.delete(writer.name(0))
    with pytest.raises(CorruptionError, match="holds the header of"):
        await read(store)


async def test_blobs_that_are_no_part_of_the_log_are_left_alone() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    await store.create(logblob.log_prefix(MACHINE) + "notes.txt", 512)
    await store.create(writer.name().replace("-00.rlog", "-00.rlog.old"), 512)
    assert await _numbers(store) == [1, 2]


async def test_a_segment_that_claims_to_reach_beyond_its_blob_is_damage() -> None:
    store = MemoryStore()
    await store.ensure_container()
    writer = Writer(store)
    data = writer.seal()
    header = logblob.BlobHeader(logblob.BlobName(MACHINE, 1, 1, 0), *writer.first, 1, bytes(40), 5)
    await store.create(writer.name(), 1024)
    await store.put_pages(writer.name(), 0, header.pack() + data[:512])
    assert len(data) > 512
    with pytest.raises(CorruptionError, match="beyond the blob's end"):
        await read(store)


# -- sequences ---------------------------------------------------------------------------------------------------------


async def test_a_stream_may_jump_where_it_begins_anew_and_nowhere_else() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    await writer.put(writer.seal(jump=1 << 48, anew=True))
    found, tail = await read(store)
    assert tail.sequence == (1 << 48) + 6
    assert frame.begins_anew(found[2].table.descriptors)
    await writer.put(writer.seal(jump=1))
    with pytest.raises(CorruptionError, match="begins with sequence"):
        await read(store)


async def test_a_stream_that_goes_back_is_damage() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    await writer.put(writer.seal(jump=-2, anew=True))
    with pytest.raises(CorruptionError, match="segment 3 begins with sequence 3 where 5 should follow"):
        await read(store)


async def test_a_machines_first_stream_may_begin_anywhere() -> None:
    store = MemoryStore()
    writer = await Writer(store).begin()
    await writer.put(writer.seal(jump=1 << 48))
    assert (await read(store))[1].sequence == (1 << 48) + 2


# -- the document ------------------------------------------------------------------------------------------------------


async def test_the_reader_and_the_independent_decoder_agree() -> None:
    store = MemoryStore()
    await store.ensure_container()
    blobs, digest = sample.log()
    for name, data in blobs.items():
        await store.create(name, len(data))
        await store.put_pages(name, 0, data)
    log = LogReader(store, sample.MACHINE, {sample.KEY_ID: sample.DATA_KEY})
    frames = [bytes(await log.read_run(item)) async for item in log.segments(stored_number=4, stored_digest=digest)]
    assert b"".join(frames) == b"".join(sample.stream().frames)
    found = independent_decoder.decode(blobs, sample.MACHINE, {sample.KEY_ID: sample.DATA_KEY})
    assert found.sequence == log.tail.sequence
