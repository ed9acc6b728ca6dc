"""A fixed VHD: the disk's bytes, then a footer of 512 bytes; the one image format that Azure imports.

Azure wants the virtual size to be a whole number of MiB, so a disk that is not is filled up with zeros. The footer is
big-endian, as Microsoft's Virtual Hard Disk Image Format Specification 1.0 lays it out.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final

from replicar.errors import CorruptionError, LimitError
from replicar.formats.frame import Buffer

FOOTER_BYTES: Final = 512
COOKIE: Final = b"conectix"
#: The specification counts seconds from 2000-01-01T00:00:00Z.
VHD_EPOCH_SECONDS: Final = 946_684_800
MIB: Final = 1 << 20
#: A managed disk has at most 32,767 GiB.
MAX_VIRTUAL_BYTES: Final = 32_767 << 30

_FEATURES_RESERVED = 0x00000002  # "must always be set to 1"
_FORMAT_VERSION = 0x00010000
_NO_DATA_OFFSET = 0xFFFFFFFFFFFFFFFF
_TYPE_FIXED = 2
#: The creator's name decides how large QEMU takes the disk to be: for names it does not know it believes the geometry,
#: which is rounded down, and cuts the disk's end off; for Hyper-V's it believes the size.
_CREATOR = b"win "
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
assert _FOOTER.size == FOOTER_BYTES


@dataclass(frozen=True, slots=True)
class Footer:
    """What a fixed VHD's footer says."""

    virtual_bytes: int
    unique_id: uuid.UUID
    created_seconds: int  # since 1970
    geometry: tuple[int, int, int]  # cylinders, heads, sectors per track


def virtual_bytes(disk_bytes: int) -> int:
    """The virtual size of the VHD of a disk: whole MiB.

    Raises:
        LimitError: when Azure could not hold the disk.
    """
    size = (disk_bytes + MIB - 1) // MIB * MIB
    if not 0 < size <= MAX_VIRTUAL_BYTES:
        raise LimitError(
            f"a disk of {disk_bytes} bytes can't be a managed disk", hint="1 MiB to 32,767 GiB is the range"
        )
    return size


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors for a size in bytes, by the algorithm in the specification's appendix."""
    total = min(size // 512, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        sectors, heads = 255, 16
        tracks = total // sectors
    else:
        sectors = 17
        tracks = total // sectors
        heads = max((tracks + 1023) // 1024, 4)
        if tracks >= heads * 1024 or heads > 16:
            sectors, heads = 31, 16
            tracks = total // sectors
        if tracks >= heads * 1024:
            sectors, heads = 63, 16
            tracks = total // sectors
    return tracks // heads, heads, sectors


def pack_footer(size: int, unique_id: uuid.UUID, created_seconds: int) -> bytes:
    """The footer of a fixed VHD with a virtual size of `size` bytes (whole MiB)."""
    if size % MIB or not 0 < size <= MAX_VIRTUAL_BYTES:
        raise LimitError(f"a virtual size of {size} bytes is no whole number of MiB within Azure's limits")
    stamp = min(max(created_seconds - VHD_EPOCH_SECONDS, 0), 0xFFFFFFFF)  # it has 32 bits, until 2136
    fields = (
        *(COOKIE, _FEATURES_RESERVED, _FORMAT_VERSION, _NO_DATA_OFFSET, stamp, _CREATOR, 0x00010000, b"Wi2k"),
        *(size, size, *geometry(size), _TYPE_FIXED),
    )
    bare = _FOOTER.pack(*fields, 0, unique_id.bytes, 0)
    return _FOOTER.pack(*fields, _checksum(bare), unique_id.bytes, 0)


def read_footer(data: Buffer) -> Footer:
    """Decode and verify a footer.

    Raises:
        CorruptionError: when it is none of a fixed VHD, or fails its checksum.
    """
    if len(data) != FOOTER_BYTES:
        raise CorruptionError(f"a VHD footer has {FOOTER_BYTES} bytes, not {len(data)}")
    raw = bytes(data)
    (cookie, _, version, _, stamp, _, _, _, _, size, *shape, kind, checksum, unique, _) = _FOOTER.unpack(raw)
    if cookie != COOKIE or version != _FORMAT_VERSION:
        raise CorruptionError("this is no VHD footer")
    if checksum != _checksum(raw[:64] + bytes(4) + raw[68:]):
        raise CorruptionError("the VHD footer fails its checksum")
    if size > MAX_VIRTUAL_BYTES or size % 512:
        raise CorruptionError(f"the VHD footer claims a disk of {size} bytes")
    if kind != _TYPE_FIXED:
        raise CorruptionError(f"a VHD of type {kind}; only fixed ones (2) can be imported")
    cylinders, heads, sectors = shape
    return Footer(size, uuid.UUID(bytes=unique), stamp + VHD_EPOCH_SECONDS, (cylinders, heads, sectors))


def _checksum(footer: bytes) -> int:
    """One's complement of the sum of all bytes, the checksum itself taken as zero."""
    return ~sum(footer) & 0xFFFFFFFF
