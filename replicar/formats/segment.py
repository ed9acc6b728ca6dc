"""A sealed segment: a run of frames, compressed, encrypted, authenticated, and chained to the one before.

    header 192 | chunk 0 | chunk 1 | ... | table | zeros to a multiple of 512

The run of frames is cut into chunks of equal size (the last is shorter); each is compressed alone, where that shrinks
it, and sealed alone, so any block of any point costs one ranged read. The *table* section holds what recovery needs to
know without reading payloads: the chunks' sizes and tags, and every frame's header and descriptors. It lies behind the
chunks, so that chunks are sealed straight into their place while the table is still unknown.

Header and table section, in the clear, are `sections`' matter.

Keys: every segment has its own (see `cipher`), and nonces are places, so a nonce can't be used twice, even if a process
server dies and seals the same frames again with other neighbours. A segment's table is sealed once and never again:
`chain` refuses.

What `add_table` lets pass, `open_table` opens: a segment that nobody can read must not be stored and acknowledged.

Position: what is sealed is bound, as associated data, to machine, epoch, run, number and sequence range; the table to
the whole header. Headers name the digest of the segment before; a digest covers the header and the table's tag, the
table holds the chunks' tags, so one digest vouches for every byte. Swapped, replayed, reordered or altered segments are
found. A cut-off tail is only found by somebody who knows how far the log went: the config server's record does.

Weak: whoever holds the data key can forge; there is no signature. The header is plain: sizes, times and sequence
numbers can be read without a key, and how well data compressed. The zeros at the end are vouched for by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from replicar.errors import CorruptionError, LimitError
from replicar.formats import cipher, frame, sections
from replicar.formats.cipher import DIGEST_BYTES, KEY_BYTES, SALT_BYTES, TAG_BYTES, Position
from replicar.formats.frame import Buffer, Frame
from replicar.formats.sections import (
    ALIGNMENT,
    CHUNK_ENTRY,
    CODEC_NONE,
    CODEC_ZSTD,
    FRAME_ENTRY,
    HEADER_BYTES,
    MAGIC,
    MAX_INDEX_BYTES,
    MAX_RAW_BYTES,
    MAX_SEGMENT_BYTES,
    MIN_CHUNK_BYTES,
    PACK_CHUNK,
    VERSION,
    SegmentHeader,
    SegmentTable,
    index_bytes,
    read_header,
)

#: What others need of a segment is found here, wherever it is kept.
__all__ = [
    "ALIGNMENT",
    "CHUNK_ENTRY",
    "CODEC_ZSTD",
    "DEFAULT_CHUNK_BYTES",
    "DIGEST_BYTES",
    "FIRST_DIGEST",
    "FRAME_ENTRY",
    "HEADER_BYTES",
    "KEY_BYTES",
    "MAGIC",
    "MAX_RAW_BYTES",
    "MAX_SEGMENT_BYTES",
    "MIN_CHUNK_BYTES",
    "SALT_BYTES",
    "TAG_BYTES",
    "VERSION",
    "Position",
    "SealedChunks",
    "SegmentHeader",
    "SegmentTable",
    "add_table",
    "chain",
    "check_run",
    "finish",
    "index_bytes",
    "open_chunk",
    "open_chunks",
    "open_table",
    "read_header",
    "seal",
    "seal_chunks",
]

DEFAULT_CHUNK_BYTES: Final = 128 << 10
#: Given to zstd at once: enough that the interpreter's lock is seldom asked for, and little enough that the allocator
#: has the memory at hand.
_BATCH_CHUNKS: Final = 8
FIRST_DIGEST: Final = bytes(DIGEST_BYTES)  # what the very first segment of a machine names as the one before


class SealedChunks:
    """A segment whose chunks are sealed and whose place in the chain is still open; see `seal_chunks`."""

    __slots__ = (
        *("chunk_bytes", "chunks", "data_bytes", "finished", "first_time_ns", "key", "key_id", "last_time_ns", "out"),
        *("position", "raw", "salt", "shrank", "table"),
    )

    def __init__(
        self,
        position: Position,
        raw: memoryview,
        key: AESGCM,
        key_id: int,
        salt: bytes,
        chunk_bytes: int,
        out: memoryview,
    ) -> None:
        self.position, self.raw, self.key, self.key_id, self.salt = position, raw, key, key_id, salt
        self.chunk_bytes = chunk_bytes
        self.chunks: list[bytes] = []  # their entries in the table
        self.shrank: list[bool] = []  # whether each is stored compressed
        self.out = out
        self.data_bytes = 0
        self.table = b""  # packed and compressed, not sealed; see `add_table`
        self.first_time_ns = self.last_time_ns = 0
        self.finished = False


def seal_chunks(
    raw: memoryview,
    position: Position,
    data_key: bytes,
    salt: bytes,
    compressor: zstandard.ZstdCompressor | None,
    *,
    key_id: int = 1,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    out: memoryview | None = None,
    choose: Callable[[Sequence[memoryview]], Sequence[bool]] | None = None,
) -> SealedChunks:
    """Compress and seal the chunks of a run of frames: the heavy half of sealing, free of the chain, so several
    segments can be at it at once (zstd and AES-GCM release the interpreter's lock, zstd once for many chunks).

    Copies: each byte is read once by zstd into a new buffer and written once by AES-GCM into its final place.

    Args:
        raw: whole frames, back to back, at most MAX_RAW_BYTES less their index.
        salt: 32 fresh random bytes; never used for another segment.
        compressor: None stores chunks as they are.
        out: writable, MAX_SEGMENT_BYTES long, owned by the segment until it is uploaded; None takes fresh memory.
        choose: says of every chunk whether to try and compress it; None tries all.

    Raises:
        LimitError: when the run is larger than a segment may be.
        ValueError: a key, salt, chunk size or place that no reader takes: a programmer's error.
    """
    if not 0 < len(raw) <= MAX_RAW_BYTES:
        raise LimitError(f"a run of {len(raw)} bytes; a segment takes 1 to {MAX_RAW_BYTES}")
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_SEGMENT_BYTES or position.number <= 0:
        raise ValueError(f"segment {position.number} in chunks of {chunk_bytes} bytes")
    if out is None:
        out = memoryview(bytearray(MAX_SEGMENT_BYTES))
    sealed = SealedChunks(position, raw, cipher.segment_key(data_key, salt, position), key_id, salt, chunk_bytes, out)
    chunks = [raw[start : start + chunk_bytes] for start in range(0, len(raw), chunk_bytes)]
    packed = _compressed(chunks, compressor, choose)
    place = HEADER_BYTES
    for index, chunk in enumerate(chunks):
        codec, body = CODEC_NONE, chunk
        if index in packed and len(packed[index]) < len(chunk):
            codec, body = CODEC_ZSTD, memoryview(packed[index])
        end = place + len(body) + TAG_BYTES
        associated = cipher.chunk_data(position, index, len(chunk), codec)
        sealed.key.encrypt_into(cipher.nonce(index + 1), body, associated, out[place:end])
        sealed.chunks.append(PACK_CHUNK.pack(end - place, codec, bytes(out[end - TAG_BYTES : end])))
        sealed.shrank.append(codec == CODEC_ZSTD)
        place = end
    sealed.data_bytes = place - HEADER_BYTES
    return sealed


def _compressed(
    chunks: Sequence[memoryview],
    compressor: zstandard.ZstdCompressor | None,
    choose: Callable[[Sequence[memoryview]], Sequence[bool]] | None,
) -> dict[int, Any]:
    """What zstd makes of the chunks that are to be tried, by their index."""
    if compressor is None:
        return {}
    tried = choose(chunks) if choose is not None else [True] * len(chunks)
    indices = [index for index, is_tried in enumerate(tried) if is_tried]
    packed: dict[int, Any] = {}
    for start in range(0, len(indices), _BATCH_CHUNKS):
        batch = indices[start : start + _BATCH_CHUNKS]
        made = compressor.multi_compress_to_buffer([chunks[index] for index in batch], threads=1)
        packed |= {index: made[row] for row, index in enumerate(batch)}
    return packed


def add_table(sealed: SealedChunks, frames: Sequence[tuple[int, Frame]]) -> None:
    """Make the table section, all but sealed: what of finishing is work, and needs no place in the chain.

    Args:
        frames: the run's frames with their offsets in it, as `frame.frames_in` gives them.

    Raises:
        LimitError: the table section is larger than a segment may be; `index_bytes` tells beforehand.
        ValueError: the frames are not those that were sealed.
    """
    _check_frames(sealed, frames)
    index = sections.pack_table(sealed.chunks, frames)
    sealed.table = zstandard.ZstdCompressor(level=1).compress(index)
    first, last = frames[0][1], frames[-1][1]
    sealed.first_time_ns = _time_ns(first.data, first.header.table_offset)
    sealed.last_time_ns = _time_ns(last.data, last.header.frame_bytes - frame.DESCRIPTOR_BYTES)
    total = _total_bytes(sealed)
    if total > MAX_SEGMENT_BYTES:
        raise LimitError(f"a segment of {total} bytes; {MAX_SEGMENT_BYTES} is the limit")


def finish(sealed: SealedChunks, frames: Sequence[tuple[int, Frame]], previous: bytes) -> tuple[memoryview, bytes]:
    """`add_table` and `chain` in one."""
    add_table(sealed, frames)
    return chain(sealed, previous)


def chain(sealed: SealedChunks, previous: bytes) -> tuple[memoryview, bytes]:
    """Give a segment its place in the chain: seal the table, write the header. Quick enough for an event loop.

    Args:
        previous: digest of the segment before (FIRST_DIGEST for the first of a machine).

    Returns:
        The segment's bytes (a multiple of 512, at most 4 MiB) and its digest.

    Raises:
        ValueError: the segment has no table yet, or was finished before.
    """
    if sealed.finished:
        raise ValueError("a segment is finished once: its table's nonce must not be used again")
    if not sealed.table:
        raise ValueError("a segment without a table")
    packed, total = sealed.table, _total_bytes(sealed)
    table_offset = HEADER_BYTES + sealed.data_bytes
    table_bytes = len(packed) + TAG_BYTES
    end = table_offset + table_bytes
    header = SegmentHeader(
        *(sealed.position, sealed.first_time_ns, sealed.last_time_ns),
        *(len(sealed.raw), sealed.chunk_bytes, len(sealed.chunks), sealed.data_bytes, table_bytes, total),
        *(sealed.key_id, sealed.salt, previous),
    ).pack()
    out = sealed.out
    out[:HEADER_BYTES] = header
    out[end:total] = bytes(total - end)
    sealed.finished = True
    sealed.key.encrypt_into(cipher.nonce(0), packed, header, out[table_offset:end])
    return out[:total], cipher.digest(header, out[end - TAG_BYTES : end])


def seal(
    raw: Buffer, position: Position, data_key: bytes, salt: bytes, previous: bytes, *, level: int = 1, key_id: int = 1
) -> tuple[bytes, bytes]:
    """Both halves of sealing in one: the segment's bytes and its digest."""
    view = memoryview(raw)
    compressor = zstandard.ZstdCompressor(level=level)
    chunks = seal_chunks(view, position, data_key, salt, compressor, key_id=key_id)
    data, digest = finish(chunks, list(frame.frames_in(view)), previous)
    return bytes(data), digest


def open_table(header: SegmentHeader, sealed_table: Buffer, data_key: bytes) -> SegmentTable:
    """Decrypt and verify the table section; with it, the header is authentic too.

    Args:
        sealed_table: the bytes at [table_offset, table_offset + table_bytes) of the segment.

    Raises:
        CorruptionError: wrong key, altered bytes, or a table that contradicts itself.
    """
    raw_header = header.pack()
    number = header.position.number
    what = f"the table of segment {number}"
    key = cipher.segment_key(data_key, header.salt, header.position)
    packed = cipher.open_section(key, 0, sealed_table, raw_header, what, number)
    index = cipher.decompress(packed, MAX_INDEX_BYTES, what, number)
    return sections.read_table(index, header, cipher.digest(raw_header, memoryview(sealed_table)[-TAG_BYTES:]))


def open_key(header: SegmentHeader, data_key: bytes) -> AESGCM:
    """The key of a segment's chunks, for whoever opens several of them; use it in one thread at a time."""
    return cipher.segment_key(data_key, header.salt, header.position)


def open_chunk(table: SegmentTable, index: int, sealed_chunk: Buffer, key: bytes | AESGCM) -> bytes:
    """Decrypt, verify and decompress chunk `index`, given its bytes at chunk_offsets[index : index + 2].

    Args:
        key: the machine's data key, or what `open_key` made of it.

    Raises:
        CorruptionError: wrong key, altered bytes, or a length that does not fit.
    """
    number = table.header.position.number
    what = f"chunk {index} of segment {number}"
    data, codec, raw_bytes = _decrypted(table, index, sealed_chunk, key, what)
    if codec == CODEC_ZSTD:
        data = cipher.decompress(data, raw_bytes, what, number)
    if len(data) != raw_bytes:
        raise CorruptionError(f"{what} has {len(data)} bytes, not {raw_bytes}", number=number)
    return data


def open_chunks(
    table: SegmentTable, indices: Sequence[int], sealed_chunks: Sequence[Buffer], key: bytes | AESGCM
) -> list[memoryview]:
    """As `open_chunk` for some chunks, which are decompressed in one call and stay in memory together.

    Raises:
        CorruptionError: one of them can't be opened; `open_chunk` tells which.
    """
    opened: list[memoryview | None] = []
    frames: list[bytes | bytearray | memoryview] = []
    sizes: list[int] = []
    what = f"one of {len(indices)} chunks of segment {table.header.position.number}"
    for index, sealed in zip(indices, sealed_chunks, strict=True):
        data, codec, raw_bytes = _decrypted(table, index, sealed, key, what)
        if codec == CODEC_ZSTD:
            frames.append(data)
            sizes.append(raw_bytes)
        elif len(data) != raw_bytes:
            raise CorruptionError(f"{what} has {len(data)} bytes, not {raw_bytes}")
        opened.append(None if codec == CODEC_ZSTD else memoryview(data))
    decompressed = iter(cipher.decompress_together(frames, sizes))
    return [next(decompressed) if data is None else data for data in opened]


def _decrypted(
    table: SegmentTable, index: int, sealed_chunk: Buffer, key: bytes | AESGCM, what: str
) -> tuple[bytes, int, int]:
    """A chunk as it was compressed, its codec, and how many bytes it has when it is not."""
    header = table.header
    number = header.position.number
    sealed_bytes, codec, tag = PACK_CHUNK.unpack(table.chunks[index].tobytes())
    raw_bytes = min(header.chunk_bytes, header.raw_bytes - index * header.chunk_bytes)
    if len(sealed_chunk) != sealed_bytes or bytes(sealed_chunk[-TAG_BYTES:]) != tag:
        raise CorruptionError(f"{what} is not the one its table names", number=number)
    associated = cipher.chunk_data(header.position, index, raw_bytes, codec)
    opener = key if isinstance(key, AESGCM) else open_key(header, key)
    return cipher.open_section(opener, index + 1, sealed_chunk, associated, what, number), codec, raw_bytes


def check_run(table: SegmentTable, raw: Buffer) -> None:
    """Verify a segment's whole run of frames against its table: every frame sound, and the same as the table says.

    Raises:
        CorruptionError: naming the segment and the sequence.
    """
    number = table.header.position.number
    if len(raw) != table.header.raw_bytes:
        raise CorruptionError(f"segment {number} holds {len(raw)} bytes, not {table.header.raw_bytes}", number=number)
    for row, (place, item) in enumerate(frame.frames_in(raw)):
        start, end = table.descriptor_starts[row : row + 2]
        same = place == table.frame_places[row] and item.header == table.frame_headers[row]
        if not same or item.table.tobytes() != table.descriptors[start:end].tobytes():
            sequence = item.header.first_sequence
            raise CorruptionError(
                f"segment {number} holds another frame at sequence {sequence} than its table says", number=number
            )


def _time_ns(data: memoryview, descriptor_at: int) -> int:
    """Of the descriptor that begins there."""
    time_ns: int = frame.PACK_DESCRIPTOR.unpack_from(data, descriptor_at)[2]
    return time_ns


def _total_bytes(sealed: SealedChunks) -> int:
    end = HEADER_BYTES + sealed.data_bytes + len(sealed.table) + TAG_BYTES
    return -(-end // ALIGNMENT) * ALIGNMENT


def _check_frames(sealed: SealedChunks, frames: Sequence[tuple[int, Frame]]) -> None:
    position, place, sequence = sealed.position, 0, sealed.position.first_sequence
    for offset, item in frames:
        head = item.header
        if (offset, head.first_sequence, head.machine_id) != (place, sequence, position.machine_id):
            raise ValueError(f"the frame at {offset} of segment {position.number} does not follow the one before it")
        place, sequence = place + head.frame_bytes, head.next_sequence
    if place != len(sealed.raw) or sequence != position.last_sequence + 1:
        raise ValueError(f"the frames of segment {position.number} are not those that were sealed")
