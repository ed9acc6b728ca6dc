"""The cache file: its space is really there, what is synced is really kept, and what is damaged costs only itself."""

from __future__ import annotations

import mmap
import os
import resource
import struct
import uuid
from pathlib import Path

import pytest
import xxhash

from process_server.cache import (
    MIN_SLOTS,
    PAGE_BYTES,
    PAYLOAD_BYTES,
    SLOT_BYTES,
    CacheFile,
    PageWrite,
    SlotHeader,
    read_header,
)
from process_server.recovery import find, take_up
from replicar.errors import CorruptionError, PermanentError
from replicar.formats.frame import Buffer
from tests.process_server.sender import opening_frame, write_frame

MACHINE = uuid.UUID(int=3)


def aligned(data: Buffer) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, PAYLOAD_BYTES))
    buffer[: len(data)] = data
    return buffer


def put(cache: CacheFile, index: int, serial: int, first: int, frames: list[bytes]) -> None:
    data = b"".join(frames)
    end = -(-len(data) // PAGE_BYTES) * PAGE_BYTES
    cache.write([PageWrite(index, SlotHeader(MACHINE, serial, first), aligned(data), 0, end)])


def frames(first: int, count: int) -> list[bytes]:
    return [write_frame(MACHINE, first + number, [os.urandom(3000 // 512 * 512)]) for number in range(count)]


def taken(cache: CacheFile, stored: int = 0) -> list[tuple[int, list[int]]]:
    """Slot index and sequences, of what is taken up behind `stored`."""
    slots = find(cache).by_machine.get(MACHINE, [])
    found = take_up(cache, slots, MACHINE, stored)
    return [(each.index, [header.first_sequence for header in each.headers]) for each in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_its_space_is_allocated_and_it_goes_past_the_page_cache(path: Path) -> None:
    cache = CacheFile.open(path, 5 * SLOT_BYTES + 1)
    assert (cache.slots, cache.direct) == (5, True)
    status = path.stat()
    assert status.st_size == 5 * SLOT_BYTES
    assert status.st_blocks * 512 >= 5 * SLOT_BYTES
    assert status.st_mode & 0o777 == 0o600
    cache.close()


def test_a_filesystem_in_memory_does_too() -> None:
    memory = Path("/dev/shm")  # noqa: S108 - it is this filesystem that is meant
    path = memory / f"replicar-test-{uuid.uuid4().hex}"
    try:
        cache = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
        put(cache, 1, 1, 1, frames(1, 3))
        assert taken(cache) == [(1, [1, 2, 3])]
        cache.close()
    finally:
        path.unlink(missing_ok=True)


def test_a_size_that_the_disk_has_not_got_is_refused_with_both_figures(path: Path) -> None:
    with pytest.raises(PermanentError) as caught:
        CacheFile.open(path, 1 << 50)
    fields = caught.value.fields
    assert fields["path"] == str(path)
    assert fields["wanted_bytes"] > fields["free_bytes"] > 0
    assert "cache_bytes" in caught.value.hint


def test_too_small_a_size_is_refused(path: Path) -> None:
    with pytest.raises(PermanentError, match="too small"):
        CacheFile.open(path, SLOT_BYTES)


def test_two_servers_cannot_share_it(path: Path) -> None:
    cache = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
    with pytest.raises(PermanentError, match="another process server"):
        CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
    cache.close()


def test_a_disk_that_refuses_is_an_error_and_never_durable(path: Path) -> None:
    cache = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT_BYTES, before[1]))
        with pytest.raises(PermanentError, match="can't write the cache"):
            put(cache, 2, 1, 1, frames(1, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert taken(cache) == []
    cache.close()


def test_frames_are_taken_up_in_order_over_slots_and_behind_what_is_stored(path: Path) -> None:
    cache = CacheFile.open(path, 6 * SLOT_BYTES)
    put(cache, 4, 10, 1, frames(1, 3))
    put(cache, 0, 11, 4, frames(4, 3))
    put(cache, 2, 12, 7, frames(7, 2))
    assert taken(cache) == [(4, [1, 2, 3]), (0, [4, 5, 6]), (2, [7, 8])]
    assert taken(cache, 3) == [(0, [4, 5, 6]), (2, [7, 8])]
    assert taken(cache, 5) == [(0, [6]), (2, [7, 8])]
    assert taken(cache, 8) == []
    assert taken(cache, 20) == []
    cache.close()


def test_what_storage_lacks_before_the_cache_makes_the_cache_useless(path: Path) -> None:
    cache = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
    put(cache, 0, 1, 5, frames(5, 3))
    assert taken(cache, 2) == []
    cache.close()


def test_a_damaged_byte_ends_the_run_there(path: Path) -> None:
    cache = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
    data = frames(1, 5)
    put(cache, 0, 1, 1, data)
    put(cache, 1, 2, 6, frames(6, 2))
    place = PAGE_BYTES + len(data[0]) + len(data[1]) + 200
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 4]))
    assert taken(cache) == [(0, [1, 2])]
    cache.close()


def test_what_an_earlier_use_of_a_slot_left_is_not_taken_for_more(path: Path) -> None:
    cache = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES)
    put(cache, 0, 1, 1, frames(1, 8))
    put(cache, 0, 2, 20, frames(20, 2))
    assert taken(cache, 19) == [(0, [20, 21])]
    cache.close()


def test_a_new_incarnation_is_taken_up_behind_the_old_one(path: Path) -> None:
    cache, later = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES), (1 << 48) + 1
    put(cache, 0, 1, 1, [*frames(1, 2), opening_frame(MACHINE, later), *frames(later + 2, 1)])
    assert taken(cache) == [(0, [1, 2, later, later + 2])]
    assert taken(cache, 2) == [(0, [later, later + 2])]
    cache.close()


def test_numbers_left_out_are_followed_behind_a_sound_frame_and_not_behind_what_may_be_lost(path: Path) -> None:
    cache, later = CacheFile.open(path, MIN_SLOTS * SLOT_BYTES), (1 << 32) + 1
    data = frames(1, 4)
    put(cache, 0, 1, 1, [*data, opening_frame(MACHINE, later), *frames(later + 2, 1)])
    assert taken(cache) == [(0, [1, 2, 3, 4, later, later + 2])]
    # The same in two slots, and the end of the first is damaged: 4 must not be passed over as if it were stored.
    put(cache, 0, 1, 1, data)
    put(cache, 1, 2, later, [opening_frame(MACHINE, later), *frames(later + 2, 1)])
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES + 3 * len(data[0]) + 200)
        file.write(b"damage")
    assert taken(cache) == [(0, [1, 2, 3])]
    assert taken(cache, 3) == []
    cache.close()


def test_a_damaged_header_page_is_no_slot_and_a_later_version_is_refused() -> None:
    page = bytearray(SlotHeader(MACHINE, 1, 1).pack())
    assert read_header(bytes(page)) == SlotHeader(MACHINE, 1, 1)
    assert read_header(bytes(PAGE_BYTES)) is None
    page[20] ^= 1
    assert read_header(bytes(page)) is None
    later = bytearray(SlotHeader(MACHINE, 1, 1).pack())
    struct.pack_into("<I", later, 8, 2)
    struct.pack_into("<Q", later, 48, xxhash.xxh3_64_intdigest(bytes(later[:48])))
    with pytest.raises(CorruptionError, match="version 2"):
        read_header(bytes(later))


def test_a_smaller_cache_than_before_is_honoured(path: Path) -> None:
    CacheFile.open(path, 8 * SLOT_BYTES).close()
    cache = CacheFile.open(path, 5 * SLOT_BYTES)
    assert cache.slots == 5
    assert path.stat().st_size == 5 * SLOT_BYTES
    cache.close()
