"""Writing a log: taking it over, placing segments, rolling; and of two writers, one."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from random import Random

import pytest

from process_server.logwriter import LogLimits, LogWriter, Writer
from replicar.clock import SystemClock
from replicar.errors import ConflictError, FencedError, PermanentError, TransientError
from replicar.formats import logblob, segment
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.segment import Position
from replicar.log.reader import LogReader, Tail
from replicar.storage.memory import MemoryStore
from replicar.storage.store import BlobInfo, Pages, is_missing
from tests.process_server.sender import write_frame
from tests.process_server.stores import LateStore

MACHINE, KEY = uuid.UUID(int=5), bytes(range(32))
LIMITS = LogLimits(stripes=3, blob_bytes=16 << 20)


class Pen:
    """Writes small segments with a log writer, as a pipeline would, one at a time."""

    def __init__(self, log: LogWriter, epoch: int) -> None:
        self.log, self.epoch, self.tail = log, epoch, log.tail

    async def write(self, count: int = 1) -> None:
        for _ in range(count):
            if not self.log.reserve():
                await self.log.roll(self.tail)
                assert self.log.reserve()
            first = self.tail.sequence + 1
            raw = write_frame(MACHINE, first, [os.urandom(512)])
            position = Position(MACHINE, self.epoch, self.log.run, self.tail.number + 1, first, first)
            data, digest = segment.seal(raw, position, KEY, os.urandom(32), self.tail.digest)
            await self.log.write(await self.log.place(len(data)), memoryview(data))
            self.tail = Tail(position.number, first, digest, "")


async def a_store() -> MemoryStore:
    store = MemoryStore()
    await store.ensure_container()
    return store


async def opened(store: MemoryStore, *, epoch: int = 1, limits: LogLimits = LIMITS) -> Pen:
    writer = Writer(MACHINE, epoch, 1, KEY, bytes(40))
    log = await LogWriter.open(store, writer, limits, SystemClock(), keys={1: KEY})
    return Pen(log, epoch)


async def numbers(store: MemoryStore) -> list[int]:
    return [found.number async for found in LogReader(store, MACHINE, {1: KEY}).segments()]


async def test_a_log_goes_on_where_the_last_writer_ended() -> None:
    store = await a_store()
    for expected in (0, 3, 6):
        pen = await opened(store)
        assert pen.tail.number == expected
        await pen.write(3)
        await pen.log.close()
    assert await numbers(store) == list(range(1, 10))


async def test_the_older_of_two_writers_is_fenced_and_its_bytes_are_not_in_the_log() -> None:
    store = await a_store()
    older = await opened(store)
    await older.write(2)
    newer = await opened(store, epoch=2)
    with pytest.raises(FencedError):
        await older.write()
    await newer.write(2)
    with pytest.raises(FencedError):
        await older.write()
    found = [each.table.header.position async for each in LogReader(store, MACHINE, {1: KEY}).segments()]
    assert [(each.number, each.epoch) for each in found] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    with pytest.raises(FencedError) as caught:
        await opened(store, epoch=1)
    assert "epoch 2" in caught.value.message


async def test_the_same_epoch_started_twice_leaves_one_writer() -> None:
    store = await a_store()
    older = await opened(store)
    await older.write()
    newer = await opened(store)
    await newer.write()
    with pytest.raises(FencedError):
        await older.write()
    assert await numbers(store) == [1, 2]


async def test_a_fenced_writer_can_neither_add_a_stripe_nor_roll() -> None:
    store = await a_store()
    older = await opened(store, limits=LogLimits(stripes=1, blob_bytes=16 << 20))
    await older.write(1)
    await opened(store, epoch=2)
    assert older.log.reserve()
    older.log._reserved -= 1
    with pytest.raises(FencedError, match="epoch 2"):
        await older.log.roll(older.tail)


class DawdlingStore(MemoryStore):
    """Lets others go first, now and then, before and after every step, by a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = Random(seed)

    async def _dawdle(self) -> None:
        for _ in range(self._random.choice((0, 0, 1, 2, 7))):
            await asyncio.sleep(0)

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        await self._dawdle()
        await super().create(name, size_bytes, metadata=metadata)
        await self._dawdle()

    async def list(self, prefix: str) -> list[BlobInfo]:
        await self._dawdle()
        blobs = await super().list(prefix)
        await self._dawdle()
        return blobs

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        await self._dawdle()
        lease = await super().acquire_lease(name, proposed_id=proposed_id)
        await self._dawdle()
        return lease

    async def break_lease(self, name: str) -> None:
        await self._dawdle()
        await super().break_lease(name)
        await self._dawdle()

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        await self._dawdle()
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)
        await self._dawdle()

    def budget_wait_seconds(self, name: str, length: int) -> float:
        return float(self._random.random() < 0.3)  # so that stripes are added in the middle of all this


