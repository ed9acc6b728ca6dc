"""An index blob: sealed sections in a page blob, written once, that say where in a log the bytes of a disk are.

    header 512 | section | section | ... | root section | zeros

Three kinds share this frame: a *tier* (the extents that some segments changed), a *checkpoint* (a machine at one
sequence: which tiers, laid over each other, make its disks) and a *fold* (from where on the log is whole, and which
checkpoints are kept of what was before). What they hold is documented in docs/formats.md; here is how it is sealed.

Every blob has a key of its own, from the machine's data key, 32 random bytes and what the header says of its kind and
range; nonces are places, as in segments (see `cipher`), so a section can't be mistaken for another of this blob or of
any other. The root section is bound to the whole header. The header is written last: a blob whose writer died has
none, and is as good as not there.

Each header carries the data key wrapped by the vault's key, as log blobs do: of a folded log no other may be left. That
field alone is outside of the seal, so another wrapped form of the same key may take its place when the vault's key
changes. (In version 1, which is still read, it was under the seal, and stays as it is.)

Weak: nothing says how many index blobs there should be. Whoever deletes the newest fold brings an older one back; what
was cleared since then is missed when it is read, and said to be.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import xxhash
import zstandard
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replicar.errors import CorruptionError, LimitError
from replicar.formats import cipher, fields
from replicar.formats.cipher import DIGEST_BYTES, KEY_BYTES, SALT_BYTES, TAG_BYTES
from replicar.formats.fields import Fields
from replicar.formats.frame import Buffer
from replicar.formats.logblob import WRAPPED_KEY_BYTES

__all__ = ["DIGEST_BYTES", "KEY_BYTES", "SALT_BYTES", "TAG_BYTES", "BlobKind", "IndexHeader", "IndexName", "Root"]

MAGIC: Final = b"RPINDEX\x01"
VERSION: Final = 2
#: Of which the root's seal covers all of the header.
_WHOLLY_SEALED: Final = 1
HEADER_BYTES: Final = 512
ALIGNMENT: Final = 512
#: A section before compression.
MAX_SECTION_BYTES: Final = 4 << 20
#: A root before compression: the page lists of a disk of 10^9 extents, or the names of 100,000 points.
MAX_ROOT_BYTES: Final = 32 << 20
MAX_SECTIONS: Final = 1 << 20

_HEADER = struct.Struct("<8sII16sIIQQQIIQ32s40sQ")
_POSITION = struct.Struct("<8s16sIIQQ")
_BOUND = struct.Struct("<III")
_LABEL = b"replicar index v1"
_JSON_BYTES = struct.Struct("<I")
#: Where the wrapped key and the checksum over it lie in the header.
_WRAPPED, _CHECKSUM = slice(112, 152), slice(160, 168)
#: Where a section lies in its blob, and what it is before and after sealing.
SECTION_ENTRY: Final = np.dtype(
    [("offset", "<u8"), ("sealed_bytes", "<u4"), ("raw_bytes", "<u4"), ("codec", "<u4"), ("reserved", "<u4")]
)
CODEC_NONE, CODEC_ZSTD = 0, 1
_LEVEL: Final = 3
_NAME = re.compile(
    r"machines/(?P<machine>[0-9a-f-]{36})/index/"
    r"(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16})-(?P<token>[0-9a-f]{8})\.(?P<kind>tier|checkpoint|fold)"
)


class BlobKind(IntEnum):
    TIER = 1  # first, last: numbers of the segments it covers
    CHECKPOINT = 2  # first: its sequence; last: the latest time in the log so far
    FOLD = 3  # first: its generation, from 1; last: 0, and no token: of two who make the same one, one can


@dataclass(frozen=True, slots=True, order=True)
class IndexName:
    """An index blob's name; sorts by kind, then by `first` and `last` (see BlobKind). The token is random."""

    machine_id: uuid.UUID
    kind: BlobKind
    first: int
    last: int
    token: str

    def __str__(self) -> str:
        tail = f"{self.first:016x}-{self.last:016x}-{self.token}.{self.kind.name.lower()}"
        return index_prefix(self.machine_id) + tail

    def pack(self) -> bytes:
        """The 48 bytes that bind what is sealed to its blob."""
        return _POSITION.pack(MAGIC, self.machine_id.bytes, self.kind, 0, self.first, self.last)


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The first 512 bytes. Authentic only once the root was opened with it."""

    name: IndexName  # the token is the name's alone
    sections: int
    root_offset: int
    root_bytes: int
    key_id: int
    salt: bytes
    wrapped_key: bytes
    created_ns: int
    version: int = VERSION

    @property
    def is_rewrappable(self) -> bool:
        """Whether another form of the wrapped key may take its place."""
        return self.version != _WHOLLY_SEALED

    def bound(self) -> bytes:
        """What of the header the root's seal covers."""
        data = bytearray(self.pack())
        if self.is_rewrappable:
            for where in (_WRAPPED, _CHECKSUM):
                data[where] = bytes(where.stop - where.start)
        return bytes(data)

    def pack(self) -> bytes:
        where = self.name
        body = _HEADER.pack(
            *(MAGIC, self.version, HEADER_BYTES, where.machine_id.bytes, where.kind, self.sections),
            *(where.first, where.last, self.root_offset, self.root_bytes, 0, self.key_id),
            *(self.salt, self.wrapped_key, self.created_ns),
        )
        return (body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))).ljust(HEADER_BYTES, b"\0")


