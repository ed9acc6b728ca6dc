"""Partition tables: where the volumes of a disk are, by MBR with its logical partitions, or by GPT.

A table is believed as a whole or not at all: a partition outside of the disk, two that overlap, a wrong checksum or a
chain of logical partitions that does not end make the disk one whose volumes are not known. It needn't be exact about
what a partition is for: each volume has to prove itself, and what lies in none is in use.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, TypeAlias

from mobility_agent.allocation.source import NotKnownError, Window

#: A volume: (offset, length) in bytes.
Span: TypeAlias = tuple[int, int]

_SECTOR: Final = 512
_SIGNATURE: Final = b"\x55\xaa"
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = (0x05, 0x0F, 0x85)
#: Logical partitions of one disk; the kernel takes 255 partitions in all.
MAX_LOGICAL: Final = 256
MAX_GPT_ENTRIES: Final = 4096
_GPT: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_SECTORS: Final = (512, 4096)


def partitions(window: Window) -> list[Span]:
    """The partitions, rising; none if there is no table.

    Raises:
        NotKnownError: there is a table that can't be believed.
    """
    if window.size_bytes < 2 * _SECTOR:
        return []
    entries = _entries(window.fetch(0, _SECTOR))
    found = _gpt(window) if any(kind == _PROTECTIVE for kind, _, _ in entries) else _mbr(window, entries)
    found.sort()
    end = 0
    for offset, length in found:
        if offset < end:
            raise NotKnownError("two partitions overlap")
        end = offset + length
    if end > window.size_bytes:
        raise NotKnownError("a partition ends behind the disk")
    return found


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """The four entries of a boot sector that are in use: (type, first sector, sectors)."""
    if sector[510:512] != _SIGNATURE:
        return []
    found = []
    for at in range(446, 510, 16):
        status, kind = sector[at], sector[at + 4]
        first, count = struct.unpack_from("<II", sector, at + 8)
        if status & 0x7F:
            return []  # the code of a boot sector without a table
        if kind and count:
            found.append((kind, first, count))
    return found


def _mbr(window: Window, entries: list[tuple[int, int, int]]) -> list[Span]:
    found: list[Span] = []
    for kind, first, count in entries:
        if not first:
            raise NotKnownError("a partition begins at the partition table")
        if kind in _EXTENDED:
            found += _logical(window, first)
        else:
            found.append((first * _SECTOR, count * _SECTOR))
    return found


def _logical(window: Window, extended: int) -> list[Span]:
    found: list[Span] = []
    at = extended
    for _ in range(MAX_LOGICAL):
        behind = 0
        for kind, first, count in _entries(window.fetch(at * _SECTOR, _SECTOR)):
            if kind in _EXTENDED:
                behind = behind or first
            else:
                found.append(((at + first) * _SECTOR, count * _SECTOR))
        if not behind:
            return found
        at = extended + behind
    raise NotKnownError("the chain of logical partitions does not end")


def _gpt(window: Window) -> list[Span]:
    for sector in _GPT_SECTORS:
        if window.size_bytes >= 2 * sector and window.fetch(sector, 8) == b"EFI PART":
            return _gpt_entries(window, sector)
    raise NotKnownError("there should be a GPT, and there is none")


def _gpt_entries(window: Window, sector: int) -> list[Span]:
    raw = window.fetch(sector, sector)
    _, _, size, crc, _, here, _, first_usable, last_usable, _, table, count, entry_bytes, table_crc = _GPT.unpack_from(
        raw
    )
    if not _GPT.size <= size <= sector or zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != crc or here != 1:
        raise NotKnownError("the GPT's checksum is wrong")
    if not 0 < count <= MAX_GPT_ENTRIES or entry_bytes not in (128, 256, 512):
        raise NotKnownError("the GPT describes no possible table")
    entries = window.fetch(table * sector, count * entry_bytes)
    if zlib.crc32(entries) != table_crc:
        raise NotKnownError("the checksum of the GPT's entries is wrong")
    found = []
    for at in range(0, len(entries), entry_bytes):
        if not any(entries[at : at + 16]):
            continue
        first, last = struct.unpack_from("<QQ", entries, at + 32)
        if not first_usable <= first <= last <= last_usable:
            raise NotKnownError("a partition of the GPT lies where none can be")
        found.append((first * sector, (last + 1 - first) * sector))
    return found