@pytest.mark.parametrize("seed", range(60))
async def test_of_writers_that_fight_for_a_log_none_loses_what_it_was_told_is_stored(seed: int) -> None:
    store, random = DawdlingStore(seed), Random(seed)
    await store.ensure_container()
    acknowledged: dict[int, bytes] = {}

    async def serve(epoch: int) -> None:
        for _ in range(random.randrange(40)):
            await asyncio.sleep(0)
        try:
            pen = await opened(store, epoch=epoch, limits=LogLimits(stripes=4, blob_bytes=16 << 20))
            for _ in range(random.randrange(20)):
                await pen.write()
                assert acknowledged.setdefault(pen.tail.number, pen.tail.digest) == pen.tail.digest
                if random.random() < 0.1:
                    await pen.log.roll(pen.tail)
        except FencedError:
            pass
        except TransientError:
            pass  # another one made the same blob, and had not taken it yet: a machine tries again later
        except PermanentError as error:
            if not is_missing(error):  # another one cleaned its blob up in between: a machine tries again later
                raise

    await asyncio.gather(*(serve(random.choice((1, 1, 2, 3))) for _ in range(5)))
    found = {each.number: each.table.digest async for each in LogReader(store, MACHINE, {1: KEY}).segments()}
    assert acknowledged.items() <= found.items(), f"seed {seed}"


async def test_a_full_run_rolls_into_the_next_and_the_log_stays_whole() -> None:
    store = await a_store()
    pen = await opened(store, limits=LogLimits(stripes=1, blob_bytes=12 << 20))
    # Room is counted in segments of the largest size, so a blob of 12 MiB takes few when writes are counted on ahead.
    for _ in range(3):
        await pen.write(5)
        await pen.log.roll(pen.tail)
    await pen.write(1)
    assert await numbers(store) == list(range(1, 17))
    names = [logblob.read_name(info.name) for info in await store.list("")]
    assert [(name.run, name.stripe) for name in names if name is not None] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert [info.leased for info in await store.list("")] == [False, False, False, True]


async def test_a_run_takes_no_more_reservations_than_it_has_room_for() -> None:
    store = await a_store()
    pen = await opened(store, limits=LogLimits(stripes=2, blob_bytes=16 << 20))
    room = 0
    while pen.log.reserve():
        room += 1
    assert room == 2 * 3  # (16 MiB less a header) / 4 MiB, rounded down, for each stripe
    places = [await pen.log.place(segment.MAX_SEGMENT_BYTES) for _ in range(room)]
    assert max(place.offset for place in places) + segment.MAX_SEGMENT_BYTES <= 16 << 20
    assert len({(place.blob, place.offset) for place in places}) == room


