"""The row of dirty extents: bounded, in order, and never less than what was noted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings, strategies as st

from mobility_agent.extents import _ENTRY, DirtyExtents, merge


def _drain(extents: DirtyExtents) -> list[tuple[int, int, int]]:
    found = []
    while (first := extents.first()) is not None:
        found.append(first)
        extents.copied(extents.merges)
    return found


def test_extents_come_back_in_the_order_in_which_they_were_noted(tmp_path: Path) -> None:
    extents = DirtyExtents(tmp_path / "extents", capacity=8)
    noted = [(0, 4096, 512), (1, 0, 65536), (0, 0, 512)]
    assert all(extents.note(*extent) for extent in noted)
    assert extents.dirty_bytes == 512 + 65536 + 512
    assert extents.bytes_of(0) == 1024
    assert _drain(extents) == noted
    extents.close()


def test_a_killed_process_leaves_what_was_noted_and_not_copied(tmp_path: Path) -> None:
    extents = DirtyExtents(tmp_path / "extents", capacity=8)
    for place in range(4):
        extents.note(0, place * 512, 512)
    extents.copied(extents.merges)
    again = DirtyExtents(tmp_path / "extents", capacity=8)  # the first one is not closed, as a killed one is not
    assert not again.is_new
    assert _drain(again) == [(0, place * 512, 512) for place in range(1, 4)]
    again.close()
    extents.close()


def test_a_full_row_is_merged_and_takes_more(tmp_path: Path) -> None:
    extents = DirtyExtents(tmp_path / "extents", capacity=8)
    for place in range(40):
        assert extents.note(0, place % 4 * 512, 512)
    assert len(extents) <= 8
    extents.merge()
    assert _drain(extents) == [(0, 0, 2048)]
    extents.close()


def test_an_extent_that_was_merged_while_it_was_copied_is_copied_again(tmp_path: Path) -> None:
    extents = DirtyExtents(tmp_path / "extents", capacity=8)
    extents.note(0, 8192, 512)
    merges = extents.merges
    for place in (0, 1, 0, 1, 0, 1, 0, 2):  # the last one finds the row full
        extents.note(0, place * 512, 512)
    extents.copied(merges)  # of what was first then, behind what comes first now
    assert _drain(extents) == [(0, 0, 1024), (0, 8192, 512), (0, 1024, 512)]
    extents.close()


def test_a_row_that_merging_does_not_help_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    extents = DirtyExtents(tmp_path / "extents", capacity=8)
    for place in range(8):
        assert extents.note(0, place * 4096, 512)
    assert not extents.note(0, 1 << 20, 512)
    assert len(_drain(extents)) == 8
    extents.close()


def test_a_file_of_another_kind_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "extents").write_bytes(b"x" * 9000)
    extents = DirtyExtents(tmp_path / "extents", capacity=8)
    assert extents.is_new
    assert extents.first() is None
    extents.close()


_extent = st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 12))


@settings(max_examples=200, deadline=None)
@given(noted=st.lists(_extent, min_size=1, max_size=40))
def test_merged_extents_cover_the_same_sectors_once(noted: list[tuple[int, int, int]]) -> None:
    entries = np.array([(offset, length, disk, 0) for disk, offset, length in noted], _ENTRY)
    wanted = np.zeros((3, 80), bool)
    for disk, offset, length in noted:
        wanted[disk, offset : offset + length] = True
    covered = np.zeros((3, 80), int)
    for offset, length, disk, _ in merge(entries).tolist():
        covered[disk, offset : offset + length] += 1
    assert covered.max() == 1
    assert (covered.astype(bool) == wanted).all()
