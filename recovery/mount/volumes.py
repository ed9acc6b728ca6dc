"""What can be mounted of a disk: file systems in its partitions, or on the disk as a whole.

Partition tables and file systems are told by util-linux (`partx`, `blkid`), which know far more of them than anybody
else does, and read a few sectors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recovery.mount.tools import run
from replicar.errors import PermanentError
from replicar.formats.frame import SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition (0: the whole disk) and what is in it, as `blkid` names it ("" if it knows nothing)."""

    partition: int
    offset: int
    length: int
    kind: str
    is_file_system: bool

    def __str__(self) -> str:
        where = f"partition {self.partition}" if self.partition else "the whole disk"
        return f"{where} ({self.kind or 'nothing known'}, {self.length / (1 << 20):.0f} MiB)"


async def volumes(disk: Path, size_bytes: int) -> list[Volume]:
    """The volumes of a disk, in the order of its table."""
    table = await run("partx", "-g", "-b", "-o", "NR,START,SECTORS", str(disk), statuses=(0, 1))
    found = []
    for line in table.splitlines():
        number, start, sectors = (int(word) for word in line.split())
        offset = start * SECTOR_BYTES
        # What an extended partition has of its own is the table of those within it.
        if sectors > 2 and offset < size_bytes:
            found.append(await _volume(disk, number, offset, min(sectors * SECTOR_BYTES, size_bytes - offset)))
    return found or [await _volume(disk, 0, 0, size_bytes)]


async def _volume(disk: Path, partition: int, offset: int, length: int) -> Volume:
    place = ("-O", str(offset), "-S", str(length))
    said = await run("blkid", "-p", "-o", "export", *place, str(disk), statuses=(0, 2))
    values = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    return Volume(partition, offset, length, values.get("TYPE", ""), values.get("USAGE") == "filesystem")


def choose(found: Sequence[Volume], partition: int | None, disk: str) -> Volume:
    """The volume to mount: the one that was asked for, or the only one that can be.

    Raises:
        PermanentError: there is none of that number, it is no file system, or nobody said which of several.
    """
    there = "; ".join(map(str, found))
    if partition is not None:
        for volume in found:
            if volume.partition == partition:
                if volume.is_file_system:
                    return volume
                raise PermanentError(f"{volume} of disk {disk} is no file system", hint=_other_ways(there), disk=disk)
        raise PermanentError(f"disk {disk} has no partition {partition}", hint=f"there is {there}", disk=disk)
    mountable = [volume for volume in found if volume.is_file_system]
    if len(mountable) == 1:
        return mountable[0]
    if not mountable:
        raise PermanentError(f"there is no file system on disk {disk}", hint=_other_ways(there), disk=disk)
    raise PermanentError(
        f"there are {len(mountable)} file systems on disk {disk}", hint=f"say --partition: {there}", disk=disk
    )


def _other_ways(there: str) -> str:
    return f"there is {there}; for LVM, RAID and encryption use `replicar export`, and their own tools over it"
