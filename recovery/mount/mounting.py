"""A disk of a view, mounted at a directory to be read: file, loop device and mount, and all of them away again.

A disk that was in use has a file system with a journal that was not played. Without playing it files may be missing or
old, so by default the file system may write: to an overlay that is thrown away. The mount itself is read-only.

The loop device is told to go with its mount. So if the process dies, unmounting the directory leaves nothing but the
file's own mount, which `unmount` takes away too.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recovery.export.disk import ServedDisk
from recovery.mount.front import DiskFile
from recovery.mount.tools import run
from recovery.mount.volumes import Volume, choose, volumes
from replicar.errors import PermanentError
from replicar.fuse import mount as fuse

#: How often it is looked whether the mount is still there.
LOOK_SECONDS: Final = 0.3
#: A mount's process notices within moments that it is gone; after this it is taken for dead.
LEAVING_SECONDS: Final = 10.0
_MOUNTS: Final = Path("/proc/self/mountinfo")
_SYSTEM_LOOPS: Final = Path("/sys/block")
#: So that the journal is left alone; `nouuid` lets XFS be mounted beside its original.
_UNPLAYED: Final = {"ext2": "noload", "ext3": "noload", "ext4": "noload", "xfs": "norecovery", "btrfs": "nologreplay"}


@dataclass(frozen=True, slots=True)
class Mounted:
    """What is mounted where."""

    directory: Path
    volume: Volume

    @property
    def is_there(self) -> bool:
        return _source(self.directory) is not None

    async def until_gone(self) -> None:
        """Return when somebody has unmounted it."""
        await _until(lambda: not self.is_there)

    async def unmount(self, *, lazily: bool = False) -> None:
        """Unmount it.

        Raises:
            PermanentError: somebody uses it.
        """
        await _unmount(self.directory, lazily=lazily)


def check(directory: Path) -> None:
    """Whether a disk can be mounted here at all.

    Raises:
        PermanentError: it can't be, and why.
    """
    if os.geteuid() != 0 or not fuse.DEVICE.exists():
        why = "mounting takes root" if os.geteuid() != 0 else f"there is no {fuse.DEVICE} here"
        raise PermanentError(
            f"nothing can be mounted at {directory}: {why}",
            hint="`replicar export` serves the disk without root: QEMU, nbdcopy or guestfish can open it there",
        )
    if not directory.is_dir() or any(directory.iterdir()):
        raise PermanentError(f"{directory} is no empty directory", hint="make one, or choose another")


@asynccontextmanager
async def mounted(
    disk: ServedDisk, directory: Path, *, partition: int | None = None, play_journal: bool = True
) -> AsyncIterator[Mounted]:
    """The disk's file system at `directory`, while the block lasts.

    At its end it is unmounted, from those who still use it, too.

    Raises:
        PermanentError: it can't be mounted.
    """
    check(directory)
    shown = Path(tempfile.mkdtemp(prefix="replicar-mount-"))
    file = DiskFile(disk, shown, time_ns=time.time_ns())
    try:
        file.open()
    except BaseException:
        await asyncio.to_thread(shown.rmdir)
        raise
    try:
        volume = choose(await volumes(file.path, disk.size_bytes), partition, disk.name)
        await _mount(file.path, volume, directory, play_journal=play_journal and disk.is_writable)
        made = Mounted(directory, volume)
        try:
            yield made
        finally:
            if made.is_there:
                await made.unmount(lazily=True)
    finally:
        await file.aclose()


async def unmount(directory: Path) -> None:
    """Unmount what another process has mounted by `mounted`, or had before it died; nothing of it is left then.

    Raises:
        PermanentError: nothing is mounted there, or not by us; or somebody uses it.
    """
    source = _source(directory)
    if source is None:
        raise PermanentError(f"nothing is mounted at {directory}", hint="look at `findmnt`", path=str(directory))
    shown = _shown_by(source)
    if shown is None:
        raise PermanentError(
            f"what is mounted at {directory} is not of `replicar mount`", hint="use umount", path=str(directory)
        )
    await _unmount(directory)
    try:
        async with asyncio.timeout(LEAVING_SECONDS):
            await _until(lambda: not fuse.is_mounted(shown) or _is_dead(shown))
    except TimeoutError:
        pass  # alive, and does not notice: it is stopped, perhaps
    if fuse.is_mounted(shown):
        await asyncio.to_thread(_take_away, shown)


def _is_dead(shown: Path) -> bool:
    """Whether nobody answers for a file system any more."""
    try:
        shown.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def _take_away(shown: Path) -> None:
    fuse.unmount(shown, lazily=True)
    shown.rmdir()


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - it is the kernel's doing, and nobody sets an event
        await asyncio.sleep(LOOK_SECONDS)


async def _mount(file: Path, volume: Volume, directory: Path, *, play_journal: bool) -> None:
    place = ("--offset", str(volume.offset), "--sizelimit", str(volume.length))
    mode = () if play_journal else ("--read-only",)
    loop = (await run("losetup", "--find", "--show", *place, *mode, str(file))).strip()
    options = ["ro", "nosuid", "nodev"]
    if volume.kind == "xfs":
        options.append("nouuid")
    if not play_journal and volume.kind in _UNPLAYED:
        options.append(_UNPLAYED[volume.kind])
    try:
        await run("mount", "-t", volume.kind, "-o", ",".join(options), loop, str(directory))
    finally:
        await run("losetup", "--detach", loop)  # of a mounted one: it goes when the mount does


async def _unmount(directory: Path, *, lazily: bool = False) -> None:
    try:
        await run("umount", *(("--lazy",) if lazily else ()), str(directory))
    except PermanentError as error:
        if _source(directory) is None:
            return
        raise PermanentError(
            f"{directory} can't be unmounted: {error.message}",
            hint=f"end what uses it; `fuser -vm {directory}` shows who does",
            path=str(directory),
        ) from None


def _source(directory: Path) -> str | None:
    """The device that is mounted at a directory."""
    path = str(directory.absolute()).replace("\\", "\\134").replace(" ", "\\040")
    for line in reversed(_MOUNTS.read_text().splitlines()):
        left, _, right = line.partition(" - ")
        if left.split()[4] == path:
            return right.split()[1]
    return None


def _shown_by(device: str) -> Path | None:
    """The directory of the file behind a loop device, if that is one of ours."""
    backing = _SYSTEM_LOOPS / Path(device).name / "loop" / "backing_file"
    try:
        shown = Path(backing.read_text().strip()).parent
    except OSError:
        return None
    return shown if fuse.is_mounted(shown) else None
