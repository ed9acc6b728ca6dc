"""What is taken for free is what the file systems' own tools say is free, and nothing of a doubtful volume is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mobility_agent.allocation import ext4
from mobility_agent.allocation.source import NotKnownError, Window
from simulator import e2fsprogs
from tests.mobility_agent.allocation.images import (
    MIB,
    asked,
    blank,
    free_by_dumpe2fs,
    free_by_xfs_db,
    noise,
    pairs,
    run,
)
from tests.mobility_agent.trace.rig import loop_disk, run as run_as_root

EXT4 = {
    "blocks of 1 KiB": (64, "-t ext4 -b 1024"),
    "blocks of 4 KiB": (300, "-t ext4 -b 4096"),
    "checksums of 16 bits": (300, "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg"),
    "32 bits, no checksums": (300, "-t ext4 -b 1024 -O ^64bit,^metadata_csum,^uninit_bg"),
    "clusters of 64 KiB": (200, "-t ext4 -b 4096 -O 64bit,bigalloc -C 65536"),
    "clusters and blocks of 1 KiB": (64, "-t ext4 -b 1024 -O bigalloc -C 16384"),
    "descriptors in every group": (100, "-t ext4 -b 1024 -O meta_bg,^resize_inode"),
    "many small groups": (300, "-t ext4 -b 1024 -g 1024"),
    "many small groups of their own": (300, "-t ext4 -b 1024 -O meta_bg,^resize_inode,^flex_bg -g 1024"),
    "two copies of the superblock": (300, "-t ext4 -b 2048 -O sparse_super2"),
    "no journal": (64, "-t ext2 -b 1024"),
    "ext3": (64, "-t ext3"),
    "a size that is no whole group": (77, "-t ext4 -b 1024"),
}
XFS = {
    "version 5": (320, ""),
    "sixteen groups": (2048, "-d agcount=16"),
    "version 4": (320, "-m crc=0"),
    "blocks of 1 KiB": (320, "-b size=1024"),
    "sectors of 4 KiB": (320, "-s size=4096"),
    "a log of 100 MiB": (600, "-l size=100m"),
}


def files(directory: Path, seed: int = 3) -> Path:
    """A tree of files of many sizes."""
    draw = random.Random(seed)
    for number in range(60):
        place = directory / "tree" / str(number % 5)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.bin").write_bytes(draw.randbytes(draw.choice((10, 3_000, 70_000, 300_000))))
    return directory / "tree"


@pytest.mark.parametrize("geometry", EXT4)
def test_free_space_of_ext4_is_what_dumpe2fs_says(tmp_path: Path, geometry: str) -> None:
    size, options = EXT4[geometry]
    image = blank(tmp_path / "image", size * MIB)
    run("mkfs.ext4", "-q", "-F", *options.split(), "-d", files(tmp_path), image)
    deleted = [f"rm {number % 5}/{number}.bin" for number in range(0, 60, 2)]
    for command in deleted:
        e2fsprogs.run("debugfs", "-w", "-R", command, str(image))
    found = asked(image)
    assert found.reasons == ()
    assert pairs(found) == free_by_dumpe2fs(image)
    assert len(found.ranges) > 3


@pytest.mark.parametrize("geometry", XFS)
def test_free_space_of_xfs_is_what_xfs_db_says_but_for_the_free_lists(tmp_path: Path, geometry: str) -> None:
    size, options = XFS[geometry]
    image = blank(tmp_path / "image", size * MIB)
    run("mkfs.xfs", "-q", "-f", *options.split(), image)
    found = asked(image)
    assert found.reasons == ()
    assert pairs(found) == free_by_xfs_db(image)[0]


@pytest.mark.needs_root
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_volume_in_use_is_not_believed_and_is_when_it_is_unmounted(tmp_path: Path, filesystem: str) -> None:
    size = 320 * MIB if filesystem == "xfs" else 96 * MIB
    with loop_disk(tmp_path, "a", filesystem=filesystem, size_bytes=size) as disk:
        tree = files(disk.mountpoint, seed=9)
        for round_ in range(3):
            for number, path in enumerate(sorted(tree.rglob("*.bin"))):
                if number % 3 == round_:
                    path.unlink()
            files(disk.mountpoint / f"round-{round_}", seed=round_)
            run_as_root("sync", "-f", disk.mountpoint)
        while_mounted = asked(disk.image)
        assert while_mounted.byte_count == 0
        assert "mounted, or was not unmounted" in while_mounted.reasons[0]
        run_as_root("umount", disk.mountpoint)
        found = asked(disk.image)
        want = free_by_xfs_db(disk.image)[0] if filesystem == "xfs" else free_by_dumpe2fs(disk.image)
        assert found.reasons == ()
        assert pairs(found) == want
        run_as_root("mount", disk.device, disk.mountpoint)


@pytest.mark.parametrize("broken", ["needs_recovery", "not clean", "errors"])
def test_an_ext4_volume_with_something_left_to_do_is_not_believed(tmp_path: Path, broken: str) -> None:
    image = blank(tmp_path / "image", 32 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    change = {
        "needs_recovery": "feature needs_recovery",
        "not clean": "set_super_value state 0",
        "errors": "set_super_value state 3",
    }[broken]
    e2fsprogs.run("debugfs", "-w", "-R", change, str(image))
    found = asked(image)
    assert found.byte_count == 0
    assert len(found.reasons) == 1


def test_an_ext4_volume_larger_than_what_holds_it_is_not_believed(tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 32 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    with image.open("r+b") as file:
        file.truncate(31 * MIB)
    assert "part of an array" in asked(image).reasons[0]


def test_a_bitmap_that_was_altered_is_not_believed(tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 32 * MIB)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", image)
    place = int(run("dumpe2fs", image).split("Block bitmap at ")[1].split()[0]) * 4096
    with image.open("r+b") as file:
        file.seek(place + 10)
        file.write(b"\xa5")
    assert "checksum of an ext4 block bitmap" in asked(image).reasons[0]


def test_a_log_of_xfs_whose_last_record_is_no_unmount_is_not_believed(tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 320 * MIB)
    run("mkfs.xfs", "-q", "-f", image)
    start = int(
        run("xfs_db", "-r", "-c", "sb 0", "-c", "convert fsblock 0 byte", "-c", "p logstart", image).split()[-1]
    )
    values = run("xfs_db", "-r", "-c", "sb 0", "-c", "p agblocks agblklog blocksize", image).split()
    group, shift, block = int(values[2]), int(values[5]), int(values[8])
    at = ((start >> shift) * group + (start & ((1 << shift) - 1))) * block
    with image.open("r+b") as file:
        file.seek(at + 512 + 9)  # the flags of the record's one operation
        flags = file.read(1)[0]
        assert flags & 0x20
        file.seek(at + 512 + 9)
        file.write(bytes([flags & ~0x20]))
    assert "log has to be replayed" in asked(image).reasons[0]


@pytest.mark.parametrize(("offset", "signature"), [(0, b"LUKS\xba\xbe"), (512, b"LABELONE"), (0, b"XFSB")])
def test_a_volume_that_looks_like_two_formats_is_not_believed(tmp_path: Path, offset: int, signature: bytes) -> None:
    image = blank(tmp_path / "image", 32 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(signature)
    found = asked(image)
    assert found.byte_count == 0
    assert "at once" in found.reasons[0]


def test_a_disk_of_noise_has_nothing_free(tmp_path: Path) -> None:
    found = asked(noise(tmp_path / "image", 4 * MIB))
    assert found.byte_count == 0
    assert found.reasons == ("the disk: it has no file system known",)


def test_a_read_that_fails_makes_a_volume_one_that_is_not_known(tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 32 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    content = image.read_bytes()

    def read(offset: int, length: int) -> bytes:
        if offset >= 4 << 10:
            raise OSError(5, "Input/output error")
        return content[offset : offset + length]

    with pytest.raises(NotKnownError, match="can't be read"):
        ext4.free_ranges(Window(read, 0, len(content)))
