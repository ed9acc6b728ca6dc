"""The oracle: what a recovered disk must hold, may hold and must not hold at an instant."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from simulator import content
from simulator.content import Stamp
from simulator.oracle import LATEST_NS, Change, FileImage, Oracle

DISK_BYTES = 64 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return path


@pytest.fixture
def oracle(disk: Path, tmp_path: Path) -> Oracle:
    return Oracle(disk, tmp_path / "oracle")


def _write(oracle: Oracle, number: int, offset: int, length: int, issued_ns: int) -> Change:
    return oracle.begin(offset, length, Stamp(1, number, issued_ns), issued_ns)


def _carried_out(disk: Path, *changes: Change) -> FileImage:
    data = bytearray(disk.read_bytes())
    for change in changes:
        data[change.offset : change.end] = change.content()
    path = disk.with_name("recovered.img")
    path.write_bytes(data)
    return FileImage(path)


def test_what_was_acknowledged_before_the_instant_must_be_there(oracle: Oracle, disk: Path) -> None:
    change = _write(oracle, 1, 4096, 4096, issued_ns=10)
    oracle.acknowledge(change, 20)
    assert oracle.compare(_carried_out(disk, change), "with", 20).equal
    missing = oracle.compare(_carried_out(disk), "without", 20)
    assert missing.differing_bytes == 4096
    assert "expected write 1 for offset 4096, found the disk's first content" in str(missing)


def test_what_was_issued_after_the_instant_must_not_be_there(oracle: Oracle, disk: Path) -> None:
    change = _write(oracle, 1, 0, 512, issued_ns=10)
    oracle.acknowledge(change, 20)
    assert oracle.compare(_carried_out(disk), "before", 9).equal
    early = oracle.compare(_carried_out(disk, change), "early", 9)
    assert early.differing_bytes == 512
    assert "found write 1" in str(early)


def test_what_was_in_flight_may_be_there_or_not_but_not_torn(oracle: Oracle, disk: Path) -> None:
    change = _write(oracle, 1, 8192, 2048, issued_ns=10)
    oracle.acknowledge(change, 20)
    assert oracle.compare(_carried_out(disk), "absent", 15).equal
    assert oracle.compare(_carried_out(disk, change), "present", 15).equal
    half = Change(8192, 1024, change.stamp, 10)
    torn = oracle.compare(_carried_out(disk, half), "torn", 15)
    assert not torn.equal
    assert "torn: 2 of 4 sectors" in str(torn)


def test_a_change_that_was_never_acknowledged_may_be_there_in_part_for_ever(oracle: Oracle, disk: Path) -> None:
    change = _write(oracle, 1, 0, 2048, issued_ns=10)
    oracle.lose(change)
    for found in ([], [change], [Change(0, 512, change.stamp, 10)]):
        assert oracle.compare(_carried_out(disk, *found), "lost", LATEST_NS).equal
    foreign = Change(0, 512, Stamp(9, 9, 9), 10)
    assert not oracle.compare(_carried_out(disk, foreign), "foreign", LATEST_NS).equal


def test_what_was_written_over_a_lost_change_decides_its_sectors(oracle: Oracle, disk: Path) -> None:
    lost = _write(oracle, 1, 0, 2048, issued_ns=10)
    oracle.lose(lost)
    later = _write(oracle, 2, 512, 512, issued_ns=30)
    oracle.acknowledge(later, 40)
    assert oracle.compare(_carried_out(disk, lost, later), "right", LATEST_NS).equal
    wrong = oracle.compare(_carried_out(disk, later, lost), "wrong", LATEST_NS)
    assert wrong.differing_bytes == 512
    assert "expected write 2 for offset 512, found write 1 for offset 512" in str(wrong)


def test_zeros_are_content_too(oracle: Oracle, disk: Path) -> None:
    change = oracle.begin(1024, 1024, None, 5)
    oracle.acknowledge(change, 6)
    assert oracle.compare(_carried_out(disk, change), "zeroed").equal
    assert "expected zeros" in str(oracle.compare(_carried_out(disk), "not"))


def test_changes_in_flight_on_one_place_are_the_applications_mistake(oracle: Oracle) -> None:
    _write(oracle, 1, 4096, 4096, issued_ns=1)
    with pytest.raises(ValueError, match="overlap a change in flight"):
        _write(oracle, 2, 7680, 4096, issued_ns=2)
    with pytest.raises(ValueError, match="no whole sectors of a disk"):
        _write(oracle, 3, DISK_BYTES - 512, 1024, issued_ns=3)
    with pytest.raises(ValueError, match="order of their issue"):
        _write(oracle, 4, 0, 512, issued_ns=0)


def test_a_swapped_byte_anywhere_is_found_and_many_differences_are_counted(oracle: Oracle, disk: Path) -> None:
    data = bytearray(disk.read_bytes())
    for offset in range(0, DISK_BYTES, 2048):
        data[offset + 17] ^= 1
    path = disk.with_name("altered.img")
    path.write_bytes(data)
    found = oracle.compare(FileImage(path), "altered")
    assert found.differing_bytes == DISK_BYTES // 4
    assert len(found.differences) == 10


def test_the_expected_image_is_kept_only_where_it_helps_to_look(oracle: Oracle, disk: Path, tmp_path: Path) -> None:
    assert oracle.compare(FileImage(disk), "same").equal
    assert not (tmp_path / "oracle" / "same.expected.img").exists()
    change = _write(oracle, 1, 0, 512, issued_ns=1)
    oracle.acknowledge(change, 2)
    assert not oracle.compare(FileImage(disk), "other").equal
    assert (tmp_path / "oracle" / "other.expected.img").read_bytes()[:512] == content.make(Stamp(1, 1, 1), 0, 512)


_PLACES = st.tuples(st.integers(0, 15), st.integers(1, 6), st.booleans())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(_PLACES, max_size=30), st.integers(0, 100))
def test_every_acknowledged_prefix_is_what_a_plain_replay_gives(
    disk: Path, tmp_path: Path, places: list[tuple[int, int, bool]], at: int
) -> None:
    oracle = Oracle(disk, tmp_path / "oracle")
    model = bytearray(disk.read_bytes())
    for index, (sector, count, zero) in enumerate(places):
        stamp = None if zero else Stamp(3, index, index)
        change = oracle.begin(sector * 512, count * 512, stamp, index * 10)
        oracle.acknowledge(change, index * 10 + 5)
        if index * 10 + 5 <= at * 3:
            model[change.offset : change.end] = change.content()
    # At an instant in flight the plain replay without the change is one of the two right answers.
    path = tmp_path / "model.img"
    path.write_bytes(model)
    assert oracle.compare(FileImage(path), "model", at * 3).equal
    assert oracle.expected("prefix", at * 3).read_bytes() == model
