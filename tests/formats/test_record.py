"""Records: names of any kind survive, and what no reader could use is refused on both sides."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from replicar.errors import CorruptionError, LimitError
from replicar.formats import frame, record
from replicar.formats.record import Consistency, Disk, DiskAction, Gap, Mark
from tests.formats.strategies import TEXTS

MARKS = st.builds(Mark, TEXTS, st.sampled_from(Consistency), TEXTS)
DISKS = st.builds(Disk, st.integers(0, 65535), TEXTS, st.integers(0, frame.MAX_DISK_BYTES), st.sampled_from(DiskAction))


@given(mark=MARKS)
def test_a_mark_comes_back(mark: Mark) -> None:
    assert record.read_mark(record.pack_record(mark)) == mark


@given(reason=TEXTS)
def test_a_gap_comes_back(reason: str) -> None:
    assert record.read_gap(memoryview(record.pack_record(Gap(reason)))) == Gap(reason)


@given(disk=DISKS)
def test_a_disk_comes_back(disk: Disk) -> None:
    assert record.read_disk(bytearray(record.pack_record(disk))) == disk


def test_fields_of_a_newer_part_are_ignored() -> None:
    assert record.read_gap(b'{"reason":"x","since":[1,{"y":null}]}') == Gap("x")
    assert record.read_mark(b'{"name":"x","consistency":"crash"}') == Mark("x")


@pytest.mark.parametrize(
    "item",
    [
        Mark("x" * 4097),
        Gap("\u2713" * 1400),
        Mark("\ud800"),
        Disk(0, "\udcff", 512),
        Disk(65536, "x", 512),
        Disk(-1, "x", 512),
        Disk(0, "x", frame.MAX_DISK_BYTES + 1),
        Disk(0, "x", -512),
    ],
)
def test_a_record_that_no_reader_takes_is_not_written(item: Mark | Gap | Disk) -> None:
    with pytest.raises(LimitError):
        record.pack_record(item)


DISK = {"index": 1, "name": "sda", "size_bytes": 512, "action": "present"}


@pytest.mark.parametrize(
    "changed",
    [
        {"index": True},
        {"index": 1.0},
        {"index": "1"},
        {"index": -1},
        {"index": 65536},
        {"index": None},
        {"size_bytes": 10**30},
        {"size_bytes": float("nan")},
        {"size_bytes": float("inf")},
        {"size_bytes": False},
        {"name": 7},
        {"name": "\ud800"},
        {"name": None},
        {"action": "exploded"},
        {"action": ["present"]},
    ],
)
def test_a_disk_record_with_a_wrong_field_is_corrupt(changed: dict[str, object]) -> None:
    with pytest.raises(CorruptionError):
        record.read_disk(json.dumps(DISK | changed).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1" * 4096,
        b"[" * 4096,
        b'{"reason":' + b"[" * 3000,
        b'{"reason":' + b"9" * 4000 + b"}",
        b'{"reason":"\xff"}',
        b"\xff\xfe{\x00}\x00",
        "\ufeff{}".encode(),
        b'{"reason":"\\udc00"}',
        b'{"name":"x","consistency":"crash","mark_id":[[[]]]}',
    ],
)
def test_what_is_no_record_is_corrupt_and_nothing_else(data: bytes) -> None:
    for read in (record.read_mark, record.read_gap, record.read_disk):
        with pytest.raises(CorruptionError):
            read(data)
