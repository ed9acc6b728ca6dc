"""Frames: what goes in comes out, what was altered is found, what can't be is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, strategies as st

from replicar.errors import CorruptionError, LimitError
from replicar.formats import descriptor, frame
from replicar.formats.frame import Flag, Kind
from tests.formats.strategies import MACHINE, SECTOR, Change, build, changes, runs
from tests.golden.make_golden import example_frame, flipped


@given(
    items=st.lists(changes(), min_size=1, max_size=6),
    first=st.integers(1, frame.MAX_SEQUENCE - 5),
    gap=st.binary(max_size=9),
)
def test_what_was_sealed_is_read_back(items: list[Change], first: int, gap: bytes) -> None:
    data = build(items, first, gap=gap)
    found = frame.read_frame(b"before!!" + data + b"behind", 8)
    assert found is not None
    header = found.header
    assert (header.machine_id, header.first_sequence, header.count) == (MACHINE, first, len(items))
    assert (header.next_sequence, header.frame_bytes) == (first + len(items), len(data))
    for row, item in zip(found.table, items, strict=True):
        said = (int(row["kind"]), int(row["disk"]), int(row["offset"]), int(row["length"]), int(row["flags"]))
        assert said == (item.kind, item.disk, item.offset, item.length, item.flags)
        place = int(row["place"])
        assert bytes(found.payload[place : place + len(item.data)]) == item.data


@given(frames=runs())
def test_a_run_of_frames_is_read_back_in_order(frames: list[bytes]) -> None:
    raw = b"".join(frames)
    found = list(frame.frames_in(raw))
    assert [bytes(item.data) for _, item in found] == frames
    with pytest.raises(CorruptionError):
        list(frame.frames_in(raw[:-8]))


def test_any_flipped_bit_of_a_frame_is_found() -> None:
    good = example_frame()
    for place in range(len(good)):
        for bit in range(8):
            with pytest.raises(CorruptionError):
                frame.read_frame(flipped(good, place, bit))


def test_a_frame_that_is_not_all_there_yet_is_none_and_no_error() -> None:
    good = example_frame()
    assert all(frame.read_frame(good[:length]) is None for length in range(len(good)))
    assert frame.read_frame(good, len(good)) is None


def test_a_frame_sealed_in_place_says_nothing_before_its_first_bytes_are_there() -> None:
    region = memoryview(bytearray(example_frame()))
    region[:8] = bytes(8)
    with pytest.raises(CorruptionError, match="no frame begins here"):
        frame.read_frame(region)


WRITE = Change(Kind.WRITE, 0, 0, SECTOR, bytes(SECTOR), 0)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"kind": 0}, "unknown kind"),
        ({"kind": 8}, "unknown kind"),
        ({"length": 0}, "impossible length"),
        ({"length": (1 << 64) - SECTOR}, "impossible length"),
        ({"offset": (1 << 64) - SECTOR, "length": SECTOR}, "beyond any disk's end"),
        ({"offset": frame.MAX_DISK_BYTES, "length": SECTOR}, "beyond any disk's end"),
        ({"offset": 1}, "multiple of 512"),
        ({"length": 513}, "multiple of 512"),
        ({"length": 1024}, "outside its payload"),
        ({"place": 1}, "outside its payload"),
        ({"place": (1 << 32) - 1}, "outside its payload"),
        ({"kind": Kind.MARK, "length": 4097}, "longer than 4096"),
        ({"kind": Kind.AUDIT, "place": 500}, "outside its payload"),
        ({"time_ns": 1 << 63}, "beyond the year 2262"),
    ],
)
def test_a_descriptor_that_cannot_be_is_refused(changed: dict[str, int], why: str) -> None:
    fields = {"kind": int(Kind.WRITE), "disk": 0, "offset": 0, "length": SECTOR, "time_ns": 5, "place": 0, "flags": 0}
    fields |= changed
    table = struct.pack(
        "<QQQIHBB", *(fields[name] for name in ("offset", "length", "time_ns", "place", "disk", "kind", "flags"))
    )
    data = frame.build_frame(MACHINE, 1, table, bytes(SECTOR))
    with pytest.raises(CorruptionError, match=why):
        frame.read_frame(data)


def test_time_that_falls_within_a_frame_is_refused() -> None:
    table = frame.describe(Kind.ZERO, length=512, time_ns=5) + frame.describe(Kind.ZERO, length=512, time_ns=4)
    with pytest.raises(CorruptionError, match="time that falls"):
        frame.read_frame(frame.build_frame(MACHINE, 1, table))


def _with_header(**changed: int) -> bytes:
    """The example frame with other header fields and a header checksum that fits."""
    fields = ["magic", "version", "codec", "flags", "payload", "count", "machine", "first", "payload_sum", "table_sum"]
    layout = struct.Struct("<4sBBHII16sQQQ")
    good = example_frame()
    values = dict(zip(fields, layout.unpack_from(good), strict=True)) | changed
    head = layout.pack(*values.values())
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + good[64:]


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2},
        {"codec": 1},
        {"flags": 1},
        {"payload": frame.MAX_PAYLOAD_BYTES + 1},
        {"payload": (1 << 32) - 1},
        {"count": 0},
        {"count": frame.MAX_DESCRIPTORS + 1},
        {"count": (1 << 32) - 1},
        {"first": 0},
        {"first": (1 << 64) - 1},
        {"first": (1 << 64) - 2},
    ],
)
def test_a_header_that_claims_what_cannot_be_is_refused_before_its_frame_arrives(changed: dict[str, int]) -> None:
    with pytest.raises(CorruptionError):
        frame.read_header(_with_header(**changed)[:64])


def test_the_last_sequences_there_are_can_be_used_and_not_passed() -> None:
    item = frame.describe(Kind.ZERO, length=512)
    last = frame.read_frame(frame.build_frame(MACHINE, frame.MAX_SEQUENCE, item))
    assert last is not None
    assert last.header.next_sequence == (1 << 64) - 1
    with pytest.raises(LimitError):
        frame.build_frame(MACHINE, frame.MAX_SEQUENCE, item * 2)
    with pytest.raises(LimitError):
        frame.build_frame(MACHINE, 0, item)


def test_a_frame_is_not_sealed_where_it_does_not_fit() -> None:
    item = frame.describe(Kind.ZERO, length=512)
    for region, payload_bytes, table in (
        (bytes(95), 0, item),
        (bytes(4096), frame.MAX_PAYLOAD_BYTES + 1, item),
        (bytes(4096), 0, b""),
        (bytes(4096), 0, item[:-1]),
        (bytes(1 << 20), 0, item * (frame.MAX_DESCRIPTORS + 1)),
    ):
        with pytest.raises(LimitError):
            frame.seal_in_place(memoryview(bytearray(region)), payload_bytes, table, MACHINE, 1)


def test_the_largest_frame_there_is_can_be_read() -> None:
    table = frame.describe(Kind.ZERO, length=512) * frame.MAX_DESCRIPTORS
    data = frame.build_frame(MACHINE, 1, table, bytes(frame.MAX_PAYLOAD_BYTES))
    assert len(data) == frame.MAX_FRAME_BYTES
    assert frame.read_frame(data) is not None


@given(items=st.lists(changes(), min_size=1, max_size=6))
@example(items=[Change(Kind.AUDIT, 0, 0, 1 << 40, bytes(16), 0)])
def test_payload_ends_are_where_the_bytes_end(items: list[Change]) -> None:
    found = frame.read_frame(build(items, 1))
    assert found is not None
    ends = frame.payload_ends(found.table)
    wanted = [int(row["place"]) + len(item.data) for row, item in zip(found.table, items, strict=True)]
    assert ends.dtype == np.uint64
    assert ends.tolist() == wanted


def test_a_stream_may_jump_only_to_disks_and_a_gap() -> None:
    def table(*kinds: tuple[Kind, Flag]) -> frame.Table:
        return frame.table_view(b"".join(frame.describe(kind, length=512, flags=flags) for kind, flags in kinds))

    disk, gap, plain = (Kind.DISK, Flag(0)), (Kind.GAP, Flag.GAP_BEGIN), (Kind.WRITE, Flag(0))
    assert frame.begins_anew(table(gap))
    assert frame.begins_anew(table(disk, disk, gap, plain))
    assert not frame.begins_anew(table(disk))
    assert not frame.begins_anew(table(plain, gap))
    assert not frame.begins_anew(table(disk, plain, gap))
    assert not frame.begins_anew(table((Kind.GAP, Flag.GAP_END), gap))


_EDGES = (0, 1, 16, 511, 512, 4095, 4096, 4097, 65536, (1 << 62) - 512, 1 << 62, (1 << 63) - 1, (1 << 64) - 512)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(_EDGES),
            st.sampled_from(_EDGES),
            st.sampled_from((0, 1, 5, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)),
            st.sampled_from((0, 16, 4096, 65520, 65536, (1 << 32) - 1)),
            st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 8, 255)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_the_quick_check_of_a_table_and_the_one_that_names_the_rule_agree(rows: list[tuple[int, ...]]) -> None:
    packed = b"".join(frame.PACK_DESCRIPTOR.pack(*row[:4], 0, row[4], 0) for row in rows)
    table = frame.table_view(packed)
    try:
        descriptor._name_broken_rule(table, 65536, 1)
    except CorruptionError:
        assert not descriptor._is_sane(table, 65536)
        assert not descriptor._are_sane_writes(packed, 65536)
    except AssertionError:  # it found nothing broken
        assert descriptor._is_sane(table, 65536)
        assert descriptor._are_sane_writes(packed, 65536) == all(row[4] == Kind.WRITE for row in rows)


def test_a_table_is_checked_alike_however_long_it_is() -> None:
    item = frame.describe(Kind.WRITE, length=512, time_ns=7)
    for count in (1, descriptor._SHORT_TABLE, descriptor._SHORT_TABLE + 1, 2 * descriptor._SHORT_TABLE):
        good = item * count
        frame.check_table(good, 512)
        for wrong in (
            frame.describe(Kind.WRITE, length=513, time_ns=7),
            frame.describe(Kind.WRITE, length=512, time_ns=7, place=1),
            frame.describe(Kind.WRITE, length=512, time_ns=1 << 63),
            frame.describe(Kind.WRITE, length=512, time_ns=7)[:-2] + b"\x09\0",
        ):
            with pytest.raises(CorruptionError):
                frame.check_table(good[:-32] + wrong, 512)