class BusyStore(MemoryStore):
    """Says of blobs that were written how long they would have to wait, as the pacing of Azure's limits does."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: dict[str, int] = {}

    def budget_wait_seconds(self, name: str, length: int) -> float:
        return float(self.writes.get(name, 0) // 4)

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        await super().put_pages(name, offset, data, lease_id=lease_id, if_sequence_number_lt=if_sequence_number_lt)
        self.writes[name] = self.writes.get(name, 0) + 1


async def test_segments_go_to_a_stripe_that_need_not_wait() -> None:
    store = BusyStore()
    await store.ensure_container()
    pen = await opened(store)
    await pen.write(30)
    assert await numbers(store) == list(range(1, 31))
    assert len(store.writes) == LIMITS.stripes
    assert max(store.writes.values()) - min(store.writes.values()) <= 4


async def test_a_log_that_is_not_accepted_is_left_as_it_was() -> None:
    store = await a_store()
    pen = await opened(store)
    await pen.write(2)
    before = [info.name for info in await store.list("")]

    def refuse(tail: Tail) -> None:
        raise ConflictError(f"ends at {tail.number}")

    writer = Writer(MACHINE, 1, 1, KEY, bytes(40))
    with pytest.raises(ConflictError, match="ends at 2"):
        await LogWriter.open(store, writer, LIMITS, SystemClock(), keys={1: KEY}, accept=refuse)
    assert [info.name for info in await store.list("")] == before


async def test_without_a_container_it_says_so() -> None:
    with pytest.raises(PermanentError, match="container"):
        await opened(MemoryStore())


async def test_a_damaged_tail_is_written_over_by_the_next_run() -> None:
    store = await a_store()
    pen = await opened(store)
    await pen.write(3)
    [info] = await store.list("")
    header = segment.read_header(await store.read(info.name, logblob.HEADER_BYTES, 512))
    assert header is not None
    last = logblob.HEADER_BYTES + 2 * header.total_bytes
    await store.break_lease(info.name)
    await store.put_pages(info.name, last, os.urandom(512))
    again = await opened(store)
    assert again.tail.number == 2
    await again.write(2)
    assert await numbers(store) == [1, 2, 3, 4]


async def late_store() -> LateStore:
    store = LateStore()
    await store.ensure_container()
    return store


async def test_a_dead_writers_late_creation_of_the_very_blob_is_passed_over_by_the_next_try() -> None:
    store = await late_store()
    pen = await opened(store)
    await pen.write(3)
    store.late = [BlobName(MACHINE, 1, 2, 0)]  # it was rolling when it died
    with pytest.raises(TransientError, match="made at the same time"):
        await opened(store)
    successor = await opened(store)
    assert (successor.log.run, successor.tail.number) == (3, 3)
    await successor.write(3)
    assert await numbers(store) == [1, 2, 3, 4, 5, 6]


async def test_a_late_creation_above_a_writers_run_does_not_stop_it() -> None:
    store = await late_store()
    pen = await opened(store)
    await pen.write(2)
    store.late = [BlobName(MACHINE, 1, 5, 0)]
    await pen.log.roll(pen.tail)
    await pen.write(2)
    assert pen.log.run == 2
    await store.create(str(BlobName(MACHINE, 1, 3, 0)), 1 << 20)
    with pytest.raises(TransientError):
        await pen.log.roll(pen.tail)
    again = await opened(store)
    assert again.log.run == 6
    await again.write(2)
    assert await numbers(store) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("sign_of_life", ["its lease", "its header", "its epoch"])
async def test_a_newer_run_with_a_sign_of_life_shuts_the_older_writer_out(sign_of_life: str) -> None:
    store = await a_store()
    pen = await opened(store)
    await pen.write(1)
    name = BlobName(MACHINE, 2 if sign_of_life == "its epoch" else 1, 2, 0)
    await store.create(str(name), 1 << 20)
    if sign_of_life == "its lease":
        await store.acquire_lease(str(name))
    elif sign_of_life == "its header":
        header = BlobHeader(name, 2, 2, pen.tail.digest, 1, bytes(40), 1)
        await store.put_pages(str(name), 0, header.pack())
    with pytest.raises(FencedError) as caught:
        await pen.log.roll(pen.tail)
    assert "code" not in caught.value.fields, "not a lease that was broken by hand: somebody newer is there"
