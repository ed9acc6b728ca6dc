"""The maps of a disk that grew: what they knew they know, and nothing is known of what was added."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mobility_agent.allocation.skipped import SkippedPages
from mobility_agent.digests import CHUNK_BYTES, Digests
from mobility_agent.regions import DirtyRegions
from mobility_agent.touched import REGION_BYTES, TouchedRegions

MIB = 1 << 20


def test_only_what_was_added_is_dirty(tmp_path: Path) -> None:
    regions = DirtyRegions(tmp_path / "r", 8 * MIB - 512)
    regions.clear(0, 8 * MIB - 512)
    regions.mark(2 * MIB, 512)
    regions.close()
    for _ in range(2):
        regions = DirtyRegions(tmp_path / "r", 11 * MIB)
        assert regions.dirty().tolist() == [2, 7, 8, 9, 10]  # 7 ends where the disk did, and goes on
        regions.close()


def test_what_was_added_is_dirty_although_the_power_went_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header may reach the disk before the marks do, and nothing else says that they are missing."""
    path = tmp_path / "r"
    regions = DirtyRegions(path, 8 * MIB)
    regions.clear(0, 8 * MIB)
    regions.close()
    durable, cut, sync = [path.read_bytes()], list[bytes](), os.fdatasync

    def note(fd: int) -> None:
        now = path.read_bytes()
        cut.append(now[:4096] + durable[-1][4096:].ljust(len(now) - 4096, b"\0"))  # all that was not synced before it
        sync(fd)
        durable.append(now)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", note)
        DirtyRegions(path, 16 * MIB).close()
    for number, left in enumerate(cut):
        (tmp_path / f"cut-{number}").write_bytes(left)
        regions = DirtyRegions(tmp_path / f"cut-{number}", 16 * MIB)
        assert set(range(8, 16)) <= set(regions.dirty().tolist()), number
        regions.close()


def test_a_smaller_disk_is_another_one(tmp_path: Path) -> None:
    regions = DirtyRegions(tmp_path / "r", 8 * MIB)
    regions.clear(0, 8 * MIB)
    regions.close()
    regions = DirtyRegions(tmp_path / "r", 4 * MIB)
    assert regions.count == 4
    regions.close()


async def test_what_was_touched_stays_so(tmp_path: Path) -> None:
    touched = TouchedRegions(tmp_path / "t", 2 * REGION_BYTES)
    await touched.record(0, 512)
    touched.close()
    touched = TouchedRegions(tmp_path / "t", 5 * REGION_BYTES)
    assert touched.known
    assert touched.ranges() == [(0, REGION_BYTES)]
    touched.close()


def test_digests_are_known_but_for_a_last_chunk_that_was_short(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "d", 3 * CHUNK_BYTES - 512)
    digests.put(0, np.full((3, 2), 7, np.uint64))
    digests.close()
    digests = Digests(tmp_path / "d", 8 * CHUNK_BYTES)
    assert digests.known == 2
    digests.close()


def test_free_space_that_was_left_out_still_is(tmp_path: Path) -> None:
    regions = DirtyRegions(tmp_path / "r", 8 * MIB)
    skipped = SkippedPages(tmp_path / "s", regions)
    skipped.put(np.array([[2 * MIB, 4 * MIB]]))
    skipped.close()
    regions.close()
    regions = DirtyRegions(tmp_path / "r", 16 * MIB)
    skipped = SkippedPages(tmp_path / "s", regions)
    assert not skipped.is_new
    assert skipped.byte_count == 2 * MIB
    skipped.close()
    regions.close()


def test_what_a_record_reads_is_durable_once_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a sync that failed the page cache has what no disk has, and calls it clean: it has to be written again."""
    TouchedRegions(tmp_path / "t", REGION_BYTES).close()
    stored: list[bytes] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        fsync(fd)
        stored.append(os.pread(fd, 1 << 16, 0))

    monkeypatch.setattr(os, "fsync", note)
    TouchedRegions(tmp_path / "t", REGION_BYTES).close()
    assert stored == [(tmp_path / "t").read_bytes()]
