"""Single files are taken out of a point by mounting it; nothing is left of the mount, whatever ends it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from recovery.export.disk import ServedDisk, base_of
from recovery.export.overlay import Overlay
from recovery.mount.mounting import mounted, unmount
from recovery.mount.volumes import Volume, choose
from recovery.points import Latest, locate
from recovery.view import View
from replicar.errors import PermanentError
from replicar.formats import segment
from replicar.storage import MemoryStore
from tests.recovery.log_builder import LogBuilder
from tests.support.tools import need

MIB = 1 << 20
root = pytest.mark.needs_root
CONTENT = random.Random(3).randbytes(700_000)


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, timeout=60, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def file_system(image: Path, kind: str, offset: int = 0, size: int = 0) -> Iterator[Path]:
    """A new file system in an image, mounted to be filled."""
    where = image.with_name("filling")
    where.mkdir(exist_ok=True)
    place = ("-o", str(offset), "--sizelimit", str(size)) if size else ()
    loop = run("losetup", "-f", "--show", *place, image).strip()
    try:
        run(need(f"mkfs.{kind}"), "-q", *(("-F",) if kind == "ext4" else ()), loop)
        run("mount", loop, where)
        try:
            yield where
        finally:
            run("umount", where)
    finally:
        run("losetup", "-d", loop)


async def view_of(image: Path) -> View:
    """A machine whose one disk holds what the image does."""
    store = MemoryStore()
    await store.ensure_container()
    builder = LogBuilder(store, model=False, chunk_bytes=segment.DEFAULT_CHUNK_BYTES, blob_bytes=128 * MIB)
    data = image.read_bytes()
    builder.begin(len(data))
    await builder.seal()
    for offset in range(0, len(data), MIB // 2):
        piece = data[offset : offset + MIB // 2]
        if any(piece):
            builder.write(0, offset, piece)
            await builder.seal()
    return View(builder.log, await locate(builder.log, Latest()))


@asynccontextmanager
async def served(image: Path, scratch: Path, *, writable: bool = True) -> AsyncIterator[ServedDisk]:
    view = await view_of(image)
    over = Overlay.thrown_away(scratch, base_of(view, view.disks[0])) if writable else None
    disk = ServedDisk(view, view.disks[0], over)
    yield disk
    await disk.aclose()


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks are shown within the test's own directory, so that what is left can be told from others'."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def left(directory: Path) -> list[str]:
    """Whatever of a mount is still there."""
    mounts, loops = Path("/proc/self/mountinfo").read_text(), run("losetup", "-a")
    shown = [path.name for path in directory.glob("replicar-mount-*")]
    return [line for line in (mounts + loops).splitlines() if str(directory) in line] + shown


def torn_image(directory: Path, kind: str, size: int) -> Path:
    """A file system as a crash leaves it: its last files are in the journal only."""
    live, image = directory / "live.img", directory / "disk.img"
    with live.open("wb") as file:
        file.truncate(size)
    with file_system(live, kind) as where:
        (where / "first").write_bytes(CONTENT)
        run("sync", "-f", where)
        (where / "in-journal").write_bytes(CONTENT[::-1])
        descriptor = os.open(where / "in-journal", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        run("sync", live)
        image.write_bytes(live.read_bytes())  # while it is mounted: the journal is not played
    return image


@root
@pytest.mark.parametrize(("kind", "size"), [("ext4", 32 * MIB), ("xfs", 320 * MIB)])
async def test_files_are_there_that_only_the_journal_has(tmp_path: Path, kind: str, size: int) -> None:
    need(f"mkfs.{kind}")
    image = await asyncio.to_thread(torn_image, tmp_path, kind, size)
    where = tmp_path / "mounted"
    where.mkdir()
    async with served(image, tmp_path) as disk, mounted(disk, where) as made:
        assert (made.volume.partition, made.volume.kind) == (0, kind)
        assert await asyncio.to_thread((where / "first").read_bytes) == CONTENT
        assert await asyncio.to_thread((where / "in-journal").read_bytes) == CONTENT[::-1]
        with pytest.raises(OSError, match="Read-only"):
            await asyncio.to_thread((where / "new").touch)
    assert left(tmp_path) == []


@root
async def test_without_its_journal_it_is_mounted_from_what_can_not_be_written(tmp_path: Path) -> None:
    image = await asyncio.to_thread(torn_image, tmp_path, "ext4", 32 * MIB)
    where = tmp_path / "mounted"
    where.mkdir()
    async with served(image, tmp_path, writable=False) as disk, mounted(disk, where, play_journal=False):
        assert await asyncio.to_thread((where / "first").read_bytes) == CONTENT
    assert left(tmp_path) == []


def partitioned(image: Path) -> None:
    """Two file systems and something else, by GPT."""
    with image.open("wb") as file:
        file.truncate(80 * MIB)
    table = "label: gpt\nstart=2048, size=32768\nstart=34816, size=8192\nstart=43008, size=65536\n"
    subprocess.run([need("sfdisk"), "-q", str(image)], input=table.encode(), timeout=60, check=True)
    for name, start, sectors in (("one", 2048, 32768), ("three", 43008, 65536)):
        with file_system(image, "ext4", start * 512, sectors * 512) as where:
            (where / name).write_bytes(CONTENT)


@root
async def test_a_partition_is_chosen_by_its_number(tmp_path: Path) -> None:
    need("sfdisk")
    await asyncio.to_thread(partitioned, tmp_path / "disk.img")
    where = tmp_path / "mounted"
    where.mkdir()
    async with served(tmp_path / "disk.img", tmp_path) as disk:
        with pytest.raises(PermanentError, match="there are 2 file systems") as caught:
            async with mounted(disk, where):
                pass
        assert "partition 3 (ext4, 32 MiB)" in caught.value.hint
        with pytest.raises(PermanentError, match=r"partition 2 .* is no file system"):
            async with mounted(disk, where, partition=2):
                pass
        for partition, name in ((1, "one"), (3, "three")):
            async with mounted(disk, where, partition=partition):
                assert await asyncio.to_thread((where / name).read_bytes) == CONTENT
            assert left(tmp_path) == []


@root
async def test_it_ends_when_somebody_unmounts_it(tmp_path: Path) -> None:
    image = await asyncio.to_thread(torn_image, tmp_path, "ext4", 32 * MIB)
    where = tmp_path / "mounted"
    where.mkdir()
    async with served(image, tmp_path) as disk, mounted(disk, where) as made:
        holder = await asyncio.create_subprocess_exec("sleep", "60", cwd=where)
        with pytest.raises(PermanentError, match="can't be unmounted"):
            await made.unmount()
        holder.kill()
        await holder.wait()
        await made.unmount()
        async with asyncio.timeout(30):
            await made.until_gone()
    assert left(tmp_path) == []


_KILLABLE = """
import asyncio, sys
from pathlib import Path
from recovery.mount.mounting import mounted
from tests.recovery.mount.test_mounting import served
async def main(image, where):
    async with served(image, image.parent) as disk, mounted(disk, where):
        print("mounted", flush=True)
        await asyncio.Event().wait()
asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@root
async def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    image = await asyncio.to_thread(torn_image, tmp_path, "ext4", 32 * MIB)
    where = tmp_path / "mounted"
    where.mkdir()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _KILLABLE, str(image), str(where)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"mounted\n"
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert left(tmp_path) != []
    await unmount(where)
    assert left(tmp_path) == []


@root
async def test_only_what_is_ours_is_unmounted(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="nothing is mounted"):
        await unmount(tmp_path)
    with pytest.raises(PermanentError, match=r"not of `replicar mount`"):
        await unmount(Path("/proc"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    async with served(tmp_path / "disk.img", tmp_path) as disk:
        with pytest.raises(PermanentError, match="no empty directory"):
            async with mounted(disk, tmp_path / "full"):
                pass
        (tmp_path / "empty").mkdir()
        with pytest.raises(PermanentError, match="no file system"):
            async with mounted(disk, tmp_path / "empty"):
                pass
    assert left(tmp_path) == []


def test_which_volume_is_meant() -> None:
    boot, swap, data = Volume(1, 1, 1, "vfat", True), Volume(2, 2, 1, "swap", False), Volume(3, 3, 1, "xfs", True)
    assert choose([swap, data], None, "root") is data
    assert choose([boot, swap, data], 1, "root") is boot
    for found, partition in (([boot, data], None), ([swap], None), ([boot], 7), ([swap], 2)):
        with pytest.raises(PermanentError) as caught:
            choose(found, partition, "root")
        assert caught.value.hint
