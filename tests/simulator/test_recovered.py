"""The judge of recovered disks: it accepts the right one, and tells what is wrong with any other."""

from __future__ import annotations

import random
import shutil
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from replicar.errors import CorruptionError
from replicar.formats import vhd
from replicar.storage.memory import MemoryStore
from simulator import disk_image, recovered
from simulator.content import Stamp
from simulator.disk_image import DiskImage
from simulator.oracle import LATEST_NS, Oracle
from tests.support.tools import need

MIB = 1 << 20
DISK_BYTES = 12 * MIB - 8192


@pytest.fixture
def image(tmp_path: Path) -> DiskImage:
    need("mkfs.ext4")
    return disk_image.make(
        tmp_path / "image",
        size_bytes=DISK_BYTES,
        files_bytes=2 * MIB,
        database_bytes=[MIB],
        randomness=random.Random(1),
    )


@pytest.fixture
def oracle(image: DiskImage, tmp_path: Path) -> Oracle:
    """One write, in the database's file, acknowledged at 20."""
    oracle = Oracle(image.path, tmp_path / "oracle")
    (extent, *_) = next(iter(image.database_extents().values()))
    oracle.acknowledge(oracle.begin(extent.offset, 4096, Stamp(1, 1, 10), 10), 20)
    return oracle


@pytest.fixture
def right(oracle: Oracle, tmp_path: Path) -> Path:
    """The disk as it should be recovered, filled up to whole MiB."""
    path = tmp_path / "recovered.raw"
    shutil.copyfile(oracle.expected("right"), path)
    with path.open("r+b") as file:
        file.truncate(vhd.virtual_bytes(DISK_BYTES))
    return path


def test_the_right_disk_is_accepted_and_nothing_is_left_behind(image: DiskImage, oracle: Oracle, right: Path) -> None:
    before = sorted(right.parent.rglob("*"))
    verdict = recovered.judge(image, oracle, right, "right", LATEST_NS)
    assert verdict.problems == ()
    assert verdict.bytes_compared == DISK_BYTES
    assert verdict.changes_included == 1
    assert verdict.files_compared > 10
    assert set(right.parent.rglob("*")) <= set(before)


def test_a_disk_without_the_last_write_is_not(image: DiskImage, oracle: Oracle, right: Path) -> None:
    shutil.copyfile(image.path, right)
    verdict = recovered.judge(image, oracle, right, "stale", LATEST_NS)
    assert "4096 bytes differ" in verdict.problems[0]
    assert verdict.problems[1] == "database/table-0.db differs"
    assert recovered.judge(image, oracle, right, "early", 9).problems == ()


def test_one_changed_byte_in_a_real_file_is_seen_twice(image: DiskImage, oracle: Oracle, right: Path) -> None:
    name = next(path for path in sorted((image.source / "files").rglob("*.py")) if path.stat().st_size > 8192)
    (extent, *_) = disk_image.file_extents(image.path, str(name.relative_to(image.source)))
    with right.open("r+b") as file:
        file.seek(extent.offset)
        changed = bytes([file.read(1)[0] ^ 1])
        file.seek(extent.offset)
        file.write(changed)
    verdict = recovered.judge(image, oracle, right, "changed", LATEST_NS)
    assert "512 bytes differ" in verdict.problems[0]
    assert f"1 files differ, among them {name.relative_to(image.source)}" in verdict.problems


def test_a_broken_file_system_a_short_file_and_a_dirty_tail_are_told(
    image: DiskImage, oracle: Oracle, right: Path
) -> None:
    with right.open("r+b") as file:
        file.seek(DISK_BYTES + 512)
        file.write(b"x")
    assert any("not zeros behind" in what for what in recovered.judge(image, oracle, right, "tail", LATEST_NS).problems)
    with right.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(8 * 4096))
    assert any("e2fsck" in what for what in recovered.judge(image, oracle, right, "broken", LATEST_NS).problems)
    with right.open("r+b") as file:
        file.truncate(MIB)
    short = recovered.judge(image, oracle, right, "short", LATEST_NS)
    assert any("has 1048576 bytes, the disk" in what for what in short.problems)


async def test_a_vhd_is_fetched_without_its_footer(right: Path, tmp_path: Path) -> None:
    data = right.read_bytes()
    store = await _blob(data, _footer(len(data)))
    assert await recovered.fetch_vhd(store, "disk.vhd", tmp_path / "fetched.raw") == len(data)
    assert (tmp_path / "fetched.raw").read_bytes() == data


@pytest.mark.parametrize(
    ("size", "change", "said"),
    [
        (MIB, lambda footer: b"conectiX" + footer[8:], "no footer"),
        (MIB, lambda footer: footer[:60] + struct.pack(">I", 3) + footer[64:], "no footer"),
        (MIB, lambda footer: footer[:100] + b"\1" + footer[101:], "checksum"),
        (2 * MIB, lambda footer: footer, "says 1048576 bytes in a blob of 2097664"),
    ],
)
async def test_what_azure_would_not_import_is_refused(
    size: int, change: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    store = await _blob(b"\1" * size, change(_footer(MIB)))
    with pytest.raises(CorruptionError, match=said):
        await recovered.fetch_vhd(store, "disk.vhd", tmp_path / "fetched.raw")


def _footer(size: int) -> bytes:
    return vhd.pack_footer(size, uuid.UUID(int=1), 1_700_000_000)


async def _blob(data: bytes, footer: bytes) -> MemoryStore:
    store = MemoryStore()
    await store.ensure_container()
    await store.create("disk.vhd", len(data) + len(footer))
    for offset in range(0, len(data), 4 * MIB):
        piece = data[offset : offset + 4 * MIB]
        if any(piece):
            await store.put_pages("disk.vhd", offset, piece)
    await store.put_pages("disk.vhd", len(data), footer)
    return store
