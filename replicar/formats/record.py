"""What the records of a stream carry in their payload: marks, gaps and disks, as small JSON objects.

They are rare and meant to be extended: a reader ignores fields it does not know, so that an older part understands a
newer one. WRITE, ZERO, DIRTY and AUDIT descriptors carry no record.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, TypeAlias, TypeVar

from replicar.errors import CorruptionError, LimitError
from replicar.formats import fields
from replicar.formats.fields import Fields, is_text
from replicar.formats.frame import MAX_DISK_BYTES, MAX_RECORD_BYTES, Buffer

#: Descriptors have 16 bits for it.
MAX_DISK_INDEX: Final = (1 << 16) - 1

_Choice = TypeVar("_Choice", bound=StrEnum)


class Consistency(StrEnum):
    """What a mark promises beyond its place in the stream."""

    CRASH = "crash"  # as after a power cut: what every prefix of an ordered stream is
    APPLICATION = "application"  # the user's scripts had the applications settle first
    GROUP = "group"  # one of several machines' marks with the same id


class DiskAction(StrEnum):
    PRESENT = "present"  # the disk is part of the machine, with this size (said again whenever a log begins)
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Mark:
    """A named recovery point. `mark_id` is the command that asked for it, so that asking twice makes one mark."""

    name: str
    consistency: Consistency = Consistency.CRASH
    mark_id: str = ""


@dataclass(frozen=True, slots=True)
class Gap:
    """Why order was lost (GAP_BEGIN) or that it is whole again (GAP_END)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the machine: its index in descriptors, the operator's name for it, its size in bytes."""

    index: int
    name: str
    size_bytes: int
    action: DiskAction = DiskAction.PRESENT


#: What a record carries.
Item: TypeAlias = Mark | Gap | Disk


def pack_record(record: Mark | Gap | Disk) -> bytes:
    """The record as its payload bytes.

    Raises:
        LimitError: it would be longer than a record may be, or holds a size or text that no reader takes.
    """
    values = asdict(record)
    if not all(is_text(value) for value in values.values() if isinstance(value, str)):
        raise LimitError("a record with text that can't be encoded", hint="use a name of whole Unicode characters")
    if isinstance(record, Disk) and not (
        0 <= record.index <= MAX_DISK_INDEX and 0 <= record.size_bytes <= MAX_DISK_BYTES
    ):
        raise LimitError(f"disk {record.index} of {record.size_bytes} bytes can't be described", disk=record.name)
    data = fields.pack(values)
    if len(data) > MAX_RECORD_BYTES:
        raise LimitError(f"a record of {len(data)} bytes; {MAX_RECORD_BYTES} is the limit", hint="use a shorter name")
    return data


def read_mark(data: Buffer) -> Mark:
    """Decode a MARK's payload. Raises CorruptionError when it is none, as the other readers here do."""
    found = Fields(data, "a MARK record")
    consistency = _choice(Consistency, found.text("consistency"))
    return Mark(found.text("name"), consistency, found.text("mark_id", ""))


def read_gap(data: Buffer) -> Gap:
    """Decode a GAP's payload."""
    return Gap(Fields(data, "a GAP record").text("reason"))


def read_disk(data: Buffer) -> Disk:
    """Decode a DISK's payload."""
    found = Fields(data, "a DISK record")
    index, size = found.integer("index", MAX_DISK_INDEX), found.integer("size_bytes", MAX_DISK_BYTES)
    return Disk(index, found.text("name"), size, _choice(DiskAction, found.text("action")))


def _choice(kind: type[_Choice], value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        raise CorruptionError(f"a record whose {kind.__name__} is {value[:40]!r}, which is not known here") from None
