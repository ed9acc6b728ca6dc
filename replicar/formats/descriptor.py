"""A descriptor: 32 bytes that say what happened to a range of a disk, and where in the payload its bytes are.

Frames carry tables of them, segments carry them again for recovery. They are handled as numpy views of those bytes, a
table at a time; what a sane agent can have written is checked for a whole table in one pass, and only when that fails
is it found out which rule is broken. Short tables of writes, which most are, are checked in plain Python: for these few
rows numpy takes longer to be called than to do its work.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from replicar.errors import CorruptionError

Buffer: TypeAlias = bytes | bytearray | memoryview
Table: TypeAlias = npt.NDArray[Any]  # of DESCRIPTOR

DESCRIPTOR_BYTES: Final = 32
SECTOR_BYTES: Final = 512
#: Disks end at or below this (4 EiB), so that offset + length never wraps, signed or unsigned.
MAX_DISK_BYTES: Final = 1 << 62
#: Times end below this, so that they fit signed integers.
MAX_TIME_NS: Final = 1 << 63

PACK_DESCRIPTOR: Final = struct.Struct("<QQQIHBB")

DESCRIPTOR: Final = np.dtype(
    [
        ("offset", "<u8"),  # bytes from the disk's start
        ("length", "<u8"),  # bytes on the disk; for MARK, GAP and DISK, bytes of the record in the payload
        ("time_ns", "<u8"),  # wall clock of the capture, never falling within a stream
        ("place", "<u4"),  # where the bytes begin in the payload
        ("disk", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
    ]
)
assert DESCRIPTOR.itemsize == PACK_DESCRIPTOR.size == DESCRIPTOR_BYTES


class Kind(IntEnum):
    """What a descriptor says happened."""

    WRITE = 1  # `length` bytes at `offset` became payload[place : place + length]
    ZERO = 2  # they became zeros (trim, write-zeroes); no payload
    DIRTY = 3  # they changed; the content follows later as a WRITE with Flag.SEED
    MARK = 4  # a named recovery point: everything before it, nothing after
    AUDIT = 5  # the source's bytes there had this XXH3-128 (16 bytes of payload, big-endian) at this sequence
    GAP = 6  # order is not known from here (GAP_BEGIN) until GAP_END
    DISK = 7  # a disk was added, resized or removed


class Flag(IntFlag):
    """Qualities of a descriptor."""

    NONE = 0
    SEED = 0x01  # WRITE or ZERO copied from the disk in the background, not captured as it happened
    GAP_BEGIN = 0x10
    GAP_END = 0x20


#: Bytes that a descriptor of this kind takes of the payload: its `length`, nothing, or a fixed number.
_RECORD_KINDS: Final = (Kind.MARK, Kind.GAP, Kind.DISK)
AUDIT_DIGEST_BYTES: Final = 16
#: Rows up to which a loop beats some twenty calls of numpy: as many as a frame of 4 KiB writes holds. Measured alone
#: they are even at 100; between two frames' TLS and compression, which leave nothing of numpy in the processor's
#: caches, its calls took a quarter of the event loop's Python, and the loop takes a twentieth.
_SHORT_TABLE: Final = 272
_WRITE: Final = int(Kind.WRITE)
_UNALIGNED_SECTOR: Final = SECTOR_BYTES - 1
#: A descriptor without what no rule is about: disk and flags.
_WRITES: Final = struct.Struct("<QQQI2xBx")
assert _WRITES.size == DESCRIPTOR_BYTES
MAX_RECORD_BYTES: Final = 4096


def table_view(data: Buffer) -> Table:
    """Descriptors as a read-only numpy view (shape (n,), dtype DESCRIPTOR) of bytes."""
    view = np.frombuffer(data, dtype=DESCRIPTOR)
    view.flags.writeable = False
    return view


def describe(
    kind: Kind, *, disk: int = 0, offset: int = 0, length: int = 0, time_ns: int = 0, place: int = 0, flags: int = 0
) -> bytes:
    """One descriptor as its 32 bytes. For single records; the hot path packs into its table directly."""
    return PACK_DESCRIPTOR.pack(offset, length, time_ns, place, disk, kind, flags)


def begins_anew(table: Table) -> bool:
    """Whether a frame with this table may follow although numbers are left out: it says GAP before anything happens.

    DISK records may come before the gap; they change nothing.
    """
    others = np.flatnonzero(table["kind"] != Kind.DISK)
    if not others.size:
        return False
    first = table[int(others[0])]
    return bool(first["kind"] == Kind.GAP and first["flags"] & Flag.GAP_BEGIN)


def check_table(data: Buffer, payload_bytes: int, *, sequence: int = 0) -> None:
    """Verify that a table, given as its bytes, is one that a sane agent can have written.

    Raises:
        CorruptionError: naming the first rule that is broken.
    """
    if len(data) <= _SHORT_TABLE * DESCRIPTOR_BYTES and _are_sane_writes(data, payload_bytes):
        return
    table = table_view(data)
    if not _is_sane(table, payload_bytes):
        _name_broken_rule(table, payload_bytes, sequence)


def _are_sane_writes(data: Buffer, payload_bytes: int) -> bool:
    """All rules at once, for a short table; False also for one that is sane and holds more than writes."""
    before_ns = 0
    for offset, length, time_ns, place, kind in _WRITES.iter_unpack(data):
        if (
            kind != _WRITE
            or not 0 < length <= payload_bytes - place
            or (offset | length) & _UNALIGNED_SECTOR
            or offset + length > MAX_DISK_BYTES
            or time_ns < before_ns
        ):
            return False
        before_ns = time_ns
    return before_ns < MAX_TIME_NS


def _is_sane(table: Table, payload_bytes: int) -> bool:
    """All rules at once, on the hot path: a quarter of the time that it takes to tell which one is broken."""
    kind, length, offset, time_ns = table["kind"], table["length"], table["offset"], table["time_ns"]
    taken = (length & _TAKES_LENGTH[kind]) + _TAKES_FIXED[kind]
    broken = (length - _ONE) >= _LONGEST[kind]  # a length of zero wraps, an unknown kind allows none
    broken |= ((offset | length) & _UNALIGNED[kind]) != 0
    broken |= (offset > MAX_DISK_BYTES) | (offset + length > MAX_DISK_BYTES)
    broken |= table["place"] + taken > payload_bytes
    broken[1:] |= time_ns[1:] < time_ns[:-1]
    return not broken.any() and int(time_ns[-1]) < MAX_TIME_NS


def _by_kind(values: dict[Kind, int]) -> npt.NDArray[np.uint64]:
    """A rule as a table that is indexed by the kind's byte; zero for kinds that are not named."""
    rule = np.zeros(256, dtype=np.uint64)
    for kind, value in values.items():
        rule[kind] = value
    return rule


