"""What is taken for free on NTFS is no file's, as its own tools read it, and nothing of a doubtful volume is.

No Windows is at hand: that a log says that the volume was dismounted is played, by a restart page made as documented.
"""

from __future__ import annotations

import random
import re
import struct
import subprocess
import time
from pathlib import Path

import pytest

from mobility_agent.allocation import ntfs
from mobility_agent.allocation.source import NotKnownError, Window
from tests.mobility_agent.allocation.images import MIB, asked, blank, pairs, run
from tests.support.tools import need

VOLUMES = {
    "clusters of 4 KiB": (64, "-c 4096"),
    "clusters of 512 bytes": (24, "-c 512"),
    "clusters of 64 KiB": (256, "-c 65536"),
    "sectors of 4 KiB": (64, "-s 4096"),
    "a size that is no whole cluster": (33, "-c 65536"),
}
BITMAP, VOLUME, LOG = 6, 3, 2
CLUSTER = 4096


def tool(name: str, *arguments: str | Path) -> bytes:
    """Run one of the volume's own tools, which come with `mkntfs`."""
    need("mkntfs")
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(directory: Path, size_mib: int = 64, options: str = "-c 4096") -> tuple[Path, dict[str, bytes]]:
    """A volume, and the files on it by name."""
    image, source, draw = blank(directory / "image", size_mib * MIB), directory / "source", random.Random(5)
    run("mkntfs", "-Q", "-q", "-F", *options.split(), image)
    files: dict[str, bytes] = {}
    for number in range(12):
        files[f"{number}.bin"] = draw.randbytes(draw.choice((10, 3_000, 70_000, 400_000)))
        source.write_bytes(files[f"{number}.bin"])
        tool("ntfscp", "-q", image, source, f"{number}.bin")
    return image, files


def assert_nobody_needs_what_is_free(image: Path, files: dict[str, bytes]) -> None:
    """It is as much as the volume's own tool says; and written over, it is missed by nobody."""
    found = asked(image)
    assert found.reasons == ()
    said = tool("ntfsinfo", "-m", image).decode()
    cluster, free = (re.search(what, said) for what in (r"Cluster Size: (\d+)", r"Free Clusters: (\d+)"))
    assert cluster is not None
    assert free is not None
    assert found.byte_count == int(cluster[1]) * int(free[1])
    with image.open("r+b") as file:
        for begin, end in pairs(found):
            file.seek(begin)
            file.write(b"\xa5" * (end - begin))
    tool("ntfsfix", "-n", image)
    assert {name: tool("ntfscat", image, name) for name in files} == files


@pytest.mark.parametrize("geometry", VOLUMES)
def test_free_space_of_ntfs_is_as_much_as_ntfsinfo_says_and_no_files(tmp_path: Path, geometry: str) -> None:
    assert_nobody_needs_what_is_free(*made(tmp_path, *VOLUMES[geometry]))


@pytest.mark.needs_root
def test_a_volume_that_was_used_has_many_pieces(tmp_path: Path) -> None:
    image, files = made(tmp_path)
    where, draw = tmp_path / "mounted", random.Random(6)
    where.mkdir()
    need("mkntfs")
    driver = subprocess.Popen(["ntfs-3g", "-o", "no_detach", image, where])
    try:
        until = time.monotonic() + 30
        while not where.is_mount():
            assert time.monotonic() < until
            time.sleep(0.05)
        for number in range(80):
            files[f"more-{number}"] = draw.randbytes(draw.choice((5_000, 60_000, 300_000)))
            (where / f"more-{number}").write_bytes(files[f"more-{number}"])
        for number in range(0, 80, 2):
            (where / f"more-{number}").unlink()
            del files[f"more-{number}"]
        tool("umount", where)
        assert driver.wait(30) == 0  # it writes out what it has after the mount is gone
    finally:
        driver.kill()
        driver.wait(30)
        subprocess.run(["umount", "-l", where], capture_output=True, check=False)
    assert len(pairs(asked(image))) > 10
    assert_nobody_needs_what_is_free(image, files)


def record_at(image: Path, number: int) -> int:
    """Where a record of the file table lies."""
    with image.open("rb") as file:
        boot = file.read(512)
    return int(struct.unpack_from("<Q", boot, 48)[0]) * CLUSTER + number * 1024


