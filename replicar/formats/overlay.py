"""The overlay of an export: what was written over one disk of one point, in one sparse file.

    header 4096 | durable bitmap | volatile bitmap | the disk's bytes, as far as they were written

A bit says of a sector that it is the overlay's; all other sectors are those of the point. Bits are in sectors, so no
write ever has to be completed with what the point holds.

There are two bitmaps because a bit must not be on the medium before its sector is. The *durable* one is written at a
flush, after the data. The *volatile* one is written with every write and is believed only by the same boot of the same
operating system, which is what the *session* sector names: so what a killed export had acknowledged is still there, and
after a power cut each sector is what it was at the last flush, or newer.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final

import xxhash

from replicar.errors import CorruptionError
from replicar.formats.frame import MAX_DISK_BYTES, SECTOR_BYTES, Buffer

MAGIC: Final = b"RPOVRLY\x01"
SESSION_MAGIC: Final = b"RPOVSES\x01"
VERSION: Final = 1
HEADER_BYTES: Final = 4096
#: What is described of the header, and where the session is within it.
FIELDS_BYTES: Final = 1024
SESSION_OFFSET: Final = 2048
SESSION_BYTES: Final = 64
MAX_NAME_BYTES: Final = 920
#: Bitmaps are written, and aligned, in pages of so many bytes: each stands for 16 MiB of the disk.
PAGE_BYTES: Final = 4096

_FIELDS: Final = struct.Struct("<8sII16sQQQIIQQQ8x920s")
_CHECKSUM: Final = struct.Struct("<Q")
_SESSION: Final = struct.Struct("<8s16s32x")
assert _FIELDS.size + _CHECKSUM.size == FIELDS_BYTES
assert _SESSION.size + _CHECKSUM.size == SESSION_BYTES


@dataclass(frozen=True, slots=True)
class Base:
    """What an overlay lies over: a disk of a machine, after a sequence."""

    machine_id: uuid.UUID
    sequence: int
    time_ns: int
    disk: int
    disk_name: str
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class OverlayHeader:
    """An overlay's header; the places in the file follow from the disk's size."""

    base: Base
    created_ns: int

    @property
    def bitmap_bytes(self) -> int:
        sectors = (self.base.disk_bytes + SECTOR_BYTES - 1) // SECTOR_BYTES
        return ((sectors + 7) // 8 + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES

    @property
    def durable_offset(self) -> int:
        return HEADER_BYTES

    @property
    def volatile_offset(self) -> int:
        return HEADER_BYTES + self.bitmap_bytes

    @property
    def data_offset(self) -> int:
        return HEADER_BYTES + 2 * self.bitmap_bytes

    def pack(self) -> bytes:
        """The header's 4,096 bytes, without a session.

        Raises:
            ValueError: the disk's name is too long.
        """
        base, name = self.base, self.base.disk_name.encode()
        if len(name) > MAX_NAME_BYTES:
            raise ValueError(f"a disk's name of {len(name)} bytes")
        fields = _FIELDS.pack(
            *(MAGIC, VERSION, HEADER_BYTES, base.machine_id.bytes, base.sequence, base.time_ns, base.disk_bytes),
            *(base.disk, len(name), self.bitmap_bytes, self.data_offset, self.created_ns, name),
        )
        return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(HEADER_BYTES, b"\0")


def read_header(data: Buffer) -> OverlayHeader:
    """Decode and verify an overlay's header.

    Raises:
        CorruptionError: it is none, or fails its checksum, or is of a version that is not known.
    """
    raw = bytes(data[:FIELDS_BYTES])
    if len(raw) < FIELDS_BYTES or raw[:8] != MAGIC:
        raise CorruptionError("this is no overlay")
    fields = raw[: _FIELDS.size]
    if _CHECKSUM.unpack_from(raw, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(fields):
        raise CorruptionError("the overlay's header fails its checksum")
    (_, version, header_bytes, machine, *numbers, name) = _FIELDS.unpack(fields)
    sequence, time_ns, disk_bytes, disk, name_bytes, bitmap_bytes, data_offset, created_ns = numbers
    if version != VERSION or header_bytes != HEADER_BYTES:
        raise CorruptionError(f"an overlay of version {version}; only {VERSION} is known")
    if not 0 < disk_bytes <= MAX_DISK_BYTES or name_bytes > MAX_NAME_BYTES:
        raise CorruptionError("the overlay's header has sizes out of range")
    try:
        text = name[:name_bytes].decode()
    except UnicodeDecodeError:
        raise CorruptionError("the overlay's header names its disk by no text") from None
    base = Base(uuid.UUID(bytes=machine), sequence, time_ns, disk, text, disk_bytes)
    header = OverlayHeader(base, created_ns)
    if (header.bitmap_bytes, header.data_offset) != (bitmap_bytes, data_offset):
        raise CorruptionError("the overlay's header has sizes that don't add up")
    return header


def pack_session(boot_id: uuid.UUID | None) -> bytes:
    """The session of a running export; None: of one that was closed in good order."""
    if boot_id is None:
        return bytes(SESSION_BYTES)
    fields = _SESSION.pack(SESSION_MAGIC, boot_id.bytes)
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def read_session(data: Buffer) -> uuid.UUID | None:
    """Whose volatile bitmap is to be believed; None: nobody's (which a torn session is, too)."""
    raw = bytes(data[:SESSION_BYTES])
    if len(raw) < SESSION_BYTES:
        return None
    fields = raw[: _SESSION.size]
    magic, boot = _SESSION.unpack(fields)
    if magic != SESSION_MAGIC or _CHECKSUM.unpack_from(raw, _SESSION.size)[0] != xxhash.xxh3_64_intdigest(fields):
        return None
    return uuid.UUID(bytes=boot)
