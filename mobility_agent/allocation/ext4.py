"""The free space of an ext2, ext3 or ext4 file system that was unmounted cleanly.

A volume is a row of groups, each with a bitmap of its clusters. A bitmap is believed if the volume says that nothing
is left to be done (no journal to be replayed, no orphans, no errors, not mounted), if all checksums that the volume has
are right, and if it has as many free clusters as its group's descriptor says. Anything else, any feature that this does
not know included, is "not known": one block that is wrongly taken for free is a file lost.

A group that was never used has no bitmap on the disk, only a flag (BLOCK_UNINIT). It is free but for what every group
must have: copies of the superblock and the descriptors, and bitmaps and inode tables, which may be those of other
groups (flex_bg). If that does not give the count in its descriptor, the whole group counts as used.

Source: the kernel's documentation of ext4's data structures.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mobility_agent.allocation.checksums import crc16, crc32c, crc32c_of
from mobility_agent.allocation.source import NotKnownError, Ranges, Window, joined

SUPERBLOCK_OFFSET: Final = 1024
_SUPERBLOCK_BYTES: Final = 1024
_MAGIC: Final = 0xEF53
#: Groups handled at once: 16 MiB of bitmaps in blocks of 4 KiB.
_BATCH: Final = 4096

_RECOVER, _META_BG, _64BIT, _CSUM_SEED = 0x4, 0x10, 0x80, 0x2000
#: filetype, recover (refused by name), meta_bg, extents, 64bit, flex_bg, ea_inode, dirdata, csum_seed, largedir,
#: inline_data, encrypt, casefold.
_KNOWN_INCOMPAT: Final = 0x2 | _RECOVER | _META_BG | 0x40 | _64BIT | 0x200 | 0x400 | 0x1000 | _CSUM_SEED | 0x3C000
_SPARSE_SUPER, _GDT_CSUM, _BIGALLOC, _METADATA_CSUM, _ORPHANS = 0x1, 0x10, 0x200, 0x400, 0x10000
#: The rest: large_file, huge_file, dir_nlink, extra_isize, quota, readonly, project, verity.
_KNOWN_RO: Final = _SPARSE_SUPER | 0x2 | 0x8 | _GDT_CSUM | 0x60 | 0x100 | _BIGALLOC | _METADATA_CSUM | 0xB000
_SPARSE_SUPER2: Final = 0x200  # of the compatible features
_CLEAN, _ERRORS = 1, 2
_BLOCK_UNINIT: Final = 0x2

_DESCRIPTOR: Final = np.dtype(
    {
        "names": ["bitmap", "inode_bitmap", "inode_table", "free", "flags", "bitmap_crc", "crc"],
        "formats": ["<u4", "<u4", "<u4", "<u2", "<u2", "<u2", "<u2"],
        "offsets": [0, 4, 8, 12, 18, 24, 30],
        "itemsize": 32,
    }
)
_DESCRIPTOR_HIGH: Final = np.dtype(
    {
        "names": ["bitmap", "inode_bitmap", "inode_table", "free", "bitmap_crc"],
        "formats": ["<u4", "<u4", "<u4", "<u2", "<u2"],
        "offsets": [0, 4, 8, 12, 24],
        "itemsize": 32,
    }
)


@dataclass(frozen=True, slots=True)
class _Volume:
    block_bytes: int
    cluster_blocks: int
    block_count: int
    first_block: int
    group_blocks: int
    inode_table_blocks: int
    reserved_descriptor_blocks: int
    descriptor_bytes: int
    first_meta_group: int
    compatible: int
    incompatible: int
    read_only: int
    backup_groups: tuple[int, int]
    uuid: bytes
    seed: int

    @property
    def groups(self) -> int:
        return -(-(self.block_count - self.first_block) // self.group_blocks)

    @property
    def group_clusters(self) -> int:
        return self.group_blocks // self.cluster_blocks

    @property
    def descriptors_in_block(self) -> int:
        return self.block_bytes // self.descriptor_bytes

    @property
    def descriptor_blocks(self) -> int:
        return -(-self.groups // self.descriptors_in_block)

    def first_of(self, group: int) -> int:
        return self.first_block + group * self.group_blocks

    def has_superblock(self, group: int) -> bool:
        if group == 0:
            return True
        if self.compatible & _SPARSE_SUPER2:
            return group in self.backup_groups
        if group == 1 or not self.read_only & _SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))


@dataclass(frozen=True, slots=True)
class _Groups:
    """The descriptors of all groups, as columns."""

    bitmap: npt.NDArray[np.int64]
    inode_bitmap: npt.NDArray[np.int64]
    inode_table: npt.NDArray[np.int64]
    free: npt.NDArray[np.int64]
    uninitialised: npt.NDArray[np.bool_]
    bitmap_crc: npt.NDArray[np.uint32]


def is_here(window: Window) -> bool:
    """Whether there is a superblock, sound or not."""
    if window.size_bytes < SUPERBLOCK_OFFSET + _SUPERBLOCK_BYTES:
        return False
    return window.fetch(SUPERBLOCK_OFFSET + 56, 2) == _MAGIC.to_bytes(2, "little")


def free_ranges(window: Window) -> Ranges:
    """The free byte ranges of the volume, from the window's start.

    Raises:
        NotKnownError: they can't be told, or may not be believed.
    """
    volume = _volume(window)
    groups = _groups(window, volume)
    metadata = _metadata(volume, groups)
    parts: list[Ranges] = []
    for begin in range(0, volume.groups, _BATCH):
        end = min(begin + _BATCH, volume.groups)
        used = _used(window, volume, groups, metadata, begin, end)
        edges = np.diff(np.concatenate(([1], used.reshape(-1), [1])).astype(np.int8))
        clusters = np.stack((np.flatnonzero(edges == -1), np.flatnonzero(edges == 1)), axis=1)
        blocks = clusters * volume.cluster_blocks + volume.first_of(begin)
        parts.append(np.minimum(blocks, volume.block_count) * volume.block_bytes)
    return joined(parts)


def _volume(window: Window) -> _Volume:
    raw = window.fetch(SUPERBLOCK_OFFSET, _SUPERBLOCK_BYTES)
    compatible, incompatible, read_only = struct.unpack_from("<III", raw, 0x5C)
    if not _u16(raw, 0x38) == _MAGIC or _u32(raw, 0x4C) > 1:
        raise NotKnownError("it is no ext4 file system that is known here")
    if read_only & _METADATA_CSUM and (raw[0x175] != 1 or crc32c_of(raw[:0x3FC]) != _u32(raw, 0x3FC)):
        raise NotKnownError("the ext4 superblock's checksum is wrong")
    if incompatible & _RECOVER:
        raise NotKnownError("the ext4 journal has to be replayed: the file system is mounted, or was not unmounted")
    if read_only & _ORPHANS or _u32(raw, 0xE8):
        raise NotKnownError("the ext4 file system has orphans: it was not unmounted cleanly")
    if _u16(raw, 0x3A) != _CLEAN:
        raise NotKnownError("the ext4 file system is not marked clean: it is mounted, or has errors")
    if unknown := incompatible & ~_KNOWN_INCOMPAT:
        raise NotKnownError(f"the ext4 file system has features that are not known here (incompatible {unknown:#x})")
    if unknown := read_only & ~_KNOWN_RO:
        raise NotKnownError(f"the ext4 file system has features that are not known here (read-only {unknown:#x})")
    uuid = raw[0x68:0x78]
    volume = _Volume(
        block_bytes=1024 << min(_u32(raw, 0x18), 7),
        cluster_blocks=1 << min(max(_u32(raw, 0x1C) - _u32(raw, 0x18), 0), 20) if read_only & _BIGALLOC else 1,
        block_count=_u32(raw, 4) | (_u32(raw, 0x150) << 32 if incompatible & _64BIT else 0),
        first_block=_u32(raw, 0x14),
        group_blocks=_u32(raw, 0x20),
        inode_table_blocks=_inode_table_blocks(raw),
        reserved_descriptor_blocks=_u16(raw, 0xCE),
        descriptor_bytes=_u16(raw, 0xFE) if incompatible & _64BIT else 32,
        first_meta_group=_u32(raw, 0x104) if incompatible & _META_BG else 1 << 62,
        compatible=compatible,
        incompatible=incompatible,
        read_only=read_only,
        backup_groups=(_u32(raw, 0x24C), _u32(raw, 0x250)),
        uuid=uuid,
        seed=_u32(raw, 0x270) if incompatible & _CSUM_SEED else crc32c_of(uuid),
    )
    _check(volume, raw, window.size_bytes)
    return volume


def _inode_table_blocks(raw: bytes) -> int:
    inode_bytes = _u16(raw, 0x58) if _u32(raw, 0x4C) else 128
    return -(-_u32(raw, 0x28) * inode_bytes // (1024 << min(_u32(raw, 0x18), 7)))


def _check(volume: _Volume, raw: bytes, size_bytes: int) -> None:
    """Refuse what no volume can be like."""
    bits = 8 * volume.block_bytes
    sound = (
        _u32(raw, 0x18) <= 6
        and volume.first_block == (1 if volume.block_bytes == 1024 and not volume.read_only & _BIGALLOC else 0)
        and 0 < volume.group_clusters <= bits
        and volume.group_blocks % (8 * volume.cluster_blocks) == 0
        and volume.group_clusters == (_u32(raw, 0x24) if volume.read_only & _BIGALLOC else volume.group_blocks)
        and volume.block_count > volume.first_block
        and volume.descriptor_bytes in ((64, 128, 256, 512, 1024) if volume.incompatible & _64BIT else (32,))
        and 0 < volume.inode_table_blocks < volume.block_count
    )
    if not sound:
        raise NotKnownError("the ext4 superblock describes no possible volume")
    if volume.block_count * volume.block_bytes > size_bytes:
        raise NotKnownError("the ext4 file system is larger than what holds it: a part of an array, or cut off")


def _groups(window: Window, volume: _Volume) -> _Groups:
    """All descriptors, their checksums verified."""
    size, held = volume.block_bytes, volume.descriptor_blocks
    super_block = SUPERBLOCK_OFFSET // size
    plain = min(held, volume.first_meta_group)
    raw = bytearray(window.fetch((super_block + 1) * size, plain * size))
    for number in range(plain, held):
        group = number * volume.descriptors_in_block
        behind = int(volume.has_superblock(group)) + int(size == 1024 and number == 0 and not volume.first_block)
        raw += window.fetch((volume.first_of(group) + behind) * size, size)
    rows = np.frombuffer(bytes(raw), np.uint8).reshape(-1, volume.descriptor_bytes)[: volume.groups]
    low: npt.NDArray[Any] = np.ascontiguousarray(rows[:, :32]).view(_DESCRIPTOR)[:, 0]
    if volume.descriptor_bytes >= 64:
        high: npt.NDArray[Any] = np.ascontiguousarray(rows[:, 32:64]).view(_DESCRIPTOR_HIGH)[:, 0]
    else:
        high = np.zeros(len(rows), _DESCRIPTOR_HIGH)
    summed = volume.read_only & (_METADATA_CSUM | _GDT_CSUM)
    if summed and not (_descriptor_crcs(volume, rows) == low["crc"]).all():
        raise NotKnownError("the checksum of an ext4 group descriptor is wrong")

    def block(name: str) -> npt.NDArray[np.int64]:
        found = low[name].astype(np.int64) | high[name].astype(np.int64) << 32
        if ((found < volume.first_block) | (found >= volume.block_count)).any():
            raise NotKnownError("an ext4 group descriptor points outside of the volume")
        return found

    uninitialised = (low["flags"] & _BLOCK_UNINIT != 0) if summed else np.zeros(len(rows), bool)
    return _Groups(
        block("bitmap"),
        block("inode_bitmap"),
        block("inode_table"),
        low["free"].astype(np.int64) | high["free"].astype(np.int64) << 16,
        uninitialised,
        low["bitmap_crc"].astype(np.uint32) | high["bitmap_crc"].astype(np.uint32) << np.uint32(16),
    )


def _descriptor_crcs(volume: _Volume, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    numbers = np.arange(len(rows), dtype="<u4").view(np.uint8).reshape(-1, 4)
    if volume.read_only & _METADATA_CSUM:
        without = rows.copy()
        without[:, 30:32] = 0
        return crc32c(without, crc32c(numbers, volume.seed)) & np.uint32(0xFFFF)
    uuid = crc16(np.frombuffer(volume.uuid, np.uint8).reshape(1, -1))[0]
    covered = np.concatenate((rows[:, :30], rows[:, 32:]), axis=1)
    return crc16(covered, crc16(numbers, int(uuid)))


def _metadata(volume: _Volume, groups: _Groups) -> Ranges:
    """The blocks of all bitmaps and inode tables as (begin, end), sorted by their begin."""
    begins = np.concatenate((groups.bitmap, groups.inode_bitmap, groups.inode_table))
    lengths = np.ones(len(begins), np.int64)
    lengths[2 * volume.groups :] = volume.inode_table_blocks
    order = np.argsort(begins)
    return np.stack((begins[order], (begins + lengths)[order]), axis=1)


def _used(
    window: Window, volume: _Volume, groups: _Groups, metadata: Ranges, begin: int, end: int
) -> npt.NDArray[np.uint8]:
    """Ones for the used clusters of some groups; shape (groups, clusters in a group)."""
    count = volume.group_clusters // 8
    maps = np.zeros((end - begin, count), np.uint8)
    for group in range(begin, end):
        if not groups.uninitialised[group]:
            raw = window.fetch(int(groups.bitmap[group]) * volume.block_bytes, count)
            maps[group - begin] = np.frombuffer(raw, np.uint8)
    present = ~groups.uninitialised[begin:end]
    if volume.read_only & _METADATA_CSUM and present.any():
        mask = np.uint32(0xFFFFFFFF if volume.descriptor_bytes >= 64 else 0xFFFF)
        if (crc32c(maps[present], volume.seed) & mask != groups.bitmap_crc[begin:end][present] & mask).any():
            raise NotKnownError("the checksum of an ext4 block bitmap is wrong")
    used = np.unpackbits(maps, axis=1, bitorder="little")
    for group in np.flatnonzero(groups.uninitialised[begin:end]).tolist():
        _put_metadata(volume, metadata, begin + group, used[group])
    if end == volume.groups:
        short = -(-(volume.block_count - volume.first_of(end - 1)) // volume.cluster_blocks)
        used[-1, short:] = 1
    wrong = (used == 0).sum(axis=1) != groups.free[begin:end]
    if (wrong & present).any():
        raise NotKnownError("an ext4 block bitmap does not have as many free blocks as its group")
    used[wrong] = 1
    return used


def _put_metadata(volume: _Volume, metadata: Ranges, group: int, used: npt.NDArray[np.uint8]) -> None:
    """Set what a group without a bitmap has to have."""
    first, size = volume.first_of(group), volume.cluster_blocks
    taken: list[tuple[int, int]] = []
    if volume.incompatible & _META_BG and group >= volume.first_meta_group * volume.descriptors_in_block:
        place = group % volume.descriptors_in_block
        has_descriptors = place in (0, 1, volume.descriptors_in_block - 1)
        taken.append((0, int(volume.has_superblock(group)) + int(has_descriptors)))
    elif volume.has_superblock(group):
        plain = min(volume.descriptor_blocks, volume.first_meta_group)
        taken.append((0, 1 + plain + volume.reserved_descriptor_blocks))
    # The longest extent is an inode table, so one that begins before may reach in.
    low = np.searchsorted(metadata[:, 0], first - volume.inode_table_blocks)
    high = np.searchsorted(metadata[:, 0], first + volume.group_blocks)
    taken += [(max(start - first, 0), stop - first) for start, stop in metadata[low:high].tolist() if stop > first]
    for start, stop in taken:
        used[start // size : -(-stop // size)] = 1


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _u16(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 2], "little")


def _u32(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 4], "little")