_CONTENT_KINDS: Final = (Kind.WRITE, Kind.ZERO, Kind.DIRTY, Kind.AUDIT)
_ONE: Final = np.uint64(1)
_LONGEST: Final = _by_kind(
    dict.fromkeys(_CONTENT_KINDS, MAX_DISK_BYTES) | dict.fromkeys(_RECORD_KINDS, MAX_RECORD_BYTES)
)
_UNALIGNED: Final = _by_kind(dict.fromkeys(_CONTENT_KINDS, SECTOR_BYTES - 1))
_TAKES_LENGTH: Final = _by_kind(dict.fromkeys((Kind.WRITE, *_RECORD_KINDS), (1 << 64) - 1))
_TAKES_FIXED: Final = _by_kind({Kind.AUDIT: AUDIT_DIGEST_BYTES})


def _name_broken_rule(table: Table, payload_bytes: int, sequence: int) -> None:
    kind, length, offset = table["kind"], table["length"], table["offset"]
    content = (kind == Kind.WRITE) | (kind == Kind.ZERO) | (kind == Kind.DIRTY) | (kind == Kind.AUDIT)
    record = (kind == Kind.MARK) | (kind == Kind.GAP) | (kind == Kind.DISK)
    _require(bool(np.all(content | record)), "a descriptor of unknown kind", sequence)
    _require(bool(np.all((length > 0) & (length <= MAX_DISK_BYTES))), "a descriptor of impossible length", sequence)
    _require(bool(np.all(offset <= MAX_DISK_BYTES)), "a descriptor beyond any disk's end", sequence)
    unaligned = content & (((offset | length) & np.uint64(SECTOR_BYTES - 1)) != 0)
    _require(not np.any(unaligned), f"an offset or length that is no multiple of {SECTOR_BYTES}", sequence)
    _require(bool(np.all(offset + length <= MAX_DISK_BYTES)), "a descriptor beyond any disk's end", sequence)
    _require(not np.any(record & (length > MAX_RECORD_BYTES)), "a record longer than 4096 bytes", sequence)
    _require(
        bool(np.all(payload_ends(table) <= payload_bytes)), "a descriptor that points outside its payload", sequence
    )
    time_ns = table["time_ns"]
    _require(bool(np.all(time_ns < MAX_TIME_NS)), "a time beyond the year 2262", sequence)
    _require(bool(np.all(time_ns[1:] >= time_ns[:-1])), "time that falls", sequence)
    raise AssertionError("the two checks of a table disagree")


def payload_ends(table: Table) -> npt.NDArray[np.uint64]:
    """For every descriptor, where its bytes in the payload end (uint64, shape (n,)); its place, if it has none.

    Lengths must have been checked: the sum wraps where they are impossible.
    """
    kind = table["kind"]
    taken = np.where(kind == Kind.AUDIT, np.uint64(AUDIT_DIGEST_BYTES), table["length"])
    taken = np.where((kind == Kind.ZERO) | (kind == Kind.DIRTY), np.uint64(0), taken)
    ends: npt.NDArray[np.uint64] = table["place"].astype(np.uint64) + taken
    return ends


def _require(held: bool, broken: str, sequence: int) -> None:
    if not held:
        raise CorruptionError(f"the frame at sequence {sequence} has {broken}", sequence=sequence)