@dataclass(frozen=True, slots=True)
class Root:
    """An opened root: a JSON object, and where the sections lie."""

    header: IndexHeader
    fields: Fields
    sections: np.ndarray[Any, Any]


def index_prefix(machine_id: uuid.UUID) -> str:
    """What the names of a machine's index blobs begin with."""
    return f"machines/{machine_id}/index/"


def read_name(text: str) -> IndexName | None:
    """The place that a blob's name says; None for one that is no index blob, however alike its name."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    try:
        machine = uuid.UUID(match["machine"])
    except ValueError:
        return None
    kind = BlobKind[match["kind"].upper()]
    name = IndexName(machine, kind, int(match["first"], 16), int(match["last"], 16), match["token"])
    return name if str(name) == text else None


def blob_key(data_key: bytes, salt: bytes, name: IndexName) -> AESGCM:
    """The key of one index blob: HKDF-SHA256 of the machine's data key."""
    if len(data_key) != KEY_BYTES or len(salt) != SALT_BYTES:
        raise ValueError(f"a data key has {KEY_BYTES} bytes, a salt {SALT_BYTES}")
    return AESGCM(HKDF(hashes.SHA256(), KEY_BYTES, salt, _LABEL + name.pack()).derive(data_key))


def seal_section(key: AESGCM, name: IndexName, index: int, raw: bytes) -> tuple[bytes, int]:
    """Compress and seal section `index`; its bytes and its codec."""
    if not 0 < len(raw) <= MAX_SECTION_BYTES or not 0 <= index < MAX_SECTIONS:
        raise ValueError(f"section {index} of {len(raw)} bytes")
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(raw)
    codec, body = (CODEC_ZSTD, packed) if len(packed) < len(raw) else (CODEC_NONE, raw)
    associated = name.pack() + _BOUND.pack(index, len(raw), codec)
    return key.encrypt(cipher.nonce(index + 1), body, associated), codec


def open_section(root: Root, index: int, sealed: Buffer, data_key: bytes) -> bytes:
    """Decrypt, verify and decompress section `index`.

    Raises:
        CorruptionError: wrong key, altered bytes, or a length that does not fit.
    """
    entry, name = root.sections[index], root.header.name
    raw_bytes, codec = int(entry["raw_bytes"]), int(entry["codec"])
    what = f"section {index} of index blob {name}"
    key = blob_key(data_key, root.header.salt, name)
    associated = name.pack() + _BOUND.pack(index, raw_bytes, codec)
    data = cipher.open_section(key, index + 1, sealed, associated, what, name.first)
    if codec == CODEC_ZSTD:
        data = cipher.decompress(data, raw_bytes, what, name.first)
    if len(data) != raw_bytes:
        raise CorruptionError(f"{what} has {len(data)} bytes, not {raw_bytes}", blob=str(name))
    return data


