"""The free space of an XFS file system, version 4 or 5, that was unmounted cleanly.

Each allocation group has a B+tree of its free extents by block. The log is read as the kernel does it before it mounts:
its head is where the cycle number of the blocks changes, and the volume is clean if the last record before it is the
one that an unmount leaves. Anything else may hold changes that are not in place yet, and is "not known". All blocks
have their checksums (version 5), and the extents of a tree must add up to what the group says it has.

The few blocks a group keeps ready for its trees (AGFL) are in no tree, and so count as used.

Source: XFS Algorithms & Data Structures.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent.allocation.checksums import crc32c_of
from mobility_agent.allocation.source import NotKnownError, Ranges, Window, joined

_MAGIC: Final = b"XFSB"
_NEEDS_REPAIR: Final = 0x10
#: ftype, sparse inodes, metadata uuid, bigtime, needs repair (refused by name), large counters, exchange, parent.
_KNOWN_INCOMPAT: Final = 0xFF
_BASIC_BLOCK: Final = 512
_LOG_MAGIC: Final = 0xFEEDBABE
_UNMOUNT: Final = 0x20
_HEADER_COVERS: Final = 32 << 10  # bytes of a log record that one header block describes
_MAX_LOG_BYTES: Final = 2 << 30
_LOG_PIECE_BYTES: Final = 32 << 20
_MAX_GROUPS: Final = 1 << 20
_MAX_LEVELS: Final = 9


@dataclass(frozen=True, slots=True)
class _Volume:
    block_bytes: int
    sector_bytes: int
    block_count: int
    groups: int
    group_blocks: int
    log_start: int  # bytes
    log_bytes: int
    has_checksums: bool


def is_here(window: Window) -> bool:
    """Whether there is a superblock, sound or not."""
    return window.size_bytes >= _BASIC_BLOCK and window.fetch(0, 4) == _MAGIC


def free_ranges(window: Window) -> Ranges:
    """The free byte ranges of the volume, from the window's start.

    Raises:
        NotKnownError: they can't be told, or may not be believed.
    """
    volume = _volume(window)
    _check_log(window, volume)
    return joined([_group(window, volume, group) for group in range(volume.groups)])


def _volume(window: Window) -> _Volume:
    raw = window.fetch(0, _BASIC_BLOCK)
    (block_bytes,), (block_count,), (log_block,) = (
        struct.unpack_from(f">{kind}", raw, at) for kind, at in (("I", 4), ("Q", 8), ("Q", 48))
    )
    group_blocks, groups, _, log_blocks, version, sector_bytes = struct.unpack_from(">IIIIHH", raw, 84)
    group_shift, in_progress = raw[124], raw[126]
    if block_bytes not in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) or not 512 <= sector_bytes <= block_bytes:
        raise NotKnownError("the XFS superblock describes no possible volume")
    has_checksums = version & 0xF == 5
    if version & 0xF not in (4, 5) or in_progress:
        raise NotKnownError("the XFS file system has a version that is not known here, or is not finished")
    if has_checksums:
        _check_crc(window.fetch(0, sector_bytes), 224, "superblock")
        incompatible, log_incompatible = struct.unpack_from(">II", raw, 216)
        if incompatible & _NEEDS_REPAIR or incompatible & ~_KNOWN_INCOMPAT or log_incompatible:
            raise NotKnownError("the XFS file system needs a repair, or has features that are not known here")
    if not log_block:
        raise NotKnownError("the XFS log is on another device")
    number, inside = log_block >> group_shift, log_block & ((1 << group_shift) - 1)
    log_start, log_bytes = (number * group_blocks + inside) * block_bytes, log_blocks * block_bytes
    if not (
        0 < groups <= _MAX_GROUPS
        and 0 < group_blocks <= 1 << group_shift
        and (groups - 1) * group_blocks < block_count <= groups * group_blocks
        and 0 < log_bytes <= _MAX_LOG_BYTES
    ):
        raise NotKnownError("the XFS superblock describes no possible volume")
    if block_count * block_bytes > window.size_bytes:
        raise NotKnownError("the XFS file system is larger than what holds it: a part of an array, or cut off")
    return _Volume(block_bytes, sector_bytes, block_count, groups, group_blocks, log_start, log_bytes, has_checksums)


def _check_log(window: Window, volume: _Volume) -> None:
    """Refuse a log that does not end with an unmount's record."""
    dirty = NotKnownError("the XFS log has to be replayed: the file system is mounted, or was not unmounted")
    cycles, is_header = _cycles(window, volume)
    behind = np.flatnonzero(cycles != cycles[0])
    head = int(behind[0]) if behind.size else len(cycles)
    if not cycles[0] or (behind.size and not (cycles[head:] == cycles[0] - 1).all()):
        raise dirty  # never written, or torn
    headers = np.flatnonzero(is_header[:head])
    if not headers.size:
        raise dirty
    at = int(headers[-1])
    header = window.fetch(volume.log_start + at * _BASIC_BLOCK, _BASIC_BLOCK)
    _, _, version, length = struct.unpack_from(">IIII", header)
    (operations,), (size,) = struct.unpack_from(">I", header, 40), struct.unpack_from(">I", header, 320)
    # Only records of version 2 may be described by more than one block.
    blocks = max(-(-size // _HEADER_COVERS), 1) if version & 2 else 1
    if operations != 1 or at + blocks + -(-length // _BASIC_BLOCK) != head or length < 12:
        raise dirty
    operation = window.fetch(volume.log_start + (at + blocks) * _BASIC_BLOCK, 12)
    if not operation[9] & _UNMOUNT:
        raise dirty


def _cycles(window: Window, volume: _Volume) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The cycle of each basic block of the log, and whether a record begins there."""
    cycles, headers = [], []
    for at in range(0, volume.log_bytes, _LOG_PIECE_BYTES):
        raw = window.fetch(volume.log_start + at, min(_LOG_PIECE_BYTES, volume.log_bytes - at))
        words = np.frombuffer(raw, ">u4").reshape(-1, _BASIC_BLOCK // 4)[:, :2].astype(np.int64)
        is_header = words[:, 0] == _LOG_MAGIC
        cycles.append(np.where(is_header, words[:, 1], words[:, 0]))
        headers.append(is_header)
    return np.concatenate(cycles), np.concatenate(headers)


def _group(window: Window, volume: _Volume, group: int) -> Ranges:
    """The free ranges of one allocation group."""
    base = group * volume.group_blocks
    blocks = min(volume.group_blocks, volume.block_count - base)
    raw = window.fetch(base * volume.block_bytes + volume.sector_bytes, volume.sector_bytes)
    magic, version, number, length, root = struct.unpack_from(">4sIIII", raw)
    (levels,), (free,) = struct.unpack_from(">I", raw, 28), struct.unpack_from(">I", raw, 52)
    if magic != b"XAGF" or version != 1 or number != group or length != blocks or not 0 < levels <= _MAX_LEVELS:
        raise NotKnownError(f"the header of the XFS allocation group {group} is not sound")
    if volume.has_checksums:
        _check_crc(raw, 216, f"allocation group {group}")
    found = joined(_leaves(window, volume, group, root, levels, blocks))
    if int((found[:, 1] - found[:, 0]).sum()) != free or (len(found) and found[-1, 1] > blocks):
        raise NotKnownError(f"the free extents of the XFS allocation group {group} don't add up")
    return (found + base) * volume.block_bytes


def _leaves(window: Window, volume: _Volume, group: int, root: int, levels: int, blocks: int) -> list[Ranges]:
    """The records of a tree as ranges of blocks, level after level from its root; no block is read twice."""
    row, seen = [root], {root}
    for level in range(levels - 1, -1, -1):
        leaves: list[Ranges] = []
        below: list[int] = []
        for place in row:
            if not 0 < place < blocks:
                raise NotKnownError("a free space tree of XFS points outside of its group")
            records, raw = _block(window, volume, group, place, level)
            head = 56 if volume.has_checksums else 16
            if level:
                most = (volume.block_bytes - head) // 12
                below += np.frombuffer(raw, ">u4", records, head + most * 8).tolist() if records <= most else [0]
                continue
            if records > (volume.block_bytes - head) // 8:
                raise NotKnownError("a block of a free space tree of XFS is not sound")
            extents = np.frombuffer(raw, ">u4", records * 2, head).reshape(-1, 2).astype(np.int64)
            leaves.append(np.stack((extents[:, 0], extents[:, 0] + extents[:, 1]), axis=1))
        if not level:
            return leaves
        if len(set(below)) != len(below) or seen.intersection(below) or len(seen) + len(below) > blocks:
            raise NotKnownError("a free space tree of XFS is no tree")
        seen.update(below)
        row = below
    raise AssertionError("a tree has a level")


def _block(window: Window, volume: _Volume, group: int, place: int, level: int) -> tuple[int, bytes]:
    """A block of a tree, and how many records it has."""
    raw = window.fetch((group * volume.group_blocks + place) * volume.block_bytes, volume.block_bytes)
    magic, found_level, records = struct.unpack_from(">4sHH", raw)
    if magic != (b"AB3B" if volume.has_checksums else b"ABTB") or found_level != level:
        raise NotKnownError("a block of a free space tree of XFS is not sound")
    if volume.has_checksums:
        _check_crc(raw, 52, "free space tree")
        if struct.unpack_from(">I", raw, 48)[0] != group:
            raise NotKnownError("a block of a free space tree of XFS is another group's")
    return records, raw


def _check_crc(raw: bytes, at: int, what: str) -> None:
    if crc32c_of(raw[:at] + bytes(4) + raw[at + 4 :]) ^ 0xFFFFFFFF != int.from_bytes(raw[at : at + 4], "little"):
        raise NotKnownError(f"the checksum of an XFS {what} is wrong")
