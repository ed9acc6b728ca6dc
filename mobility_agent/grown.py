"""The header of a disk's map, and whether a map is of the same disk before it grew.

All maps of a disk (regions, touched, digests) begin alike: a magic number, the disk's size, the size of what one entry
stands for, and the XXH3-64 of these. A map whose header says a smaller disk is taken over; the header is rewritten only
after what was added is in order, so a process that dies in between does it again.
"""

from __future__ import annotations

import struct

import xxhash


def header(layout: struct.Struct, magic: bytes, disk_bytes: int, unit_bytes: int) -> bytes:
    """The header of a map of a disk of this size."""
    body = layout.pack(magic, disk_bytes, unit_bytes)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def size_before(layout: struct.Struct, magic: bytes, found: bytes, disk_bytes: int, unit_bytes: int) -> int | None:
    """The size of the smaller disk that `found` is the header of; None if it is no such header."""
    if len(found) < layout.size + 8:
        return None
    named, size, unit = layout.unpack_from(found)
    if named != magic or unit != unit_bytes or not 0 < size < disk_bytes:
        return None
    return int(size) if found == header(layout, magic, size, unit_bytes) else None
