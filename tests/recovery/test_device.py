"""A block device takes a whole disk, zeros included, and is refused while anybody could lose something by it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recovery.device import write_device
from replicar.errors import PermanentError
from replicar.storage import PageBlobStore
from tests.recovery.test_output import DISK, MIB, build, view_of
from tests.support.tools import need

pytestmark = pytest.mark.needs_root


class Loops:
    """Loop devices over files full of old bytes, detached at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.devices: list[Path] = []

    def make(self, size: int, fill: bytes = b"\xaa") -> Path:
        image = self._directory / f"device{len(self.devices)}"
        image.write_bytes(fill * size if fill else b"")
        os.truncate(image, size)
        found = subprocess.run(
            ["losetup", "-f", "--show", str(image)], capture_output=True, timeout=30, check=True, text=True
        )
        self.devices.append(Path(found.stdout.strip()))
        return self.devices[-1]


@contextmanager
def mounted(device: Path, directory: Path) -> Iterator[None]:
    """A file system on the device, mounted."""
    subprocess.run([need("mkfs.ext4"), "-q", "-F", str(device)], timeout=30, check=True)
    directory.mkdir()
    subprocess.run(["mount", str(device), str(directory)], timeout=30, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], timeout=30, check=True)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    made = Loops(tmp_path)
    yield made
    for device in made.devices:
        subprocess.run(["losetup", "-d", str(device)], timeout=30, check=True)


async def test_a_device_holds_the_disk_and_behind_it_what_it_held(store: PageBlobStore, loops: Loops) -> None:
    builder = await build(store)
    view, device = await view_of(builder), loops.make(DISK // 512 * 512 + MIB)
    written = await write_device(view, view.disks[0], device, replace=True)
    content = device.read_bytes()
    assert content[:DISK] == bytes(builder.disks[0])
    assert content[DISK:] == b"\xaa" * MIB
    assert (written.target, written.size_bytes) == (str(device), DISK)


async def test_zeros_are_discarded_where_the_device_can(store: PageBlobStore, loops: Loops, tmp_path: Path) -> None:
    view, device = await view_of(await build(store)), loops.make(DISK)
    await write_device(view, view.disks[0], device, replace=True)
    assert (tmp_path / "device0").stat().st_blocks * 512 < 5 * MIB  # of 9


async def test_a_device_that_holds_something_is_not_overwritten_unasked(store: PageBlobStore, loops: Loops) -> None:
    view, device = await view_of(await build(store)), loops.make(DISK)
    with pytest.raises(PermanentError, match="holds something"):
        await write_device(view, view.disks[0], device)
    assert device.read_bytes() == b"\xaa" * DISK
    empty = loops.make(DISK, fill=b"")
    await write_device(view, view.disks[0], empty)


async def test_a_device_that_is_too_small_is_refused_whatever_was_said(store: PageBlobStore, loops: Loops) -> None:
    view, device = await view_of(await build(store)), loops.make(DISK - 512)
    with pytest.raises(PermanentError, match=f"has {DISK - 512} bytes, and the disk {DISK}"):
        await write_device(view, view.disks[0], device, replace=True)
    assert device.read_bytes() == b"\xaa" * (DISK - 512)


async def test_a_device_that_is_mounted_is_refused_whatever_was_said(
    store: PageBlobStore, loops: Loops, tmp_path: Path
) -> None:
    view, device = await view_of(await build(store)), loops.make(16 * MIB)
    with mounted(device, tmp_path / "mounted"), pytest.raises(PermanentError, match="is in use"):
        await write_device(view, view.disks[0], device, replace=True)


async def test_what_is_no_device_is_refused(store: PageBlobStore, tmp_path: Path) -> None:
    view = await view_of(await build(store))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(PermanentError, match="is no block device"):
        await write_device(view, view.disks[0], tmp_path / "file", replace=True)
    with pytest.raises(PermanentError, match="can't be opened"):
        await write_device(view, view.disks[0], tmp_path / "nothing")
