"""The free space of a whole disk: its partitions, the file system in each, and the reason wherever nothing is known.

What is not known to be free is in use. A volume counts only if it looks like one file system and nothing else: a stale
superblock under a newer format would say "free" of somebody's data, so a second signature makes a volume unknown, and
so does a disk that has both a partition table and a file system of its own.

A file system is asked while nobody can change it, and only its own words about blocks count: what it has left free it
will not read before it writes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mobility_agent.allocation import ext4, ntfs, xfs
from mobility_agent.allocation.partitions import partitions
from mobility_agent.allocation.source import NotKnownError, Ranges, Read, Window, joined

#: Where other formats have their signatures: (offset, bytes, name).
_OTHERS: Final = (
    (0, b"LUKS\xba\xbe", "LUKS"),
    (3, b"EXFAT   ", "exFAT"),
    (3, b"-FVE-FS-", "BitLocker"),
    (54, b"FAT1", "FAT"),
    (82, b"FAT32", "FAT"),
    (0, b"hsqs", "SquashFS"),
    (0, b"LABELONE", "LVM"),
    (512, b"LABELONE", "LVM"),
    (1024, b"LABELONE", "LVM"),
    (1536, b"LABELONE", "LVM"),
    (4086, b"SWAPSPACE2", "swap"),
    (4086, b"SWAP-SPACE", "swap"),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (65600, b"_BHRfS_M", "Btrfs"),
    (32769, b"CD001", "ISO 9660"),
)
_IS_HERE: Final = {"ext4": ext4.is_here, "XFS": xfs.is_here, "NTFS": ntfs.is_here}
_FREE_RANGES: Final[dict[str, Callable[[Window], Ranges]]] = {
    "ext4": ext4.free_ranges,
    "XFS": xfs.free_ranges,
    "NTFS": ntfs.free_ranges,
}


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """What is free, in bytes of the disk, and what is not known of which volume."""

    ranges: Ranges
    reasons: tuple[str, ...]

    @property
    def byte_count(self) -> int:
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())


def free_space(read: Read, size_bytes: int) -> FreeSpace:
    """Ask all file systems of a disk that nobody changes meanwhile.

    Args:
        read: reads the disk.
    """
    whole = Window(read, 0, size_bytes)
    try:
        spans = partitions(whole)
        if spans and (found := _formats(whole)):
            raise NotKnownError(f"there is a partition table and {found[0]} at one place")
    except NotKnownError as error:
        return FreeSpace(joined([]), (f"the disk: {error.message}",))
    parts, reasons = [], []
    for offset, length in spans or [(0, size_bytes)]:
        try:
            parts.append(_free(Window(read, offset, length)) + offset)
        except NotKnownError as error:
            reasons.append(f"{f'the volume at {offset}' if spans else 'the disk'}: {error.message}")
    return FreeSpace(joined(parts), tuple(reasons))


def _formats(window: Window) -> list[str]:
    found = [name for name, is_here in _IS_HERE.items() if is_here(window)]
    for offset, signature, name in _OTHERS:
        if offset + len(signature) <= window.size_bytes and window.fetch(offset, len(signature)) == signature:
            found.append(name)
    return found


def _free(window: Window) -> Ranges:
    found = _formats(window)
    if len(found) != 1:
        raise NotKnownError(f"it looks like {' and '.join(found)} at once" if found else "it has no file system known")
    if found[0] not in _FREE_RANGES:
        raise NotKnownError(f"it has {found[0]}, of which free space is not asked for")
    return _FREE_RANGES[found[0]](window)
