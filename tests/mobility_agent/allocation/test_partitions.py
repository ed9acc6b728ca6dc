"""Partition tables as the standards have them, built byte by byte, and what is refused."""

from __future__ import annotations

import random
import struct
import uuid
import zlib
from pathlib import Path

import pytest

from mobility_agent.allocation.partitions import partitions
from mobility_agent.allocation.source import NotKnownError, Window
from mobility_agent.allocation.volumes import free_space
from tests.mobility_agent.allocation.images import MIB, blank, free_by_dumpe2fs, pairs, run

SECTOR = 512
SIZE = 64 * MIB
Entry = tuple[int, int, int]  # type, first sector, sectors


def boot_sector(*entries: Entry) -> bytes:
    table = b"".join(struct.pack("<B3xB3xII", 0, kind, first, count) for kind, first, count in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(spans: list[tuple[int, int]], *, sector: int = SECTOR) -> bytearray:
    """A disk with these partitions: (first sector, last sector)."""
    disk, last = bytearray(SIZE), SIZE // sector - 1
    entries = b"".join(
        uuid.UUID(int=1).bytes_le + uuid.UUID(int=number + 2).bytes_le + struct.pack("<QQQ72x", first, end, 0)
        for number, (first, end) in enumerate(spans)
    ).ljust(128 * 128, b"\0")
    usable = 2 + len(entries) // sector
    identity = uuid.UUID(int=9).bytes_le
    header = bytearray(
        struct.pack(
            "<8sIIIIQQQQ16sQIII",
            *(b"EFI PART", 0x10000, 92, 0, 0, 1, last, usable, last - usable, identity, 2, 128, 128),
            zlib.crc32(entries),
        )
    )
    header[16:20] = struct.pack("<I", zlib.crc32(header))
    disk[:SECTOR] = boot_sector((0xEE, 1, last))
    disk[sector : sector + len(header)] = header
    disk[2 * sector : 2 * sector + len(entries)] = entries
    return disk


def read_of(disk: bytes | bytearray) -> Window:
    return Window(lambda offset, length: bytes(disk[offset : offset + length]), 0, len(disk))


def test_primary_and_logical_partitions_are_found() -> None:
    disk = bytearray(SIZE)
    disk[:SECTOR] = boot_sector((0x83, 2048, 1000), (0x82, 4096, 500), (0x05, 8192, 50_000))
    disk[8192 * SECTOR : 8193 * SECTOR] = boot_sector((0x83, 64, 3000), (0x05, 10_000, 20_000))
    disk[18_192 * SECTOR : 18_193 * SECTOR] = boot_sector((0x07, 64, 4000))
    assert partitions(read_of(disk)) == [
        (first * SECTOR, count * SECTOR) for first, count in ((2048, 1000), (4096, 500), (8256, 3000), (18_256, 4000))
    ]


def test_a_chain_of_logical_partitions_that_never_ends_is_refused() -> None:
    disk = bytearray(SIZE)
    disk[:SECTOR] = boot_sector((0x0F, 8192, 50_000))
    disk[8192 * SECTOR : 8193 * SECTOR] = boot_sector((0x05, 100, 1))
    disk[8292 * SECTOR : 8293 * SECTOR] = boot_sector((0x05, 100, 1))
    with pytest.raises(NotKnownError, match="does not end"):
        partitions(read_of(disk))


@pytest.mark.parametrize("sector", [512, 4096])
def test_partitions_of_a_gpt_are_found(sector: int) -> None:
    disk = gpt([(2048, 4095), (4096, 8191)], sector=sector)
    assert partitions(read_of(disk)) == [(2048 * sector, 2048 * sector), (4096 * sector, 4096 * sector)]


@pytest.mark.parametrize("place", [SECTOR + 40, 2 * SECTOR + 40])
def test_a_gpt_with_one_wrong_bit_is_refused(place: int) -> None:
    disk = gpt([(2048, 4095)])
    disk[place] ^= 1
    with pytest.raises(NotKnownError, match="checksum"):
        partitions(read_of(disk))


def test_partitions_that_overlap_are_refused() -> None:
    with pytest.raises(NotKnownError, match="overlap"):
        partitions(read_of(gpt([(2048, 4096), (4096, 8191)])))


def test_a_partition_behind_the_disk_is_refused() -> None:
    disk = bytearray(SIZE)
    disk[:SECTOR] = boot_sector((0x83, 2048, SIZE // SECTOR))
    with pytest.raises(NotKnownError, match="ends behind"):
        partitions(read_of(disk))


def test_free_space_of_a_partition_counts_from_the_disks_start(tmp_path: Path) -> None:
    volume = blank(tmp_path / "volume", 40 * MIB)
    run("mkfs.ext4", "-q", "-F", volume)
    disk = gpt([(2048, 2048 + 40 * MIB // SECTOR - 1), (90_000, 100_000)])
    disk[MIB : 41 * MIB] = volume.read_bytes()
    disk[90_000 * SECTOR : 90_100 * SECTOR] = random.Random(1).randbytes(100 * SECTOR)
    found = free_space(lambda offset, length: bytes(disk[offset : offset + length]), SIZE)
    assert pairs(found) == [(begin + MIB, end + MIB) for begin, end in free_by_dumpe2fs(volume)]
    assert found.reasons == (f"the volume at {90_000 * SECTOR}: it has no file system known",)