def seal_root(
    key: AESGCM, header: IndexHeader, values: Mapping[str, Any], sections: np.ndarray[Any, Any]
) -> tuple[bytes, IndexHeader]:
    """The sealed root, and the header (given with a `root_bytes` of 0) that goes with it.

    Raises:
        LimitError: more than a root may hold.
    """
    text = fields.pack(values)
    raw = _JSON_BYTES.pack(len(text)) + text + sections.tobytes()
    if len(raw) > MAX_ROOT_BYTES:
        raise LimitError(
            f"the root of {header.name} would have {len(raw)} bytes; {MAX_ROOT_BYTES} is the limit",
            hint="keep fewer points",
        )
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(raw)
    whole = IndexHeader(
        *(header.name, len(sections), header.root_offset, len(packed) + TAG_BYTES, header.key_id),
        *(header.salt, header.wrapped_key, header.created_ns, header.version),
    )
    return key.encrypt(cipher.nonce(0), packed, whole.bound()), whole


def open_root(header: IndexHeader, sealed: Buffer, data_key: bytes) -> Root:
    """Decrypt and verify the root section; with it, the header is authentic too, but for the wrapped key (which proves
    itself: no other data key would have opened this).

    Raises:
        CorruptionError: wrong key, altered bytes, or a root that contradicts itself.
    """
    what = f"the root of index blob {header.name}"
    key = blob_key(data_key, header.salt, header.name)
    packed = cipher.open_section(key, 0, sealed, header.bound(), what, header.name.first)
    raw = cipher.decompress(packed, MAX_ROOT_BYTES, what, header.name.first)
    if len(raw) < _JSON_BYTES.size:
        raise CorruptionError(f"{what} is too short", blob=str(header.name))
    end = _JSON_BYTES.size + _JSON_BYTES.unpack_from(raw)[0]
    if len(raw) != end + header.sections * SECTION_ENTRY.itemsize:
        raise CorruptionError(f"{what} has the wrong length", blob=str(header.name))
    entries = np.frombuffer(raw, SECTION_ENTRY, header.sections, end)
    if bool(np.any((entries["raw_bytes"] > MAX_SECTION_BYTES) | (entries["codec"] > CODEC_ZSTD))):
        raise CorruptionError(f"{what} lists sections that cannot be", blob=str(header.name))
    return Root(header, Fields(raw[_JSON_BYTES.size : end], what), entries)


def read_header(data: Buffer, name: IndexName) -> IndexHeader | None:
    """Decode the header of the blob of that name.

    Returns:
        None where none was written: the blob was never finished.

    Raises:
        CorruptionError: when it is no index blob of this version, or another one than its name says. With the field
            `version`, it is one of a later version, and sound for all that is known.
    """
    raw = bytes(data[:HEADER_BYTES])
    if len(raw) < HEADER_BYTES:
        raise CorruptionError(f"an index blob of {len(raw)} bytes has no header", blob=str(name))
    if not any(raw):
        return None
    (magic, version, size, machine, kind, sections, first, last, offset, root_bytes, _, *rest) = _HEADER.unpack_from(
        raw
    )
    if magic != MAGIC:
        raise CorruptionError(f"{name} is no index blob", blob=str(name))
    if struct.unpack_from("<Q", raw, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(raw[: _HEADER.size]):
        raise CorruptionError(f"the header of index blob {name} fails its checksum", blob=str(name))
    if version not in (VERSION, _WHOLLY_SEALED) or size != HEADER_BYTES:
        raise CorruptionError(
            f"index blob {name} is of version {version}, which is not known here",
            hint="upgrade this part, as whoever wrote that was",
            version=version,
            blob=str(name),
        )
    said = (uuid.UUID(bytes=machine), kind, first, last)
    if said != (name.machine_id, name.kind, name.first, name.last):
        raise CorruptionError(f"index blob {name} holds the header of another", blob=str(name))
    if not TAG_BYTES < root_bytes <= MAX_ROOT_BYTES or sections > MAX_SECTIONS or offset < HEADER_BYTES:
        raise CorruptionError(f"the header of index blob {name} claims sizes that cannot be", blob=str(name))
    key_id, salt, wrapped, created = rest
    return IndexHeader(name, sections, offset, root_bytes, key_id, salt, wrapped, created, version)


assert _HEADER.size == 160
assert WRAPPED_KEY_BYTES == 40
