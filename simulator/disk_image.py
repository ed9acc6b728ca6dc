"""A disk image with a real ext4 file system full of real files; made, read and checked without root, without mounting.

`mkfs.ext4 -d` fills it from a directory, `ext4_files` finds each file's blocks and reads files back, `e2fsck -fn`
judges it. So a workload can overwrite *inside* real files through the protected disk: the file system stays clean, as
only data blocks change, and each file's right content is known at every instant.

The directory holds copies of what every machine with Python has (its standard library, installed packages), so that a
demo downloads nothing, and "database" files of a fixed size that the workload may write to.
"""

from __future__ import annotations

import os
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy

from replicar.errors import PermanentError
from simulator.e2fsprogs import BLOCK_BYTES, run
from simulator.ext4_files import files_below
from simulator.workload import Extent

DATABASE_DIRECTORY: Final = "database"
FILES_DIRECTORY: Final = "files"


@dataclass(frozen=True, slots=True)
class DiskImage:
    """An image made by `make`: where it lies, the directory it was filled from, the files that may be written to."""

    path: Path
    source: Path
    databases: tuple[str, ...]  # relative to `source`

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def database_extents(self) -> dict[str, list[Extent]]:
        """Where each database file's bytes lie on the disk, in file order."""
        return {name: file_extents(self.path, name) for name in self.databases}


def gather_files(directory: Path, target_bytes: int, roots: Sequence[Path] | None = None) -> int:
    """Copy real files, in name order, below `directory` until they hold about `target_bytes`.

    Args:
        roots: where to take them from; Python's standard library and the installed packages unless told.

    Returns:
        The bytes copied; fewer than asked for when there are no more.
    """
    copied = 0
    for root in roots or (Path(sysconfig.get_path("stdlib")), Path(numpy.__file__).parents[1]):
        for source in _files_below(root):
            size = source.stat().st_size
            if copied + size > target_bytes:
                continue
            copy = directory / root.name / source.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            copied += size
    return copied


def make(
    directory: Path,
    *,
    size_bytes: int,
    files_bytes: int,
    database_bytes: Iterable[int],
    randomness: random.Random,
) -> DiskImage:
    """Make `directory`/disk.img from `directory`/source, which is filled first.

    Args:
        size_bytes: of the disk, a multiple of 4096; whole MiB it need not be.
        files_bytes: of real files, about.
        database_bytes: sizes of the files that a workload may write to.

    Raises:
        PermanentError: the files do not fit, or a tool is missing.
    """
    if size_bytes % BLOCK_BYTES:
        raise PermanentError(f"a file system of {size_bytes} bytes is no whole number of {BLOCK_BYTES}-byte blocks")
    source = directory / "source"
    gather_files(source / FILES_DIRECTORY, files_bytes)
    databases = []
    for index, length in enumerate(database_bytes):
        name = f"{DATABASE_DIRECTORY}/table-{index}.db"
        (source / DATABASE_DIRECTORY).mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(randomness.randbytes(length))
        databases.append(name)
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run("mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-m", "0", "-L", "replicar", "-d", str(source), str(image))
    return DiskImage(image, source, tuple(databases))


def file_extents(image: Path, name: str) -> list[Extent]:
    """Where the bytes of the file at path `name` lie on the image, in file order.

    Raises:
        PermanentError: there is no such file, or it has holes (which no workload may write to).
    """
    inode = files_below(image, str(Path(name).parent)).get(name)
    if inode is None:
        raise PermanentError(f"{image} has no file {name}", path=name)
    following = 0
    for piece in inode.pieces:
        if piece.inside != following:
            break
        following += piece.length
    if following < inode.size:
        raise PermanentError(f"{name} on {image} has a hole at byte {following}", path=name)
    return [Extent(piece.offset, piece.length) for piece in inode.pieces]


def file_content(image: Path, extents: Iterable[Extent], length: int) -> bytes:
    """The bytes that extents of a raw image hold, joined and cut to the file's length."""
    with image.open("rb") as file:
        pieces = []
        for extent in extents:
            file.seek(extent.offset)
            pieces.append(file.read(extent.length))
    return b"".join(pieces)[:length]


def _files_below(root: Path) -> Iterator[Path]:
    """Plain files below a directory, in a fixed order, without caches and links."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in ("__pycache__", "site-packages"))
        for name in sorted(files):
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                yield path
