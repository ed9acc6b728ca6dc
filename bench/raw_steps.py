"""The libraries that the path is made of, each measured alone on data in owned, reused buffers, in this process.

Each function takes the data and how many bytes of it to put through (going round as often as needed) and returns the
cpu time that took. What takes two processes (TLS, HTTPS) is in `raw_network`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.measure import Cpu, own_cpu
from replicar.formats.cipher import TAG_BYTES
from replicar.formats.segment import DEFAULT_CHUNK_BYTES

HASH_PIECE_BYTES: Final = 1 << 20
CACHE_WRITE_BYTES: Final = 4 << 20
#: The cache is a file that is written again and again, so what is measured is overwriting.
CACHE_FILE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Compressed:
    """What zstd made of one round of the data: its chunks, and what it took."""

    chunks: list[bytes]
    raw_bytes: int
    cpu: Cpu

    @property
    def ratio(self) -> float:
        return self.raw_bytes / sum(map(len, self.chunks))


def pieces(data: memoryview, piece_bytes: int, total_bytes: int) -> Iterator[memoryview]:
    """`total_bytes` of the data in pieces, round and round."""
    offset = done = 0
    while done < total_bytes:
        piece = data[offset : offset + piece_bytes]
        yield piece
        done += len(piece)
        offset = (offset + len(piece)) % len(data)


def hashing(data: memoryview, total_bytes: int) -> Cpu:
    """XXH3-64, as frames carry it."""
    before = own_cpu()
    for piece in pieces(data, HASH_PIECE_BYTES, total_bytes):
        xxhash.xxh3_64_intdigest(piece)
    return own_cpu() - before


def compressing(data: memoryview, total_bytes: int, level: int) -> Compressed:
    """zstd in a segment's chunks. The chunks of the first round are kept, outside of what is measured."""
    compressor = zstandard.ZstdCompressor(level=level)
    kept = [compressor.compress(piece) for piece in pieces(data, DEFAULT_CHUNK_BYTES, len(data))]
    before = own_cpu()
    for piece in pieces(data, DEFAULT_CHUNK_BYTES, total_bytes):
        compressor.compress(piece)
    return Compressed(kept, len(data), own_cpu() - before)


def sealing(chunks: list[bytes], total_bytes: int) -> Cpu:
    """AES-256-GCM of compressed chunks, into a buffer that is there."""
    key, out = AESGCM(os.urandom(32)), memoryview(bytearray(max(map(len, chunks)) + TAG_BYTES))
    done = number = 0
    before = own_cpu()
    while done < total_bytes:
        chunk = chunks[number % len(chunks)]
        number += 1
        key.encrypt_into(number.to_bytes(12, "little"), chunk, b"", out[: len(chunk) + TAG_BYTES])
        done += len(chunk)
    return own_cpu() - before


def caching(directory: Path, total_bytes: int) -> tuple[Cpu, bool]:
    """Aligned writes of 4 MiB with a sync behind each, past the page cache; and whether that was possible there."""
    path = directory / "raw-cache"
    buffer = memoryview(mmap.mmap(-1, CACHE_WRITE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    buffer[:] = os.urandom(CACHE_WRITE_BYTES)
    flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
    try:
        file, direct = os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError:  # some in-memory filesystems
        file, direct = os.open(path, flags, 0o600), False
    try:
        os.posix_fallocate(file, 0, CACHE_FILE_BYTES)
        for offset in range(0, CACHE_FILE_BYTES, CACHE_WRITE_BYTES):
            os.pwrite(file, buffer, offset)
        os.fdatasync(file)
        done, before = 0, own_cpu()
        while done < total_bytes:
            done += os.pwrite(file, buffer, done % CACHE_FILE_BYTES)
            os.fdatasync(file)
        return own_cpu() - before, direct
    finally:
        os.close(file)
        path.unlink()
