"""What a view is written to is the disk, byte for byte, or is not there at all."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

import pytest

from recovery.files import held_stretches
from recovery.output import Written, write_raw_file, write_vhd_blob, write_vhd_file
from recovery.plan import Copies
from recovery.points import Latest, locate
from recovery.view import View
from replicar.errors import CorruptionError, PermanentError
from replicar.formats import segment, vhd
from replicar.storage import PageBlobStore, is_missing
from tests.recovery.log_builder import LogBuilder
from tests.support.tools import need

MIB = 1 << 20
DISK = 9 * MIB + 512
NAME = "restored/disk0.vhd"


async def build(store: PageBlobStore) -> LogBuilder:
    """A disk with data at both ends and around a multiple of 4 MiB, zeros written over data, and a hole of 3 MiB."""
    builder = LogBuilder(store, chunk_bytes=segment.DEFAULT_CHUNK_BYTES)
    random_ = random.Random(11)
    builder.begin(DISK)
    builder.model = False  # a copy of the disk for every descriptor would be too much here
    image = builder.disks[0]
    for offset, length in ((0, MIB), (4 * MIB - 8192, 16384), (DISK - 4096, 4096), (MIB, MIB), (5 * MIB + 512, 512)):
        data = random_.randbytes(length)
        builder.write(0, offset, data)
        image[offset : offset + length] = data
        await builder.seal()
    builder.write(0, MIB, bytes(MIB))
    builder.zero(0, 4096, 8192)
    image[MIB : 2 * MIB] = bytes(MIB)
    image[4096:12288] = bytes(8192)
    await builder.seal()
    return builder


@pytest.fixture
async def built(store: PageBlobStore) -> LogBuilder:
    return await build(store)


async def view_of(builder: LogBuilder) -> View:
    return View(builder.log, await locate(builder.log, Latest()), memory_bytes=2 * MIB)


def expected_vhd(builder: LogBuilder) -> bytes:
    return bytes(builder.disks[0]).ljust(vhd.virtual_bytes(DISK), b"\0")


async def test_a_raw_file_is_the_disk_and_keeps_its_holes(built: LogBuilder, tmp_path: Path) -> None:
    view, path = await view_of(built), tmp_path / "disk.raw"
    seen: list[tuple[int, int]] = []
    written = await write_raw_file(view, view.disks[0], path, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == bytes(built.disks[0])
    assert (written.disk, written.size_bytes, written.sequence) == ("disk0", DISK, built.sequence - 1)
    assert path.stat().st_blocks * 512 < DISK // 2
    assert path.stat().st_mode & 0o777 == 0o600
    assert seen[0][0] == 0
    assert seen[-1] == (await view.data_bytes(view.disks[0]),) * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.raw"]


async def test_what_was_written_is_counted_while_several_chunks_are_under_way(
    store: PageBlobStore, tmp_path: Path
) -> None:
    size = 40 * MIB
    builder = LogBuilder(store, chunk_bytes=segment.DEFAULT_CHUNK_BYTES, model=False, blob_bytes=64 * MIB)
    builder.begin(size)
    for offset in range(0, size, MIB):
        builder.write(0, offset, b"\1" * MIB)
        await builder.seal()
    view = View(builder.log, await locate(builder.log, Latest()))
    written = await write_raw_file(view, view.disks[0], tmp_path / "disk.raw")
    assert written.data_bytes == size


async def test_a_disk_written_here_and_there_again_and_again_comes_back_as_it_was(
    store: PageBlobStore, tmp_path: Path
) -> None:
    """In pieces of any length, which chunks and blocks cut anywhere, with zeros written over data and the reverse."""
    size, random_ = 9 * MIB, random.Random(5)
    builder = LogBuilder(store, chunk_bytes=segment.DEFAULT_CHUNK_BYTES, model=False, blob_bytes=64 * MIB)
    builder.begin(size)
    image = bytearray(size)
    for number in range(240):
        length = 512 * random_.choice([1, 7, 8, 64, 400])
        offset = 512 * random_.randrange((size - length) // 512)
        data = bytes(length) if random_.random() < 0.2 else random_.randbytes(length)
        builder.write(0, offset, data)
        image[offset : offset + length] = data
        if number % 24 == 23:
            await builder.seal()
    for memory_bytes in (8 * MIB, None):
        view = View(builder.log, await locate(builder.log, Latest()), memory_bytes=memory_bytes)
        await write_raw_file(view, view.disks[0], tmp_path / "disk.raw", replace=True)
        assert (tmp_path / "disk.raw").read_bytes() == image


async def test_a_vhd_file_is_the_disk_filled_up_to_a_whole_mib_with_a_footer(built: LogBuilder, tmp_path: Path) -> None:
    view, path = await view_of(built), tmp_path / "disk.vhd"
    await write_vhd_file(view, view.disks[0], path)
    data = path.read_bytes()
    footer = vhd.read_footer(data[-512:])
    assert footer.virtual_bytes == len(data) - 512 == 10 * MIB
    assert data[:-512] == expected_vhd(built)


async def test_qemu_takes_the_vhd_for_what_it_is(built: LogBuilder, tmp_path: Path) -> None:
    view, raw, image = await view_of(built), tmp_path / "disk.raw", tmp_path / "disk.vhd"
    await write_vhd_file(view, view.disks[0], image)
    raw.write_bytes(expected_vhd(built))
    info = _run(need("qemu-img"), "info", "-f", "vpc", str(image))
    assert "virtual size: 10 MiB" in info
    assert "identical" in _run(need("qemu-img"), "compare", "-f", "vpc", "-F", "raw", str(image), str(raw)).lower()


async def test_a_vhd_blob_holds_the_disk_and_only_what_is_not_zeros(built: LogBuilder, store: PageBlobStore) -> None:
    view = await view_of(built)
    written = await write_vhd_blob(view, view.disks[0], store, NAME)
    data = await store.read(NAME, 0, written.size_bytes)
    assert vhd.read_footer(data[-512:]).virtual_bytes == len(data) - 512
    assert data[:-512] == expected_vhd(built)
    ranges = await store.page_ranges(NAME)
    assert sum(length for _, length in ranges) == written.data_bytes + 512
    assert all(not (offset < 2 * MIB and offset + length > MIB) for offset, length in ranges)


async def test_a_vhd_blob_in_a_real_azurite_is_the_disk(azurite_store: PageBlobStore, tmp_path: Path) -> None:
    built = await build(azurite_store)
    view = await view_of(built)
    written = await write_vhd_blob(view, view.disks[0], azurite_store, NAME)
    image, raw = tmp_path / "blob.vhd", tmp_path / "disk.raw"
    image.write_bytes(await azurite_store.read(NAME, 0, written.size_bytes))
    assert image.read_bytes()[:-512] == expected_vhd(built)
    raw.write_bytes(expected_vhd(built))
    assert "identical" in _run(need("qemu-img"), "compare", "-f", "vpc", "-F", "raw", str(image), str(raw)).lower()


async def test_what_is_there_already_is_only_replaced_when_told_to(
    built: LogBuilder, store: PageBlobStore, tmp_path: Path
) -> None:
    view, path = await view_of(built), tmp_path / "disk.raw"
    path.write_bytes(b"precious")
    await store.create(NAME, 512)
    with pytest.raises(PermanentError, match="is there already") as caught:
        await write_raw_file(view, view.disks[0], path)
    assert "--replace" in caught.value.hint
    with pytest.raises(PermanentError, match="is there already"):
        await write_vhd_blob(view, view.disks[0], store, NAME)
    assert path.read_bytes() == b"precious"
    assert (await store.properties(NAME)).size_bytes == 512
    await write_raw_file(view, view.disks[0], path, replace=True)
    await write_vhd_blob(view, view.disks[0], store, NAME, replace=True)
    assert path.read_bytes() == bytes(built.disks[0])
    assert (await store.properties(NAME)).size_bytes == 10 * MIB + 512


async def test_no_output_goes_where_the_logs_are(built: LogBuilder, store: PageBlobStore) -> None:
    view = await view_of(built)
    with pytest.raises(PermanentError, match="machines' logs"):
        await write_vhd_blob(view, view.disks[0], store, built.placed[1][0], replace=True)
    assert (await locate(built.log, Latest(), stored_number=6)).place.sequence == built.sequence - 1


async def test_damage_on_the_way_leaves_no_half_of_a_disk_behind(
    built: LogBuilder, store: PageBlobStore, tmp_path: Path
) -> None:
    view, path = await view_of(built), tmp_path / "disk.raw"
    path.write_bytes(b"precious")
    blob, offset, _ = built.placed[5]
    page = bytearray(await store.read(blob, offset, 512))
    page[400] ^= 1
    await store.put_pages(blob, offset, bytes(page))
    with pytest.raises(CorruptionError, match="segment 5"):
        await write_raw_file(view, view.disks[0], path, replace=True)
    with pytest.raises(CorruptionError, match="segment 5"):
        await write_vhd_blob(view, view.disks[0], store, NAME)
    assert path.read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.raw"]
    with pytest.raises(PermanentError) as caught:
        await store.properties(NAME)
    assert is_missing(caught.value)


async def test_who_is_interrupted_leaves_nothing_behind(
    built: LogBuilder, store: PageBlobStore, tmp_path: Path
) -> None:
    view = await view_of(built)
    disk = view.disks[0]

    def interrupt(done: int, total: int) -> None:
        if done > total // 4:
            task.cancel()

    writing: list[Callable[[], Coroutine[None, None, Written]]] = [
        lambda: write_raw_file(view, disk, tmp_path / "disk.raw", progress=interrupt),
        lambda: write_vhd_file(view, disk, tmp_path / "disk.vhd", progress=interrupt),
        lambda: write_vhd_blob(view, disk, store, NAME, progress=interrupt),
    ]
    for write in writing:
        task = asyncio.create_task(write())
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(tmp_path.iterdir()) == []
    assert await store.list(NAME) == []


async def test_who_is_interrupted_waits_for_the_threads_that_write(built: LogBuilder) -> None:
    """The descriptor that they write to is closed next, and its number may be another file's soon."""
    view = await view_of(built)
    came: list[int] = []
    went: list[int] = []
    entered, released = threading.Event(), threading.Event()

    def write(chunks: Sequence[memoryview], wanted: Sequence[Copies]) -> None:
        came.append(len(chunks))
        entered.set()
        released.wait(60)
        went.append(len(wanted))

    task = asyncio.create_task(view.scatter(view.disks[0], write))
    assert await asyncio.to_thread(entered.wait, 60)
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0.01)
    assert not task.done()
    released.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(came) == len(went)


