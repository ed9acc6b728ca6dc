"""Where segments lie: a machine's log is runs, a run is one writer's page blobs (stripes), a blob is segments in a row.

    machines/<machine id>/log/<epoch>-<run>-<stripe>.rlog
    blob:  header 512 | segment | segment | ... | zeros

A *run* begins whenever somebody starts to write: a process server that starts, takes over, or finds its blobs full. A
position in a blob is written once and never again with other bytes, so a Put Page that timed out and lands late does no
harm; whoever has to write differently begins a new run. Run r, beginning with segment number F, replaces whatever older
runs hold from F on. Readers take runs in order of (epoch, run) and stop an older one where the next begins.

A run may have several stripes, since Azure allows 60 MiB/s and 500 requests/s a blob; a segment goes to whichever has
budget. Within a stripe numbers rise; over all stripes of the runs they have no hole: the log ends at the first missing
number. Stripe 0 exists first, others when they are needed.
"""

from __future__ import annotations

import re
import struct
import uuid
from dataclasses import dataclass
from typing import Final

import xxhash

from replicar.errors import CorruptionError
from replicar.formats.frame import Buffer

MAGIC: Final = b"RPLGBLB\x01"
VERSION: Final = 1
HEADER_BYTES: Final = 512
MAX_STRIPES: Final = 64
#: A writer has fewer segments than this under way, so a reader that misses one and finds a number this much higher
#: knows that it is looking at damage, not at the end.
MAX_UNDER_WAY: Final = 64
#: AES key wrap (RFC 3394) of 32 bytes.
WRAPPED_KEY_BYTES: Final = 40

_HEADER = struct.Struct("<8sII16sIIIIQQ32sQ40sQ")
_NAME = re.compile(
    r"machines/(?P<machine>[0-9a-f-]{36})/log/(?P<epoch>[0-9a-f]{8})-(?P<run>[0-9a-f]{8})-(?P<stripe>[0-9a-f]{2})\.rlog"
)


@dataclass(frozen=True, slots=True, order=True)
class BlobName:
    """The place of a log blob, sortable in reading order."""

    machine_id: uuid.UUID
    epoch: int
    run: int
    stripe: int

    def __str__(self) -> str:
        return f"{log_prefix(self.machine_id)}{self.epoch:08x}-{self.run:08x}-{self.stripe:02x}.rlog"


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """The first 512 bytes of a log blob. Not secret, not authentic by itself: segments are."""

    name: BlobName
    first_number: int  # of the run's first segment
    first_sequence: int  # of that segment
    previous: bytes  # digest of the segment before it
    key_id: int
    wrapped_key: bytes  # the machine's data key, wrapped by the vault's
    created_ns: int

    def pack(self) -> bytes:
        body = _HEADER.pack(
            *(MAGIC, VERSION, HEADER_BYTES, self.name.machine_id.bytes, self.name.epoch, self.name.run),
            *(self.name.stripe, 0, self.first_number, self.first_sequence, self.previous),
            *(self.key_id, self.wrapped_key, self.created_ns),
        )
        return (body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))).ljust(HEADER_BYTES, b"\0")


def log_prefix(machine_id: uuid.UUID) -> str:
    """What the names of a machine's log blobs begin with."""
    return f"machines/{machine_id}/log/"


def read_name(text: str) -> BlobName | None:
    """The place that a blob's name says; None for a blob that is no part of a log, however alike its name."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    try:
        machine = uuid.UUID(match["machine"])
    except ValueError:
        return None
    name = BlobName(machine, int(match["epoch"], 16), int(match["run"], 16), int(match["stripe"], 16))
    return name if str(name) == text and name.stripe < MAX_STRIPES else None


def read_header(data: Buffer) -> BlobHeader | None:
    """Decode a log blob's first 512 bytes.

    Returns:
        None for a blob that was made and not written yet (its writer died in between).

    Raises:
        CorruptionError: when it is no log blob of this version.
    """
    if len(data) < HEADER_BYTES:
        raise CorruptionError(f"a log blob of {len(data)} bytes has no header")
    raw = bytes(data[:HEADER_BYTES])
    if not any(raw):
        return None
    (magic, version, size, machine, epoch, run, stripe, _, number, sequence, previous, key_id, wrapped, created) = (
        _HEADER.unpack_from(raw)
    )
    if magic != MAGIC:
        raise CorruptionError("this is no log blob")
    if struct.unpack_from("<Q", raw, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(raw[: _HEADER.size]):
        raise CorruptionError("the log blob's header fails its checksum")
    if version != VERSION or size != HEADER_BYTES:
        raise CorruptionError(f"log blob version {version} is not known here", hint="upgrade this part")
    if stripe >= MAX_STRIPES or number == 0 or sequence == 0:
        raise CorruptionError(f"the log blob claims stripe {stripe}, segment {number} and sequence {sequence}")
    name = BlobName(uuid.UUID(bytes=machine), epoch, run, stripe)
    return BlobHeader(name, number, sequence, previous, key_id, wrapped, created)
