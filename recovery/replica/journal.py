"""What a warm replica's blobs hold, in a small page blob beside them.

    slot 0, 64 KiB | slot 1, 64 KiB

Records go into the slots in turn, each with a number that rises, so a torn one costs that one and no more; the sound
one with the highest number counts. Either the blobs hold a point (APPLIED), or they are on the way from one to another
(APPLYING): then they hold neither, and what lies between the two has to be written again, up to that point or a later
one. `base` 0 means that nothing of what they hold is known.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import xxhash

from replicar.errors import CorruptionError, LimitError
from replicar.formats.fields import Fields
from replicar.formats.record import Disk, DiskAction
from replicar.log.index import read_start, start_fields
from replicar.log.reader import Start

SLOT_BYTES: Final = 64 << 10
BLOB_BYTES: Final = 2 * SLOT_BYTES
_MAGIC: Final = b"RPREPLJ\x01"
#: magic, number, length of the body, reserved; then the checksum of these and the body
_HEAD: Final = struct.Struct("<8sQI4x")
_CHECKSUM: Final = struct.Struct("<Q")
HEAD_BYTES: Final = _HEAD.size + _CHECKSUM.size


class Phase(Enum):
    APPLIED = "applied"
    APPLYING = "applying"


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """See the module.

    `sequence` and `time_ns` are the point that is held, or the one on the way to which the blobs are; `base` is the one
    that they held before that. `start`: a place in the log that is not behind what they held. `disks`: the point's.
    `filled`: the blobs were made anew for this point (`base` is 0), and hold it up to that byte of each disk, by its
    index; `start` then is a place that is not behind the point. None: nothing of that kind.
    """

    phase: Phase
    base: int
    sequence: int
    time_ns: int
    start: Start
    disks: tuple[Disk, ...]
    filled: Mapping[int, int] | None = None


def pack_record(record: ReplicaRecord, number: int) -> bytes:
    """A slot's bytes.

    Raises:
        LimitError: the record is too long for one.
    """
    fields = {
        "phase": record.phase.value,
        "base": record.base,
        "sequence": record.sequence,
        "time_ns": record.time_ns,
        "tail": start_fields(record.start),
        "disks": [[disk.index, disk.name, disk.size_bytes] for disk in record.disks],
        "filled": sorted(record.filled.items()) if record.filled is not None else None,
    }
    body = json.dumps(fields).encode()
    if HEAD_BYTES + len(body) > SLOT_BYTES:
        raise LimitError("the machine has too many disks for a warm replica's journal", hint="shorter names help")
    head = _HEAD.pack(_MAGIC, number, len(body))
    checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head + body))
    return (head + checksum + body).ljust(-(-(HEAD_BYTES + len(body)) // 512) * 512, b"\0")


def read_record(data: bytes) -> tuple[int, ReplicaRecord] | None:
    """A slot's number and record; None for one that was never written, or is torn.

    Raises:
        CorruptionError: it is sound and says what no writer says.
    """
    magic, number, length = _HEAD.unpack_from(data)
    body = data[HEAD_BYTES : HEAD_BYTES + length]
    checksum = _CHECKSUM.unpack_from(data, _HEAD.size)[0]
    if magic != _MAGIC or len(body) < length or checksum != xxhash.xxh3_64_intdigest(data[: _HEAD.size] + body):
        return None
    fields = Fields(body, "a warm replica's journal")
    start = read_start(fields)
    try:
        phase = Phase(fields.text("phase"))
        disks = tuple(
            Disk(int(index), str(name), int(size), DiskAction.PRESENT)
            for index, name, size in json.loads(body)["disks"]
        )
        told = json.loads(body).get("filled")
        filled = {int(index): int(count) for index, count in told} if told is not None else None
    except (ValueError, TypeError, KeyError):
        raise CorruptionError("a warm replica's journal says what it can't") from None
    if start is None:
        raise CorruptionError("a warm replica's journal does not say where the log goes on")
    places = (fields.integer("base"), fields.integer("sequence"), fields.integer("time_ns"))
    if filled is not None and filled.keys() != {disk.index for disk in disks}:
        raise CorruptionError("a warm replica's journal tells of disks that are not its own")
    return number, ReplicaRecord(phase, *places, start, disks, filled)


def newest(data: bytes) -> tuple[int, ReplicaRecord | None]:
    """Of a journal's bytes, the record that counts and its number; (0, None) if there is none."""
    slots = [read_record(data[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
    found = [slot for slot in slots if slot is not None]
    return max(found, key=lambda slot: slot[0]) if found else (0, None)
