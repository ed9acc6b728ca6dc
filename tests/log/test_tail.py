"""Where a log ends for a new writer: never behind a segment that is torn, and never before one that was stored."""

from __future__ import annotations

import pytest

from replicar.errors import CorruptionError, PermanentError, TransientError
from replicar.formats import logblob, segment
from replicar.formats.segment import HEADER_BYTES
from replicar.log.reader import LISTINGS, Tail
from replicar.log.tail import Stored, sound_tail
from replicar.storage.memory import MemoryStore
from replicar.storage.store import BlobInfo
from tests.log.support import Writer, flip, read, reader

PAGE = 512


async def put_torn(writer: Writer, data: bytes, *, lost: int = 1) -> None:
    """What a Put Page that is not atomic leaves when its writer dies: header and table, and not page `lost`."""
    header = segment.read_header(data)
    assert header is not None
    assert (lost + 1) * PAGE < header.table_offset, "the table must be whole, or any reader sees it"
    name, offset = writer.place(data)
    await writer.store.put_pages(name, offset, data[: lost * PAGE])
    await writer.store.put_pages(name, offset + (lost + 1) * PAGE, data[(lost + 1) * PAGE :])


def segment_of(writer: Writer) -> bytes:
    """The next segment, with a chunk of several pages, so that one can be missing."""
    return writer.seal(payload_bytes=8 * PAGE)


async def test_a_torn_segment_with_a_sound_table_is_where_the_log_ends() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(3)
    sound = writer.tail
    await put_torn(writer, segment_of(writer))
    found, walked = await read(store)
    assert (len(found), walked.number) == (4, 4), "a walk over tables can't see it"
    tail = await sound_tail(reader(store), Stored())
    assert (tail.number, tail.sequence, tail.digest, tail.damaged) == (3, sound.sequence, sound.digest, True)
    assert "torn" in tail.reason


async def test_a_torn_segment_hides_what_landed_behind_it() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    await put_torn(writer, segment_of(writer))
    await writer.write(4)
    assert (await sound_tail(reader(store), Stored())).number == 2
    assert (await sound_tail(reader(store), Stored(2))).number == 2


async def test_the_very_first_segment_may_be_torn() -> None:
    store = MemoryStore()
    writer = await Writer(store).begin()
    await put_torn(writer, segment_of(writer))
    tail = await sound_tail(reader(store), Stored())
    assert (tail.number, tail.digest) == (0, Tail().digest)


async def test_what_was_stored_and_is_damaged_is_an_error_and_no_end() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    await put_torn(writer, segment_of(writer))
    known = Stored(3, writer.tail.sequence, writer.digest)
    with pytest.raises(CorruptionError, match="segment 3 is damaged, but 3 was stored"):
        await sound_tail(reader(store), known)
    name, offset = await writer.put(segment_of(writer))
    await flip(store, name, offset + HEADER_BYTES + 900)
    with pytest.raises(CorruptionError, match="segment 3 is damaged"):
        await sound_tail(reader(store), known)


async def test_a_table_that_was_stored_and_is_damaged_is_an_error_too() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(2)
    data = segment_of(writer)
    name, offset = await writer.put(data)
    header = segment.read_header(data)
    assert header is not None
    await flip(store, name, offset + header.table_offset + 3)
    assert (await sound_tail(reader(store), Stored(2))).number == 2
    with pytest.raises(CorruptionError, match="segment 3 is damaged, but 3 was stored"):
        await sound_tail(reader(store), Stored(3))


async def test_another_segment_where_one_was_stored_is_an_error() -> None:
    store = MemoryStore()
    writer = await (await Writer(store).begin()).write(4)
    assert (await sound_tail(reader(store), Stored(4, 8, writer.digest))).number == 4
    with pytest.raises(CorruptionError, match="segment 4 is not the one that was reported as stored"):
        await sound_tail(reader(store), Stored(4, 8, bytes(32)))


