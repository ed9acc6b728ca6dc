"""What keeps a segment secret and in its place: keys, nonces, associated data, digests, and bounded decompression.

Every segment has a key of its own, derived from the machine's data key, 32 random bytes and the segment's position.
Nonces are then simply places (chunk i is i + 1, the table is 0). Two segments could only share a key if random bytes
*and* position were the same, so even a random generator that repeats itself (a virtual machine resumed twice from one
snapshot) does not make a nonce repeat: storage lets nobody begin the same run a second time.

AES-GCM is not committing and says nothing about length: compressed sizes and the plain header are there to be seen.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import uuid
from dataclasses import dataclass
from typing import Final, cast

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replicar.errors import CorruptionError
from replicar.formats.frame import Buffer

TAG_BYTES: Final = 16
SALT_BYTES: Final = 32
DIGEST_BYTES: Final = 32
KEY_BYTES: Final = 32
#: zstd may ask a reader for a window as large as it likes; nothing here is larger than a segment.
MAX_WINDOW_BYTES: Final = 8 << 20

_BOUND = struct.Struct("<8s16sIIQQQ")
_CHUNK = struct.Struct("<III")
_BOUND_MAGIC = b"RPSEGMT\x01"
_THREADS = threading.local()
_KDF_LABEL = b"replicar segment v1"


@dataclass(frozen=True, slots=True)
class Position:
    """Which segment this is: of which machine, written by whom, where in the chain, holding which sequences."""

    machine_id: uuid.UUID
    epoch: int
    run: int
    number: int
    first_sequence: int
    last_sequence: int

    def pack(self) -> bytes:
        """The 56 bytes that bind what is sealed to its place."""
        return _BOUND.pack(
            *(_BOUND_MAGIC, self.machine_id.bytes, self.epoch, self.run, self.number),
            *(self.first_sequence, self.last_sequence),
        )


def segment_key(data_key: bytes, salt: bytes, position: Position) -> AESGCM:
    """The key of one segment: HKDF-SHA256 of the machine's data key.

    Raises:
        ValueError: a key or salt of the wrong length, which is a programmer's error.
    """
    if len(data_key) != KEY_BYTES or len(salt) != SALT_BYTES:
        raise ValueError(f"a data key has {KEY_BYTES} bytes, a salt {SALT_BYTES}")
    return AESGCM(HKDF(hashes.SHA256(), KEY_BYTES, salt, _KDF_LABEL + position.pack()).derive(data_key))


def nonce(section: int) -> bytes:
    """The nonce of a section: 0 for the table, i + 1 for chunk i."""
    return section.to_bytes(12, "little")


def chunk_data(position: Position, index: int, raw_bytes: int, codec: int) -> bytes:
    """The associated data of a chunk. (The table's is the whole header.)"""
    return position.pack() + _CHUNK.pack(index, raw_bytes, codec)


def digest(header: bytes, tag: Buffer) -> bytes:
    """What the next segment names: header and table's tag, and through the table every chunk's."""
    return hashlib.sha256(header + bytes(tag)).digest()


def open_section(key: AESGCM, section: int, sealed: Buffer, associated: bytes, what: str, number: int) -> bytes:
    """Decrypt and verify one section.

    Raises:
        CorruptionError: it is not what was sealed there.
    """
    try:
        return key.decrypt(nonce(section), sealed, associated)
    except (InvalidTag, ValueError):
        raise CorruptionError(
            f"{what} does not open: altered in storage, or sealed with another key",
            hint="check that the key is this machine's; `replicar verify` tells which segments are sound",
            number=number,
        ) from None


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's: one holds some 100 KiB, which cost as much to make as a small chunk to decompress."""
    found: zstandard.ZstdDecompressor | None = getattr(_THREADS, "decompressor", None)
    if found is None:
        found = _THREADS.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return found


def decompress(data: bytes, limit: int, what: str, number: int) -> bytes:
    """One zstd frame and nothing else, of at most `limit` bytes.

    A frame may claim any content size, and the library allocates what is claimed; so the claim is looked at first.

    Raises:
        CorruptionError: it is no such frame.
    """
    try:
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed != zstandard.CONTENTSIZE_UNKNOWN and claimed > limit:
            raise CorruptionError(f"{what} claims {claimed} bytes; {limit} is the limit", number=number)
        return _decompressor().decompress(data, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"{what} does not decompress: {error}", number=number) from None


def decompress_together(frames: list[bytes | bytearray | memoryview], sizes: list[int]) -> list[memoryview]:
    """Some zstd frames, each of exactly the size that is said, in one call of the library: without the interpreter's
    lock, and into one piece of memory, which lives as long as one of the results. What a frame claims is not believed.

    Weak: what follows a frame in its bytes is not seen, as `decompress` sees it. They are authenticated, and no writer
    puts anything there.

    Raises:
        CorruptionError: one of them is no such frame; `decompress` tells which, and why.
    """
    if not frames:
        return []
    try:
        if max(zstandard.get_frame_parameters(each).window_size for each in frames) > MAX_WINDOW_BYTES:
            raise CorruptionError(f"one of {len(frames)} frames wants a larger window than {MAX_WINDOW_BYTES} bytes")
        packed = struct.pack(f"={len(sizes)}Q", *sizes)
        opened = _decompressor().multi_decompress_to_buffer(frames, decompressed_sizes=packed)
    except (zstandard.ZstdError, ValueError) as error:
        raise CorruptionError(f"one of {len(frames)} frames does not decompress: {error}") from None
    return [memoryview(cast(Buffer, opened[index])) for index in range(len(frames))]  # it is a buffer by the C protocol
