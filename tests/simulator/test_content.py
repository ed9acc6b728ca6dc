"""Sectors that explain themselves: what was written where can be told from the bytes alone."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given, strategies as st

from simulator import content
from simulator.content import SECTOR_BYTES, Stamp

STAMP = Stamp(seed=7, number=12, time_ns=1_700_000_000_000_000_000)


@given(
    st.builds(Stamp, st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**63)),
    st.integers(0, 2**40),
    st.integers(1, 20),
)
def test_every_sector_says_which_write_made_it_and_where(stamp: Stamp, sector: int, count: int) -> None:
    data = content.make(stamp, sector * SECTOR_BYTES, count * SECTOR_BYTES)
    for index in range(count):
        found = content.read(data[index * SECTOR_BYTES :][:SECTOR_BYTES])
        assert found is not None
        assert (found.stamp, found.offset, found.sound) == (stamp, (sector + index) * SECTOR_BYTES, True)


@given(st.integers(8, SECTOR_BYTES - 1), st.integers(0, 7))
def test_any_flipped_bit_behind_the_magic_is_seen(place: int, bit: int) -> None:
    data = bytearray(content.make(STAMP, 4096, SECTOR_BYTES))
    data[place] ^= 1 << bit
    found = content.read(bytes(data))
    assert found is not None
    assert not found.sound


def test_a_sector_of_nobody_is_not_taken_for_one_of_ours() -> None:
    assert content.read(bytes(SECTOR_BYTES)) is None
    assert content.read(b"\xff" * SECTOR_BYTES) is None


def test_two_writes_at_one_place_differ_and_the_same_write_does_not() -> None:
    first = content.make(STAMP, 0, 8192)
    assert first == content.make(STAMP, 0, 8192)
    assert first != content.make(Stamp(STAMP.seed, STAMP.number + 1, STAMP.time_ns), 0, 8192)


def test_content_is_about_half_compressible() -> None:
    data = content.make(STAMP, 0, 1 << 20)
    assert 0.4 < len(zstandard.compress(data, 3)) / len(data) < 0.65


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 100), (100, 512), (0, 513)])
def test_what_is_no_whole_sectors_is_refused(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="no whole sectors"):
        content.make(STAMP, offset, length)