async def test_an_end_before_what_was_stored_is_told_as_it_is() -> None:
    store = MemoryStore()
    await (await Writer(store).begin()).write(2)
    tail = await sound_tail(reader(store), Stored(5))
    assert (tail.number, tail.damaged) == (2, False)


class CountingStore(MemoryStore):
    """Counts the bytes that are read."""

    read_bytes = 0

    async def read(self, name: str, offset: int, length: int) -> bytes:
        self.read_bytes += length
        return await super().read(name, offset, length)


async def test_no_more_is_read_than_may_have_been_under_way() -> None:
    store = CountingStore()
    writer = await Writer(store).begin()
    data = segment_of(writer)
    await writer.put(data)
    for _ in range(logblob.MAX_UNDER_WAY + 40):
        await writer.put(segment_of(writer))

    async def cost(known: int) -> int:
        before = store.read_bytes
        assert (await sound_tail(reader(store), Stored(known))).number == writer.tail.number
        return store.read_bytes - before

    before = store.read_bytes
    await read(store)
    walk = store.read_bytes - before
    sealed = await cost(writer.tail.number) - walk
    assert 0 < sealed < len(data)
    # to a few bytes: sealed chunks differ by some
    assert await cost(writer.tail.number - 9) - walk == pytest.approx(10 * sealed, rel=0.01)
    assert await cost(0) - walk == pytest.approx(logblob.MAX_UNDER_WAY * sealed, rel=0.01)


async def test_only_the_newest_run_can_be_torn() -> None:
    """What an older run holds was verified before the newer began; damage there is damage, for `verify` to find."""
    store = MemoryStore()
    first = await (await Writer(store).begin()).write(3)
    name, offset = await first.put(segment_of(first))
    second = await Writer(store, run=2, after=first.tail).begin()
    await flip(store, name, offset + HEADER_BYTES + 900)
    assert (await sound_tail(reader(store), Stored())).number == 4
    await put_torn(second, segment_of(second))
    assert (await sound_tail(reader(store), Stored())).number == 4


class HauntedStore(MemoryStore):
    """Lists, so many times, a blob that is gone when it is read: a writer whose start was refused took it back."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    async def list(self, prefix: str) -> list[BlobInfo]:
        blobs = await super().list(prefix)
        if self.times and blobs:
            self.times -= 1
            ghost = blobs[-1].name.replace("-00000001-00.rlog", "-00000009-00.rlog")
            blobs.append(BlobInfo(ghost, 4 << 20, {}, False, 1))
        return blobs


async def test_a_blob_that_vanishes_between_listing_and_reading_is_no_error() -> None:
    store = HauntedStore(LISTINGS - 1)
    await (await Writer(store).begin()).write(3)
    found, tail = await read(store, stored_number=3)
    assert ([each.number for each in found], tail.number) == ([1, 2, 3], 3)
    store.times = LISTINGS - 1
    assert len(await reader(store).runs()) == 1


async def test_a_listing_that_never_settles_is_transient() -> None:
    store = HauntedStore(1000)
    await (await Writer(store).begin()).write(3)
    for attempt in (reader(store).runs(), read(store)):
        with pytest.raises(TransientError, match="come and go"):
            await attempt
    assert store.times == 1000 - 2 * LISTINGS


async def test_a_run_that_is_taken_back_in_the_middle_of_a_walk_is_walked_around() -> None:
    store = MemoryStore()
    one = await (await Writer(store).begin()).write(3)
    two = await Writer(store, run=2, after=one.tail).begin()
    log, numbers = reader(store), []
    async for found in log.segments():
        numbers.append(found.number)
        if found.number == 2:
            await store.delete(two.name())
    assert numbers == [1, 2, 3]


async def test_a_container_that_vanishes_is_still_what_it_is() -> None:
    with pytest.raises(PermanentError):
        await reader(MemoryStore()).runs()