@pytest.mark.parametrize("place", ["missing/disk.raw", "."])
async def test_a_place_that_takes_no_file_is_refused(built: LogBuilder, tmp_path: Path, place: str) -> None:
    view = await view_of(built)
    with pytest.raises(PermanentError) as caught:
        await write_raw_file(view, view.disks[0], tmp_path / place, replace=True)
    assert str(tmp_path) in caught.value.message


@pytest.mark.needs_root
async def test_a_full_disk_is_an_error_that_names_the_file_and_what_it_needs(built: LogBuilder, tmp_path: Path) -> None:
    view, mount = await view_of(built), tmp_path / "small"
    mount.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount))
    except subprocess.CalledProcessError:
        pytest.skip("no mounting here")
    try:
        with pytest.raises(PermanentError, match="not enough space") as caught:
            await write_raw_file(view, view.disks[0], mount / "disk.raw")
        assert caught.value.fields == {"path": str(mount / "disk.raw"), "size_bytes": DISK}
        assert list(mount.iterdir()) == []
    finally:
        _run("umount", str(mount))


async def test_a_file_beyond_what_may_be_written_is_removed_again(built: LogBuilder, tmp_path: Path) -> None:
    """The kernel's own limit for a file's size stands in for a full disk where nothing can be mounted."""
    view, path = await view_of(built), tmp_path / "disk.raw"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, before[1]))
        with pytest.raises(PermanentError, match="not enough space"):
            await write_raw_file(view, view.disks[0], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def _run(*command: str) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"}
    )
    return done.stdout


@pytest.mark.parametrize(
    ("held", "length", "stretches"),
    [
        ([], 1 << 20, []),
        ([0], 512, [(0, 512)]),
        ([5], 100 * 512, [(0, 100 * 512)]),
        ([0, 3 << 16, 4 << 16], 5 << 16, [(0, 1 << 16), (3 << 16, 5 << 16)]),
        ([0, 2 << 16], 4 << 16, [(0, 3 << 16)]),
        ([(4 << 16) + 511], (4 << 16) + 512, [(4 << 16, (4 << 16) + 512)]),
    ],
)
def test_zeros_inside_of_data_are_found_in_granules(
    held: list[int], length: int, stretches: list[tuple[int, int]]
) -> None:
    data = bytearray(length)
    for place in held:
        data[place] = 1
    assert held_stretches(memoryview(data)) == stretches
