"""Disk images with real file systems: made, looked into and judged by e2fsprogs, without root."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from replicar.errors import CorruptionError, PermanentError
from simulator import disk_image, e2fsprogs
from simulator.disk_image import DATABASE_DIRECTORY, FILES_DIRECTORY, DiskImage
from simulator.ext4_files import differing_files, files_below
from tests.support.tools import need

SIZE_BYTES = (24 << 20) - 4096
DATABASE_BYTES = (1 << 20, 300_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    need("mkfs.ext4")
    return disk_image.make(
        tmp_path_factory.mktemp("image"),
        size_bytes=SIZE_BYTES,
        files_bytes=4 << 20,
        database_bytes=DATABASE_BYTES,
        randomness=random.Random(1),
    )


def test_a_made_image_is_clean_and_has_all_its_files(image: DiskImage) -> None:
    e2fsprogs.check(image.path)
    count, unequal = differing_files(image.path, image.source, FILES_DIRECTORY)
    assert unequal == []
    assert count > 20
    assert differing_files(image.path, image.source, DATABASE_DIRECTORY) == (len(DATABASE_BYTES), [])
    assert image.size_bytes == SIZE_BYTES
    files = [path for path in (image.source / FILES_DIRECTORY).rglob("*") if path.is_file()]
    assert len(files) == count
    assert sum(path.stat().st_size for path in files) == pytest.approx(4 << 20, rel=0.05)


def test_extents_say_where_a_files_bytes_are(image: DiskImage) -> None:
    for (name, extents), length in zip(image.database_extents().items(), DATABASE_BYTES, strict=True):
        assert disk_image.file_content(image.path, extents, length) == (image.source / name).read_bytes()


def test_writing_inside_a_file_leaves_the_file_system_clean_and_changes_that_file_only(
    image: DiskImage, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.img"
    copy.write_bytes(image.path.read_bytes())
    name, (first, *_) = next(iter(image.database_extents().items()))
    with copy.open("r+b") as file:
        file.seek(first.offset + 8192)
        file.write(b"changed" * 100)
    e2fsprogs.check(copy)
    assert differing_files(copy, image.source, DATABASE_DIRECTORY) == (2, [name])
    assert differing_files(copy, image.source, FILES_DIRECTORY)[1] == []


def test_files_that_are_only_on_one_side_are_named(image: DiskImage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / DATABASE_DIRECTORY).mkdir(parents=True)
    (source / DATABASE_DIRECTORY / "extra").write_text("only here")
    count, unequal = differing_files(image.path, source, DATABASE_DIRECTORY)
    assert (count, unequal) == (2, [f"{DATABASE_DIRECTORY}/extra", *sorted(image.databases)])


def test_a_damaged_file_system_is_told(image: DiskImage, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    data = bytearray(image.path.read_bytes())
    data[4096 : 5 * 4096] = bytes(4 * 4096)  # group descriptors and what follows
    copy.write_bytes(data)
    with pytest.raises(CorruptionError, match="unclean"):
        e2fsprogs.check(copy)


def test_files_that_do_not_fit_are_refused_with_what_mkfs_said(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"mkfs\.ext4 failed"):
        disk_image.make(
            tmp_path, size_bytes=4 << 20, files_bytes=0, database_bytes=[8 << 20], randomness=random.Random(1)
        )
    with pytest.raises(PermanentError, match="no whole number of 4096-byte blocks"):
        disk_image.make(tmp_path, size_bytes=5000, files_bytes=0, database_bytes=[], randomness=random.Random(1))


def test_what_is_not_there_is_named(image: DiskImage) -> None:
    with pytest.raises(PermanentError, match="has no file files/nothing"):
        disk_image.file_extents(image.path, "files/nothing")
    with pytest.raises(CorruptionError, match="has no directory nowhere"):
        files_below(image.path, "nowhere")


def test_holes_read_as_zeros_and_are_no_place_to_write_to(tmp_path: Path) -> None:
    need("mkfs.ext4")
    (tmp_path / "source" / "files").mkdir(parents=True)
    sparse = tmp_path / "source" / "files" / "sparse"
    with sparse.open("wb") as file:
        file.write(b"a" * 5000)
        file.seek(100_000)
        file.write(b"z" * 5000)
        file.truncate(200_000)
    made = tmp_path / "disk.img"
    with made.open("wb") as file:
        file.truncate(8 << 20)
    e2fsprogs.run("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", str(tmp_path / "source"), str(made))
    assert differing_files(made, tmp_path / "source", "files") == (1, [])
    with pytest.raises(PermanentError, match=r"files/sparse on .* has a hole at byte 8192"):
        disk_image.file_extents(made, "files/sparse")