def altered(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def place_of(image: Path, number: int) -> int:
    """Where the content of a file of the system's begins, by its first run."""
    with image.open("rb") as file:
        file.seek(record_at(image, number))
        record = file.read(1024)
    at = struct.unpack_from("<H", record, 20)[0]
    while (kind := struct.unpack_from("<I", record, at)[0]) != 0x80:
        assert kind != 0xFFFFFFFF
        at += struct.unpack_from("<I", record, at + 4)[0]
    runs = at + struct.unpack_from("<H", record, at + 32)[0]
    counted, placed = record[runs] & 15, record[runs] >> 4
    return int.from_bytes(record[runs + 1 + counted : runs + 1 + counted + placed], "little", signed=True) * CLUSTER


@pytest.mark.parametrize("flag", [0x0001, 0x0002, 0x4000])
def test_a_volume_that_is_marked_is_not_believed(tmp_path: Path, flag: int) -> None:
    image, _ = made(tmp_path)
    with image.open("rb") as file:
        file.seek(record_at(image, VOLUME))
        record = file.read(1024)
    at = record.index(struct.pack("<BB", 3, 1) + bytes(2), 56)  # version 3.1, and no flags
    altered(image, record_at(image, VOLUME) + at + 2, struct.pack("<H", flag))
    found = asked(image)
    assert found.byte_count == 0
    assert "marked as dirty" in found.reasons[0]


def restart_page(flags: int, *, in_use: int = 0) -> bytes:
    """A restart page of a log: its stamp in every sector's end, and one area."""
    page = bytearray(4096)
    struct.pack_into("<4sHHQIIHhH", page, 0, b"RSTR", 30, 9, 0, 4096, 4096, 48, 1, 1)
    struct.pack_into("<QHHHH", page, 48, 77, 1, 0xFFFF, in_use, flags)
    for number in range(9):
        struct.pack_into("<H", page, 30 + 2 * number if not number else number * 512 - 2, 0x55)
    return bytes(page)


@pytest.mark.parametrize(
    ("first", "second", "is_believed"),
    [
        (restart_page(2), restart_page(2), True),
        (restart_page(0, in_use=0xFFFF), restart_page(2), True),
        (restart_page(0), restart_page(2), False),
        (restart_page(2), restart_page(0), False),
        (restart_page(2), b"\xff" * 4096, False),
        (restart_page(2)[:1024] + bytes(3072), restart_page(2), False),
        (b"\xff" * 4096, b"\xff" * 4095 + b"\0", False),
    ],
)
def test_the_log_has_to_say_that_nothing_is_left_to_replay(
    tmp_path: Path, first: bytes, second: bytes, is_believed: bool
) -> None:
    image, _ = made(tmp_path)
    altered(image, place_of(image, LOG), first + second)
    found = asked(image)
    assert bool(found.byte_count) is is_believed
    assert len(found.reasons) == (0 if is_believed else 1)


def test_a_bitmap_that_lacks_a_files_cluster_is_not_believed_where_the_log_was_emptied(tmp_path: Path) -> None:
    image, files = made(tmp_path)
    large = max(files, key=lambda name: len(files[name]))
    cluster = image.read_bytes().index(files[large][:CLUSTER]) // CLUSTER
    place = place_of(image, BITMAP) + cluster // 8
    with image.open("rb") as file:
        file.seek(place)
        taken = file.read(1)[0]
    altered(image, place, bytes([taken & ~(1 << cluster % 8)]))
    assert "clusters of a file as free" in asked(image).reasons[0]


def test_a_volume_cut_off_is_not_believed(tmp_path: Path) -> None:
    image, _ = made(tmp_path)
    with image.open("r+b") as file:
        file.truncate(60 * MIB)
    assert "part of an array" in asked(image).reasons[0]


def test_a_torn_record_is_not_believed(tmp_path: Path) -> None:
    image, _ = made(tmp_path)
    altered(image, record_at(image, BITMAP) + 510, b"\xee\xee")
    assert "torn" in asked(image).reasons[0]


def test_any_byte_of_what_is_read_may_be_another(tmp_path: Path) -> None:
    """The system's own records, byte by byte: free, or not known, and nothing else."""
    image, _ = made(tmp_path, 24)
    content, draw = bytearray(image.read_bytes()), random.Random(1)
    start = record_at(image, 0)
    for _ in range(400):
        at = draw.choice((draw.randrange(512), start + draw.randrange(8 * 1024)))
        before = content[at]
        content[at] = draw.choice((0, 0xFF, before ^ (1 << draw.randrange(8)), 0x80))

        def read(offset: int, length: int) -> bytes:
            return bytes(content[offset : offset + length])

        try:
            found = ntfs.free_ranges(Window(read, 0, len(content)))
        except NotKnownError:
            pass
        else:
            assert not len(found) or 0 <= found[0, 0] <= found[-1, 1] <= len(content)
        content[at] = before
