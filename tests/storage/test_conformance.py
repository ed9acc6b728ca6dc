"""What every page-blob store promises, asked of each of them: the stand-in in memory, and the real client on a real
emulator over HTTPS, both bare and inside the decorators that a part uses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from replicar.clock import SystemClock
from replicar.errors import ConflictError, FencedError, LimitError, PermanentError
from replicar.storage import MemoryStore, PageBlobStore, StorageTarget, is_missing, open_store
from replicar.storage.azure import AzureBlobStore
from replicar.storage.limits import LimitedStore
from replicar.storage.retry import RetryingStore
from replicar.storage.store import Pages
from tests.storage.support import EmulatorPlace, bare_store

# aiohttp advises against large bodies as bytes, since writing one holds up the loop; it is what makes them cheap here.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")

MIB = 1 << 20
PAGE = 512


@pytest.fixture(params=["memory", "memory-decorated", "azure", "azure-decorated"])
async def store(request: pytest.FixtureRequest, container_name: str, tmp_path: Path) -> AsyncIterator[PageBlobStore]:
    made: PageBlobStore
    if request.param.startswith("memory"):
        made = MemoryStore(container_name)
        if request.param == "memory-decorated":
            made = RetryingStore(LimitedStore(made, clock=SystemClock()), clock=SystemClock(), random=Random(1))
    else:
        place: EmulatorPlace = request.getfixturevalue("azurite")
        if request.param == "azure":
            made = bare_store(place, container_name)
        else:
            key_file = tmp_path / "account.key"
            key_file.touch(mode=0o600)
            key_file.write_text(place.account_key + "\n")
            made = open_store(
                StorageTarget(
                    endpoint=place.blob_endpoint,
                    account_name=place.account_name,
                    account_key_file=key_file,
                    container=container_name,
                    authority_file=place.authority_file,
                )
            )
    async with made:
        await made.ensure_container()
        yield made


def pattern(length: int, seed: int = 7) -> bytes:
    return Random(seed).randbytes(length)


async def test_a_container_is_made_once_and_asking_again_is_harmless(store: PageBlobStore) -> None:
    await store.ensure_container()
    assert await store.container_exists()


async def test_a_new_blob_is_zeros_and_has_no_ranges(store: PageBlobStore) -> None:
    await store.create("a", 4 * MIB)
    assert await store.read("a", 3 * MIB, 1000) == bytes(1000)
    assert await store.page_ranges("a") == []
    info = await store.properties("a")
    assert (info.name, info.size_bytes, dict(info.metadata), info.leased) == ("a", 4 * MIB, {}, False)


async def test_a_blob_that_is_there_is_not_made_again_and_keeps_its_bytes(store: PageBlobStore) -> None:
    await store.create("a", MIB, metadata={"run": "1"})
    await store.put_pages("a", 0, pattern(PAGE))
    with pytest.raises(ConflictError):
        await store.create("a", MIB, metadata={"run": "1"})
    assert await store.read("a", 0, PAGE) == pattern(PAGE)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_pages_come_back_as_they_were_written(store: PageBlobStore, kind: Callable[[bytes], Pages]) -> None:
    data = pattern(4 * MIB)
    await store.create("a", 8 * MIB)
    await store.put_pages("a", MIB + PAGE, kind(data))
    assert await store.read("a", MIB + PAGE, len(data)) == data
    assert await store.read("a", MIB, 2 * PAGE) == bytes(PAGE) + data[:PAGE]


async def test_a_view_into_a_larger_buffer_writes_just_its_part(store: PageBlobStore) -> None:
    buffer = bytearray(pattern(MIB))
    await store.create("a", MIB)
    await store.put_pages("a", 0, memoryview(buffer)[4096 : 4096 + 1024])
    assert await store.read("a", 0, 1024) == buffer[4096:5120]


async def test_any_part_of_a_blob_can_be_read_aligned_or_not(store: PageBlobStore) -> None:
    data = pattern(MIB)
    await store.create("a", MIB)
    await store.put_pages("a", 0, data)
    for offset, length in [(0, 1), (511, 2), (65_535, 70_000), (MIB - 1, 1), (0, MIB), (5, 0)]:
        assert await store.read("a", offset, length) == data[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(MIB - 10, 11), (MIB, 1), (9 * MIB, 512)])
async def test_reading_past_the_end_is_an_error_not_a_short_answer(
    store: PageBlobStore, offset: int, length: int
) -> None:
    await store.create("a", MIB)
    with pytest.raises(PermanentError, match="past the end"):
        await store.read("a", offset, length)


async def test_page_ranges_are_what_was_written_less_what_was_cleared_and_joined(store: PageBlobStore) -> None:
    await store.create("a", 4 * MIB)
    for offset in (MIB, MIB + 4096, 0):
        await store.put_pages("a", offset, pattern(4096))
    assert await store.page_ranges("a") == [(0, 4096), (MIB, 8192)]
    await store.clear_pages("a", MIB + 512, 512)
    assert await store.page_ranges("a") == [(0, 4096), (MIB, 512), (MIB + 1024, 7168)]
    assert await store.read("a", MIB, 1536) == pattern(4096)[:512] + bytes(512) + pattern(4096)[1024:1536]
    await store.clear_pages("a", 0, 4 * MIB)
    assert await store.page_ranges("a") == []


async def test_a_listing_is_by_prefix_sorted_and_whole(store: PageBlobStore) -> None:
    for name in ["log/b", "log/a", "other/x", "log/c"]:
        await store.create(name, PAGE, metadata={"name": name})
    infos = await store.list("log/")
    assert [info.name for info in infos] == ["log/a", "log/b", "log/c"]
    assert [dict(info.metadata) for info in infos] == [{"name": info.name} for info in infos]
    assert [info.size_bytes for info in infos] == [PAGE] * 3
    assert await store.list("nothing") == []
    assert len(await store.list("")) == 4


async def test_names_with_spaces_and_letters_of_the_world_work(store: PageBlobStore) -> None:
    name = "machines/ö x/100%+a&b.rlog"
    await store.create(name, PAGE)
    await store.put_pages(name, 0, pattern(PAGE))
    assert await store.read(name, 0, PAGE) == pattern(PAGE)
    assert [info.name for info in await store.list("machines/ö ")] == [name]


async def test_metadata_is_replaced_as_a_whole(store: PageBlobStore) -> None:
    await store.create("a", PAGE, metadata={"epoch": "1", "gone": "soon"})
    await store.set_metadata("a", {"epoch": "2"})
    assert dict((await store.properties("a")).metadata) == {"epoch": "2"}


async def test_deleting_is_done_when_it_is_gone_however_often(store: PageBlobStore) -> None:
    await store.create("a", PAGE)
    await store.delete("a")
    await store.delete("a")
    assert await store.list("") == []


async def test_a_blob_made_anew_after_a_delete_knows_nothing_of_the_old_one(store: PageBlobStore) -> None:
    await store.create("a", PAGE, metadata={"old": "yes"})
    await store.put_pages("a", 0, pattern(PAGE))
    await store.delete("a")
    await store.create("a", 2 * PAGE)
    assert await store.read("a", 0, 2 * PAGE) == bytes(2 * PAGE)
    await store.put_pages("a", PAGE, pattern(PAGE))
    assert dict((await store.properties("a")).metadata) == {}


async def test_what_is_missing_is_a_permanent_error_that_names_it(store: PageBlobStore) -> None:
    requests: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: store.put_pages("no/such", 0, bytes(PAGE)),
        "clear": lambda: store.clear_pages("no/such", 0, PAGE),
        "read": lambda: store.read("no/such", 0, PAGE),
        "ranges": lambda: store.page_ranges("no/such"),
        "properties": lambda: store.properties("no/such"),
        "metadata": lambda: store.set_metadata("no/such", {"a": "b"}),
        "bump": lambda: store.bump_sequence_number("no/such"),
        "lease": lambda: store.acquire_lease("no/such"),
        "break": lambda: store.break_lease("no/such"),
        "release": lambda: store.release_lease("no/such", str(uuid.uuid4())),
    }
    for what, request in requests.items():
        with pytest.raises(PermanentError, match="no/such") as caught:
            await request()
        assert is_missing(caught.value), what
        assert caught.value.hint, what


async def test_only_the_holder_of_the_lease_may_write(store: PageBlobStore) -> None:
    await store.create("a", MIB)
    lease = await store.acquire_lease("a")
    other = str(uuid.uuid4())
    assert (await store.properties("a")).leased
    assert [info.leased for info in await store.list("a")] == [True]
    for wrong in (None, other):
        with pytest.raises(FencedError):
            await store.put_pages("a", 0, pattern(PAGE), lease_id=wrong)
        with pytest.raises(FencedError):
            await store.set_metadata("a", {"a": "b"}, lease_id=wrong)
        with pytest.raises(FencedError):
            await store.bump_sequence_number("a", lease_id=wrong)
        with pytest.raises(FencedError):
            await store.delete("a", lease_id=wrong)
        with pytest.raises(FencedError):
            await store.clear_pages("a", 0, PAGE, lease_id=wrong)
    assert await store.read("a", 0, PAGE) == bytes(PAGE)
    await store.put_pages("a", 0, pattern(PAGE), lease_id=lease)
    await store.set_metadata("a", {"a": "c"}, lease_id=lease)
    assert await store.read("a", 0, PAGE) == pattern(PAGE)
    await store.delete("a", lease_id=lease)


async def test_a_held_lease_is_refused_to_others_and_given_again_to_who_proposed_it(store: PageBlobStore) -> None:
    await store.create("a", PAGE)
    mine = str(uuid.uuid4())
    assert await store.acquire_lease("a", proposed_id=mine) == mine
    assert await store.acquire_lease("a", proposed_id=mine) == mine
    with pytest.raises(FencedError):
        await store.acquire_lease("a")


async def test_a_broken_lease_fences_its_holder_at_once_and_lets_the_next_one_in(store: PageBlobStore) -> None:
    await store.create("a", MIB)
    old = await store.acquire_lease("a")
    await store.break_lease("a")
    with pytest.raises(FencedError):
        await store.put_pages("a", 0, pattern(PAGE), lease_id=old)
    new = await store.acquire_lease("a")
    assert new != old
    with pytest.raises(FencedError):
        await store.put_pages("a", 0, pattern(PAGE), lease_id=old)
    await store.put_pages("a", 0, pattern(PAGE), lease_id=new)


async def test_breaking_a_lease_that_nobody_holds_is_fine(store: PageBlobStore) -> None:
    await store.create("a", PAGE)
    await store.break_lease("a")
    await store.acquire_lease("a")
    await store.break_lease("a")
    await store.break_lease("a")


async def test_a_released_lease_is_free_and_can_not_be_released_by_others(store: PageBlobStore) -> None:
    await store.create("a", PAGE)
    lease = await store.acquire_lease("a")
    with pytest.raises(FencedError):
        await store.release_lease("a", str(uuid.uuid4()))
    await store.release_lease("a", lease)
    assert not (await store.properties("a")).leased
    await store.put_pages("a", 0, pattern(PAGE))


async def test_a_raised_sequence_number_fences_who_writes_below_it(store: PageBlobStore) -> None:
    await store.create("a", MIB)
    await store.put_pages("a", 0, pattern(PAGE, 1), if_sequence_number_lt=1)
    assert await store.bump_sequence_number("a") == 1
    with pytest.raises(FencedError):
        await store.put_pages("a", 0, pattern(PAGE, 2), if_sequence_number_lt=1)
    await store.put_pages("a", PAGE, pattern(PAGE, 3), if_sequence_number_lt=2)
    assert await store.bump_sequence_number("a") == 2
    assert await store.read("a", 0, 2 * PAGE) == pattern(PAGE, 1) + pattern(PAGE, 3)


async def test_a_snapshot_is_what_the_blob_held_whatever_is_written_to_it_later(store: PageBlobStore) -> None:
    await store.create("a", MIB, metadata={"of": "the blob"})
    await store.put_pages("a", 0, pattern(2 * PAGE, 1))
    first = await store.snapshot("a", metadata={"sequence": "1"})
    await store.put_pages("a", PAGE, pattern(PAGE, 2))
    await asyncio.sleep(0.005)  # the emulator's ids are milliseconds
    second = await store.snapshot("a")
    await store.clear_pages("a", 0, MIB)
    assert await store.read_snapshot("a", first, 0, MIB) == pattern(2 * PAGE, 1) + bytes(MIB - 2 * PAGE)
    assert await store.read_snapshot("a", second, PAGE - 1, PAGE + 1) == pattern(2 * PAGE, 1)[
        PAGE - 1 : PAGE
    ] + pattern(PAGE, 2)
    assert await store.read("a", 0, 2 * PAGE) == bytes(2 * PAGE)
    await store.create("a-neighbour", PAGE)
    said = [(info.name, info.snapshot, info.size_bytes, dict(info.metadata)) for info in await store.snapshots("a")]
    assert said == [("a", first, MIB, {"sequence": "1"}), ("a", second, MIB, {"of": "the blob"})]
    assert [info.snapshot for info in await store.list("a")] == [None, None]


async def test_a_blob_that_has_snapshots_is_not_deleted_before_they_are(store: PageBlobStore) -> None:
    await store.create("a", PAGE)
    snapshot = await store.snapshot("a")
    with pytest.raises(PermanentError) as caught:
        await store.delete("a")
    assert caught.value.fields["code"] == "SnapshotsPresent"
    lease = await store.acquire_lease("a")
    await store.delete_snapshot("a", snapshot)
    await store.delete_snapshot("a", snapshot)
    assert await store.snapshots("") == []
    with pytest.raises(PermanentError) as caught:
        await store.read_snapshot("a", snapshot, 0, PAGE)
    assert is_missing(caught.value)
    await store.delete("a", lease_id=lease)
    await store.delete_snapshot("a", snapshot)


async def test_a_snapshot_is_refused_to_who_lost_the_blob_and_of_a_blob_that_changed(store: PageBlobStore) -> None:
    await store.create("a", MIB)
    with pytest.raises(PermanentError) as caught:
        await store.snapshot("no/such")
    assert is_missing(caught.value)
    lease = await store.acquire_lease("a")
    etag = (await store.properties("a")).etag
    with pytest.raises(FencedError):
        await store.snapshot("a", lease_id=str(uuid.uuid4()))
    await store.snapshot("a", lease_id=lease, if_etag=etag)
    changes: list[Callable[[], Awaitable[object]]] = [
        lambda: store.put_pages("a", 0, pattern(PAGE), lease_id=lease),
        lambda: store.clear_pages("a", 0, PAGE, lease_id=lease),
        lambda: store.set_metadata("a", {"epoch": "1"}, lease_id=lease),
    ]
    for change in changes:
        etag = (await store.properties("a")).etag
        await change()
        with pytest.raises(FencedError):
            await store.snapshot("a", lease_id=lease, if_etag=etag)
    await store.break_lease("a")
    with pytest.raises(FencedError):
        await store.snapshot("a", lease_id=lease)
    assert len(await store.snapshots("a")) == 1


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (256, 256), (0, 0)])
async def test_what_is_not_whole_pages_is_refused_and_nothing_changes(
    store: PageBlobStore, offset: int, length: int
) -> None:
    await store.create("a", MIB)
    # The bare client refuses what its library refuses, as a programmer's error; a part always has the decorators.
    with pytest.raises((LimitError, PermanentError, ValueError)):
        await store.put_pages("a", offset, pattern(length))
    assert await store.page_ranges("a") == []


async def test_a_writer_may_always_ask_about_its_budget(store: PageBlobStore) -> None:
    assert store.budget_wait_seconds("never seen", 4 * MIB) == 0.0


async def test_a_missing_container_is_told_apart_from_a_missing_blob(
    azurite: EmulatorPlace, container_name: str
) -> None:
    stores: list[PageBlobStore] = [MemoryStore("nowhere"), bare_store(azurite, container_name)]
    for store in stores:
        async with store:
            assert not await store.container_exists()
            for request in (store.read("a", 0, 1), store.list(""), store.create("a", PAGE), store.delete("a")):
                with pytest.raises(PermanentError) as caught:
                    await request
                assert caught.value.fields["reason"] == "container_missing"


async def test_a_listing_of_many_pages_is_whole(azurite: EmulatorPlace, container_name: str) -> None:
    async with bare_store(azurite, container_name, list_page_size=5) as store:
        await store.ensure_container()
        names = [f"{number:02}" for number in range(12)]
        for name in names:
            await store.create(name, PAGE)
        assert [info.name for info in await store.list("")] == names


async def test_the_service_version_of_azure_stack_hub_works(azurite: EmulatorPlace, container_name: str) -> None:
    async with bare_store(azurite, container_name, api_version="2019-07-07") as store:
        assert isinstance(store, AzureBlobStore)
        await store.ensure_container()
        await store.create("a", MIB)
        await store.put_pages("a", PAGE, pattern(PAGE))
        assert await store.page_ranges("a") == [(PAGE, PAGE)]
        assert await store.read("a", PAGE, PAGE) == pattern(PAGE)
        assert [info.name for info in await store.list("")] == ["a"]
        etag = (await store.properties("a")).etag
        snapshot = await store.snapshot("a", metadata={"sequence": "1"}, if_etag=etag)
        assert [(info.name, info.snapshot) for info in await store.snapshots("a")] == [("a", snapshot)]
        assert await store.read_snapshot("a", snapshot, PAGE, PAGE) == pattern(PAGE)
        await store.delete_snapshot("a", snapshot)
        assert await store.snapshots("a") == []
