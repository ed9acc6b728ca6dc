"""The map of what is left out, held against a plain set of pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mobility_agent import grown
from mobility_agent.allocation import skipped as module
from mobility_agent.allocation.skipped import PAGE_BYTES, SkippedPages
from mobility_agent.regions import DirtyRegions
from replicar.formats import frame
from replicar.formats.frame import Flag, Kind

MIB = 1 << 20
DISK_BYTES = 6 * MIB + 24576  # the last region is short
PAGES = 6 * 256


@contextmanager
def opened(directory: Path) -> Iterator[tuple[SkippedPages, DirtyRegions]]:
    regions = DirtyRegions(directory / "regions", DISK_BYTES)
    skipped = SkippedPages(directory / "free", regions)
    try:
        yield skipped, regions
    finally:
        skipped.close()
        regions.close()


def pages_of(skipped: SkippedPages) -> set[int]:
    return {page for page in range(-(-DISK_BYTES // PAGE_BYTES)) if skipped.has_all(page * PAGE_BYTES, PAGE_BYTES)}


def filled(skipped: SkippedPages, draw: random.Random) -> set[int]:
    """Leave regions out, and write to some of their pages; what is left out then."""
    edges = sorted(draw.sample(range(0, DISK_BYTES + 1, 4096), 2))
    skipped.put(np.array([edges]))
    expected = set(range(-(-edges[0] // MIB) * 256, min(edges[1], PAGES * PAGE_BYTES) // MIB * 256))
    assert pages_of(skipped) == expected
    for page in draw.sample(range(PAGES), 200):
        skipped.leave(page * PAGE_BYTES, PAGE_BYTES)
        expected.discard(page)
    return expected


def table(writes: list[tuple[int, int]], draw: random.Random) -> frame.Table:
    """A frame's descriptors: these writes of disk 0, among others that change nothing here."""
    others = [
        frame.describe(Kind.WRITE, disk=1, offset=0, length=DISK_BYTES, time_ns=0),
        frame.describe(Kind.ZERO, disk=0, offset=0, length=DISK_BYTES, time_ns=0, flags=Flag.SEED),
    ]
    rows = [
        frame.describe(draw.choice((Kind.WRITE, Kind.ZERO)), disk=0, offset=offset, length=length, time_ns=0)
        for offset, length in writes
    ]
    return np.frombuffer(b"".join([*others, *rows]), frame.DESCRIPTOR)


@pytest.mark.parametrize("seed", range(40))
def test_a_page_leaves_when_it_is_written_and_its_region_is_dirty_when_that_was_in_part(
    tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    with opened(tmp_path) as (skipped, regions):
        expected = filled(skipped, draw)
        for _ in range(5):
            regions.clear(0, DISK_BYTES)
            dirty: set[int] = set()
            writes = []
            for _ in range(draw.randrange(8)):
                offset = draw.randrange(0, DISK_BYTES, 512)
                length = draw.choice((512, 4096, 8192, 65536, 2 * MIB))
                writes.append((offset, min(length, DISK_BYTES - offset)))
            skipped.observe(table(writes, draw), 0)
            for offset, length in writes:
                for page in range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)):
                    whole = offset <= page * PAGE_BYTES and (page + 1) * PAGE_BYTES <= offset + length
                    if page in expected and not whole:
                        dirty.add(page // 256)
                    expected.discard(page)
            assert set(regions.dirty().tolist()) == dirty
            assert pages_of(skipped) == expected
            assert skipped.byte_count == len(expected) * PAGE_BYTES
    with opened(tmp_path) as (skipped, _):
        assert not skipped.is_new
        assert pages_of(skipped) == expected
        assert skipped.byte_count == len(expected) * PAGE_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_content_is_blanked_where_it_is_left_out_and_nowhere_else(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with opened(tmp_path) as (skipped, regions):
        pages = filled(skipped, draw)
        regions.clear(0, DISK_BYTES)
        for _ in range(10):
            offset = draw.randrange(0, DISK_BYTES, 512)
            length = min(draw.choice((512, 8192, MIB)), DISK_BYTES - offset)
            content = bytearray(b"x" * length)
            blanked = skipped.blank(offset, memoryview(content))
            expected = bytes(0 if (offset + at) // PAGE_BYTES in pages else ord("x") for at in range(length))
            assert bytes(content) == expected
            assert blanked == skipped.differs(offset, length) == (0 in expected)
            assert skipped.has_all(offset, length) == (ord("x") not in expected)


def test_regions_that_are_left_out_whole_are_told_from_those_with_a_page_that_is_not(tmp_path: Path) -> None:
    with opened(tmp_path) as (skipped, _):
        skipped.put(np.array([[MIB, 4 * MIB], [5 * MIB, DISK_BYTES]]))
        assert skipped.divide(0, DISK_BYTES) == (0, MIB)
        assert skipped.divide(MIB, DISK_BYTES) == (4 * MIB, DISK_BYTES)
        skipped.leave(2 * MIB + 8192, PAGE_BYTES)
        assert skipped.divide(MIB, 4 * MIB) == (2 * MIB, 4 * MIB)
        assert skipped.divide(2 * MIB, 4 * MIB) == (2 * MIB, 3 * MIB)
        assert skipped.divide(5 * MIB, DISK_BYTES) == (6 * MIB, DISK_BYTES)
        assert skipped.divide(6 * MIB, DISK_BYTES) == (6 * MIB, DISK_BYTES)  # the short one is copied


def test_everything_that_was_left_out_can_be_made_dirty(tmp_path: Path) -> None:
    with opened(tmp_path) as (skipped, regions):
        skipped.put(np.array([[MIB, 2 * MIB], [3 * MIB, 5 * MIB - 4096]]))
        skipped.leave(MIB, MIB - PAGE_BYTES)
        regions.clear(0, DISK_BYTES)
        skipped.leave_all()
        assert regions.dirty().tolist() == [1, 3]
        assert skipped.byte_count == 0
        assert not pages_of(skipped)


@pytest.mark.parametrize("disk_bytes", [DISK_BYTES, 5 * MIB + 512])
def test_a_map_of_whole_regions_becomes_one_of_pages(tmp_path: Path, disk_bytes: int) -> None:
    former = grown.header(module._HEADER, b"RPSKIPD\x01", disk_bytes, MIB).ljust(4096, b"\0")
    flags = [0, 1, 1, 0, 0, 1, 1][: -(-disk_bytes // MIB)]
    (tmp_path / "free").write_bytes(former + bytes(flags))
    regions = DirtyRegions(tmp_path / "regions", disk_bytes)
    regions.clear(0, disk_bytes)
    regions.close()
    with opened(tmp_path) as (skipped, regions):
        last = len(flags) - 1  # it is short, and is copied
        assert pages_of(skipped) == {n * 256 + page for n in range(last) if flags[n] for page in range(256)}
        assert last in regions.dirty()
        assert not skipped.is_new  # nobody is asked again


def test_a_map_of_another_disk_is_not_believed(tmp_path: Path) -> None:
    for size, unit in ((DISK_BYTES + MIB, MIB), (DISK_BYTES, MIB // 2)):
        former = grown.header(module._HEADER, b"RPSKIPD\x01", size, unit).ljust(4096, b"\0")
        (tmp_path / "free").write_bytes(former + bytes([1]) * 16)
        with opened(tmp_path) as (skipped, _):
            assert skipped.is_new
            assert skipped.byte_count == 0
