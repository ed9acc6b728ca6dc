"""Where a disk can go home to, each tried by carrying a disk there and back."""

from __future__ import annotations

import asyncio
import random
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from recovery.failback.carry import carry, verify
from recovery.failback.destinations import named, open_destination
from recovery.failback.spans import Spans
from replicar.errors import CorruptionError, PermanentError, TransientError
from replicar.formats import vhd
from replicar.storage import MemoryStore
from tests.recovery.failback.disks import MemoryDisk
from tests.support.tools import need

MIB = 1 << 20
SIZE = 4 * MIB


async def _run(command: list[str]) -> None:
    await asyncio.to_thread(subprocess.run, command, check=True)


def _disk() -> MemoryDisk:
    """Half random, with zeros in it."""
    data = bytearray(random.Random(5).randbytes(SIZE))
    data[MIB : 2 * MIB] = bytes(MIB)
    return MemoryDisk(bytes(data))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


async def _there_and_back(place: str, stack: AsyncExitStack, store: MemoryStore | None = None) -> None:
    origin, destination = _disk(), await open_destination(place, stack, store)
    assert destination.size_bytes == SIZE
    await carry(Spans.whole(SIZE), origin, destination)
    await verify(Spans.whole(SIZE), origin, destination, disk="root")


async def test_a_raw_file_takes_a_disk(tmp_path: Path, stack: AsyncExitStack) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xff" * SIZE)
    await _there_and_back(str(path), stack)
    assert path.read_bytes() == _disk().data


async def test_an_export_of_nbd_takes_a_disk(tmp_path: Path, stack: AsyncExitStack) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "s"
    image.write_bytes(b"\xff" * SIZE)
    server = await asyncio.create_subprocess_exec(need("nbdkit"), "-f", "--unix", str(socket), "file", str(image))
    try:
        while not socket.exists():
            await asyncio.sleep(0.01)
        async with AsyncExitStack() as inner:
            await _there_and_back(f"nbd+unix:///?socket={socket}", inner)
        assert image.read_bytes() == _disk().data
    finally:
        server.kill()
        await server.wait()


async def test_a_vhd_in_a_page_blob_takes_a_disk_and_keeps_its_footer(stack: AsyncExitStack) -> None:
    store = MemoryStore()
    await store.ensure_container()
    footer = vhd.pack_footer(SIZE, uuid.UUID(int=1), 1_780_000_000)
    await store.create("vhds/shop.vhd", SIZE + vhd.FOOTER_BYTES)
    await store.put_pages("vhds/shop.vhd", 0, b"\xff" * SIZE)
    await store.put_pages("vhds/shop.vhd", SIZE, footer)
    await _there_and_back("blob:vhds/shop.vhd", stack, store)
    assert await store.read("vhds/shop.vhd", 0, SIZE) == _disk().data
    assert await store.read("vhds/shop.vhd", SIZE, vhd.FOOTER_BYTES) == footer


async def test_a_blob_that_is_no_vhd_is_refused(stack: AsyncExitStack) -> None:
    store = MemoryStore()
    await store.ensure_container()
    await store.create("other", SIZE)
    with pytest.raises(CorruptionError):
        await open_destination("blob:other", stack, store)


@pytest.mark.needs_root
async def test_a_device_that_is_in_use_is_refused_and_a_free_one_is_taken(
    tmp_path: Path, stack: AsyncExitStack, looped_device: Path
) -> None:
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    await _run(["mkfs.ext4", "-q", str(looped_device)])
    await _run(["mount", str(looped_device), str(mountpoint)])
    try:
        with pytest.raises(PermanentError, match="can't be written to") as caught:
            await open_destination(str(looped_device), stack, None)
        assert "mounted" in caught.value.hint
    finally:
        await _run(["umount", str(mountpoint)])
    await _there_and_back(str(looped_device), stack)


@pytest.fixture
def looped_device(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "device.img"
    image.write_bytes(bytes(SIZE))
    found = subprocess.run(
        ["losetup", "-f", "--show", "--direct-io=off", str(image)], check=True, capture_output=True, text=True
    )
    yield Path(found.stdout.strip())
    subprocess.run(["losetup", "-d", found.stdout.strip()], check=True)


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("/nowhere/disk.img", PermanentError, "can't be written to"),
        ("http://host/disk", PermanentError, "nowhere that a disk can go to"),
        ("nbd+unix:///x", PermanentError, "nowhere that a disk can go to"),
        ("nbd+unix:///x?socket=/nowhere/s", TransientError, "no NBD server answers"),
        ("blob:vhds/shop.vhd", PermanentError, "which account"),
    ],
)
async def test_what_is_nowhere_is_refused(
    place: str, error: type[Exception], words: str, stack: AsyncExitStack
) -> None:
    with pytest.raises(error, match=words):
        await open_destination(place, stack, None)


def test_every_disk_has_a_place_of_its_own() -> None:
    assert named("/dev/vg0/{disk}", "root", 2) == "/dev/vg0/root"
    assert named("/dev/sdb", "root", 1) == "/dev/sdb"
    with pytest.raises(PermanentError, match="can't all go to"):
        named("/dev/sdb", "root", 2)
