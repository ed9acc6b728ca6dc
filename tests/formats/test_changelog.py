"""The change log: a torn tail costs the tail and no more, a killed process costs nothing at all."""

from __future__ import annotations

import mmap
import random
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from replicar.errors import CorruptionError
from replicar.formats import changelog, frame
from replicar.formats.changelog import FRAMES_OFFSET, STAGING_OFFSET, STAGING_TABLE, ChangeLogHeader, Scan
from replicar.formats.frame import Kind
from tests.formats.strategies import MACHINE, SECTOR, runs
from tests.golden.make_golden import flipped

FILE_BYTES = changelog.MIN_FILE_BYTES
FIRST = 1000


def _file(first: int, frames: list[bytes], under: bytes = b"") -> bytearray:
    """A change log of these frames, over what an earlier use left (`under`, from the first frame's place on)."""
    data = bytearray(FILE_BYTES)
    data[FRAMES_OFFSET : FRAMES_OFFSET + len(under)] = under
    data[: changelog.HEADER_BYTES] = ChangeLogHeader(MACHINE, first, FILE_BYTES, 5).pack()
    raw = b"".join(frames)
    data[FRAMES_OFFSET : FRAMES_OFFSET + len(raw)] = raw
    return data


def _write(sequence: int, fill: bytes = b"w") -> bytes:
    table = frame.describe(Kind.WRITE, length=SECTOR, time_ns=sequence, place=28)
    return frame.build_frame(MACHINE, sequence, table, bytes(28) + fill * SECTOR)


def _zero(sequence: int, count: int = 1) -> bytes:
    table = frame.describe(Kind.ZERO, length=SECTOR, time_ns=sequence) * count
    return frame.build_frame(MACHINE, sequence, table)


def _scan(data: bytearray, *, trust: bool = False) -> Scan:
    return changelog.scan(memoryview(data), trust_staging=trust)


def _found(data: bytearray, *, trust: bool = False) -> list[bytes]:
    entries = _scan(data, trust=trust).frames
    return [bytes(data[entry.offset : entry.offset + entry.frame_bytes]) for entry in entries]


@settings(max_examples=40)
@given(frames=runs(6), shift=st.integers(0, 100), fill=st.binary(min_size=1, max_size=50))
def test_frames_come_back_over_whatever_an_earlier_use_left(frames: list[bytes], shift: int, fill: bytes) -> None:
    header, end = frame.read_header(frames[0]), frame.read_header(frames[-1])
    assert header is not None
    assert end is not None
    first = header.first_sequence
    older = _zero(first - 1) if first > 1 else b""  # all an earlier use can have written has a lower sequence
    data = _file(first, frames, under=fill * shift + older * 40)
    found = _scan(data, trust=bool(shift % 2))
    assert _found(data) == frames
    assert (found.next_sequence, found.torn, found.recovered) == (end.next_sequence, None, 0)
    assert found.end_offset == FRAMES_OFFSET + sum(map(len, frames))


def test_an_empty_change_log_is_empty() -> None:
    found = _scan(_file(FIRST, []), trust=True)
    assert (found.frames, found.end_offset, found.next_sequence, found.torn) == ((), FRAMES_OFFSET, FIRST, None)


@pytest.mark.parametrize("damage", ["zeros", "garbage", "an earlier use"])
def test_a_tail_torn_at_any_byte_costs_the_tail_and_no_more(damage: str) -> None:
    kept = [_write(FIRST), _zero(FIRST + 1, 3)]
    last = _write(FIRST + 4)
    whole = _file(FIRST, [*kept, last])
    start = FRAMES_OFFSET + sum(map(len, kept))
    noise = random.Random(7)
    for place in range(len(last)):
        data = bytearray(whole)
        size = len(last) - place
        older = (_write(3) * 2)[place : place + size]
        fill = {"zeros": bytes(size), "garbage": noise.randbytes(size), "an earlier use": older}[damage]
        data[start + place : start + len(last)] = fill
        if data == whole:
            continue
        found = _scan(data, trust=place % 2 == 0)
        assert _found(data) == kept, f"torn at byte {place}"
        assert (found.end_offset, found.next_sequence, found.recovered) == (start, FIRST + 4, 0)
        if place >= frame.HEADER_BYTES:
            assert found.torn is not None, f"torn at byte {place}, and nobody says so"


def test_any_flipped_bit_of_the_last_frame_costs_that_frame_and_no_more() -> None:
    kept, last = [_write(FIRST)], _zero(FIRST + 1)
    whole = bytes(_file(FIRST, [*kept, last]))
    start = FRAMES_OFFSET + len(kept[0])
    for place in range(start, start + len(last)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        assert _found(data) == kept


def test_damage_in_the_middle_is_not_taken_for_the_end() -> None:
    frames = [_write(FIRST), _zero(FIRST + 1), _write(FIRST + 2)]
    whole = _file(FIRST, frames)
    middle = FRAMES_OFFSET + len(frames[0])
    for place in range(middle, middle + len(frames[1])):
        data = bytearray(whole)
        data[place] ^= 0xFF
        found = _scan(data)
        assert len(found.frames) == 1
        assert found.torn is not None, f"byte {place - middle} of the middle frame"


def test_a_tail_that_was_taken_note_of_is_a_clean_end_from_then_on() -> None:
    data = _file(FIRST, [_write(FIRST), _zero(FIRST + 1), _write(FIRST + 2)])
    data[FRAMES_OFFSET + len(_write(FIRST))] ^= 1
    torn = _scan(data)
    assert torn.torn is not None
    changelog.forget_tail(memoryview(data), torn.end_offset)
    again = _scan(data, trust=True)
    assert (again.end_offset, again.frames, again.torn) == (torn.end_offset, torn.frames, None)
    assert len(data) == FILE_BYTES


def test_another_machines_frame_is_no_part_of_the_log() -> None:
    foreign = bytearray(_zero(FIRST + 1))
    header = frame.read_header(foreign)
    assert header is not None
    table = bytes(foreign[header.table_offset :])
    data = _file(FIRST, [_zero(FIRST), frame.build_frame(uuid.UUID(int=9), FIRST + 1, table)])
    assert _scan(data).next_sequence == FIRST + 1


def test_a_frame_that_would_reach_beyond_the_files_end_is_torn_and_no_error() -> None:
    data = _file(FIRST, [])
    room = FILE_BYTES - FRAMES_OFFSET
    big = frame.build_frame(MACHINE, FIRST, frame.describe(Kind.ZERO, length=512, time_ns=1), bytes(1 << 20))
    data[FRAMES_OFFSET : FRAMES_OFFSET + len(big) * 3] = b"".join(
        frame.build_frame(MACHINE, FIRST + i, frame.describe(Kind.ZERO, length=512, time_ns=1), bytes(1 << 20))
        for i in range(3)
    )
    left = room - 3 * len(big)
    last = frame.build_frame(MACHINE, FIRST + 3, frame.describe(Kind.ZERO, length=512, time_ns=1), bytes(1 << 20))
    data[FILE_BYTES - left :] = last[:left]
    found = _scan(data)
    assert len(found.frames) == 3
    assert found.torn == "the file ends within a frame"


# -- staging --------------------------------------------------------------------------------------------------------


def _stage(data: bytearray, offset: int, first: int, table: bytes, payload: bytes) -> None:
    view = memoryview(data)
    changelog.stage_frame(view, offset, first)
    data[offset + 64 : offset + 64 + len(payload)] = payload
    data[STAGING_OFFSET + STAGING_TABLE : STAGING_OFFSET + STAGING_TABLE + len(table)] = table
    data[changelog.STAGED_COUNT] = changelog.PACK_STAGED_COUNT.pack(len(table) // 32)


OPEN_TABLE = (
    frame.describe(Kind.WRITE, length=SECTOR, time_ns=5, place=28)
    + frame.describe(Kind.ZERO, offset=SECTOR, length=1 << 40, time_ns=6)
    + frame.describe(Kind.AUDIT, offset=0, length=1 << 30, time_ns=6, place=28 + SECTOR)
    + frame.describe(Kind.DIRTY, offset=0, length=1 << 50, time_ns=7)
)
OPEN_PAYLOAD = bytes(28) + b"x" * SECTOR + b"d" * 16


def test_every_staged_descriptor_comes_back_after_the_process_was_killed() -> None:
    sealed = _write(FIRST)
    for count in range(1, len(OPEN_TABLE) // 32 + 1):
        data = _file(FIRST, [sealed])
        _stage(data, FRAMES_OFFSET + len(sealed), FIRST + 1, OPEN_TABLE[: 32 * count], OPEN_PAYLOAD)
        distrusting = _scan(bytearray(data))
        assert (distrusting.recovered, distrusting.next_sequence, distrusting.torn) == (0, FIRST + 1, None)
        found = _scan(data, trust=True)
        assert (found.recovered, found.next_sequence) == (count, FIRST + 1 + count)
        rescued = frame.read_frame(data, found.frames[-1].offset)
        assert rescued is not None
        assert rescued.table.tobytes() == OPEN_TABLE[: 32 * count]
        assert bytes(rescued.payload[28 : 28 + SECTOR]) == b"x" * SECTOR
        again = _scan(data, trust=True)
        assert (again.recovered, again.frames, again.torn) == (0, found.frames, None)


def test_a_process_killed_anywhere_within_sealing_loses_nothing() -> None:
    sealed = _write(FIRST)
    offset = FRAMES_OFFSET + len(sealed)
    data = _file(FIRST, [sealed])
    _stage(data, offset, FIRST + 1, OPEN_TABLE, OPEN_PAYLOAD)
    before = bytes(data)
    after = bytearray(data)
    length = frame.seal_in_place(memoryview(after)[offset:], len(OPEN_PAYLOAD), OPEN_TABLE, MACHINE, FIRST + 1)
    order = [*range(offset + 64, offset + length), *range(offset + 8, offset + 64), *range(offset, offset + 8)]
    for done in range(0, len(order) + 1, 7):
        data = bytearray(before)
        for place in order[:done]:
            data[place] = after[place]
        found = _scan(data, trust=True)
        assert (found.next_sequence, found.torn) == (FIRST + 5, None), f"killed after {done} bytes"


def test_what_staging_says_of_another_place_or_sequence_is_not_believed() -> None:
    sealed = _write(FIRST)
    offset = FRAMES_OFFSET + len(sealed)
    for place, first in ((FRAMES_OFFSET, FIRST + 1), (offset, FIRST), (offset, FIRST + 2), (offset + 8, FIRST + 1)):
        data = _file(FIRST, [sealed])
        _stage(data, place, first, OPEN_TABLE, OPEN_PAYLOAD)
        assert _scan(data, trust=True).recovered == 0


def test_staged_nonsense_is_not_believed_and_no_error() -> None:
    noise = random.Random(3)
    data = _file(FIRST, [])
    for _ in range(300):
        table = bytearray(OPEN_TABLE)
        for _ in range(noise.randint(1, 4)):
            table[noise.randrange(len(table))] = noise.randrange(256)
        _stage(data, FRAMES_OFFSET, FIRST, bytes(table), OPEN_PAYLOAD)
        found = _scan(bytearray(data), trust=True)
        assert found.recovered in (0, 4)
    for count in (changelog.STAGING_CAPACITY + 1, 1 << 32, (1 << 64) - 1):
        data[changelog.STAGED_COUNT] = changelog.PACK_STAGED_COUNT.pack(count)
        assert _scan(data, trust=True).recovered == 0


def test_staging_that_describes_more_than_the_file_has_room_for_is_not_believed() -> None:
    sealed = [
        frame.build_frame(MACHINE, FIRST + i, frame.describe(Kind.ZERO, length=512), bytes(1 << 20)) for i in range(3)
    ]
    data = _file(FIRST, sealed)
    offset = FRAMES_OFFSET + sum(map(len, sealed))
    table = frame.describe(Kind.WRITE, length=1 << 20, time_ns=1)
    assert offset + (1 << 20) > FILE_BYTES
    _stage(data, offset, FIRST + 3, table, b"")
    found = _scan(data, trust=True)
    assert (found.recovered, len(found.frames)) == (0, 3)


def test_a_full_staging_area_comes_back() -> None:
    data = _file(FIRST, [])
    table = frame.describe(Kind.ZERO, length=512) * changelog.STAGING_CAPACITY
    _stage(data, FRAMES_OFFSET, FIRST, table, b"")
    assert _scan(data, trust=True).recovered == changelog.STAGING_CAPACITY == 2046
    assert STAGING_OFFSET + STAGING_TABLE + len(table) <= FRAMES_OFFSET


def test_the_count_of_staged_descriptors_is_never_seen_half_written(tmp_path: Path) -> None:
    """Another process sees every store a killed one could have left; with `struct`, counts of 0 are among them."""
    path = tmp_path / "count"
    path.write_bytes(bytes(changelog.FRAMES_OFFSET))
    writer = (
        "import mmap, sys, time\n"
        "from replicar.formats import changelog\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "data = memoryview(mmap.mmap(file.fileno(), 0))\n"
        "place, pack, end = changelog.STAGED_COUNT, changelog.PACK_STAGED_COUNT.pack, time.monotonic() + 60\n"
        "while time.monotonic() < end:\n"
        "    for number in range(256, 2046):\n"
        "        data[place] = pack(number)\n"
    )
    root = Path(__file__).resolve().parents[2]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        child = subprocess.Popen([sys.executable, "-c", writer, str(path)], cwd=root)
        try:
            with memoryview(mapping) as view, view[changelog.STAGED_COUNT].cast("Q") as count:
                while not count[0]:
                    assert child.poll() is None, "the writer died"
                seen = {count[0] for _ in range(1_000_000)}
        finally:
            child.kill()
            child.wait()
    assert min(seen) >= 256
    assert len(seen) > 1


# -- the header -----------------------------------------------------------------------------------------------------


@given(
    first=st.integers(1, frame.MAX_SEQUENCE + 1),
    size=st.integers(changelog.MIN_FILE_BYTES, changelog.MAX_FILE_BYTES),
    created=st.integers(0, (1 << 64) - 1),
)
def test_a_header_comes_back(first: int, size: int, created: int) -> None:
    header = ChangeLogHeader(MACHINE, first, size, created)
    assert changelog.read_header(header.pack()) == header


def test_any_flipped_bit_of_a_header_is_found() -> None:
    good = ChangeLogHeader(MACHINE, FIRST, FILE_BYTES, 5).pack()
    for place in range(64):
        for bit in range(8):
            with pytest.raises(CorruptionError):
                changelog.read_header(flipped(good, place, bit))


@pytest.mark.parametrize("header", [(0, FILE_BYTES), (1, FILE_BYTES - 1), (1, changelog.MAX_FILE_BYTES + 1)])
def test_a_header_that_claims_what_cannot_be_is_refused(header: tuple[int, int]) -> None:
    with pytest.raises(CorruptionError):
        changelog.read_header(ChangeLogHeader(MACHINE, *header, 5).pack())


def test_a_file_that_lost_its_end_is_refused() -> None:
    data = _file(FIRST, [_zero(FIRST)])
    for length in (0, 1, 63, 64, 4095, 4096, FRAMES_OFFSET, FILE_BYTES - 1):
        with pytest.raises(CorruptionError):
            _scan(data[:length])


def test_a_file_longer_than_it_says_is_read_as_far_as_it_says() -> None:
    data = _file(FIRST, [_zero(FIRST)]) + _zero(FIRST + 5)
    found = _scan(data)
    assert (found.next_sequence, found.torn) == (FIRST + 1, None)
    assert struct.unpack_from("<Q", data, 40)[0] == FILE_BYTES
