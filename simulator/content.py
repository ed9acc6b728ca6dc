"""What the application writes: sectors that say of themselves which write made them, where, and when.

    sector of 512 bytes:  magic 8 | checksum u64 | write number u64 | own offset u64 | time_ns u64 | seed u64 | fill 464

So a sector found in the wrong place, of an older write, or half of one and half of another, explains itself. Content is
a pure function of `Stamp` and length: the oracle keeps 40 bytes a write, not the write.

About half of the fill is incompressible and half repeats, which is what the benchmarks say of their data, too.
The checksum is a sum of words times odd constants, modulo 2**64: any one changed word changes it, and numpy computes it
for a whole write at once. It finds accidents; it is no defence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SECTOR_BYTES: Final = 512
MAGIC: Final = int.from_bytes(b"RPSECTOR", "little")
_WORDS: Final = SECTOR_BYTES // 8
_HEADER_WORDS: Final = 6
_POOL_SECTORS: Final = 4096
_TEXT: Final = b"INSERT INTO ledger (account, amount, moment, remark) VALUES (1204, 17.50, now(), 'paid in full'); "

_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every sector of one write carries, beside its own place."""

    seed: int
    number: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a sector says of itself. `sound` is false when its checksum fails: a torn or altered sector."""

    stamp: Stamp
    offset: int
    sound: bool

    def __str__(self) -> str:
        state = "" if self.sound else ", damaged"
        return f"write {self.stamp.number} for offset {self.offset}{state}"


def make(stamp: Stamp, offset: int, length: int) -> bytes:
    """The content of a write of `length` bytes at `offset`, both multiples of 512."""
    count = length // SECTOR_BYTES
    if offset % SECTOR_BYTES or length % SECTOR_BYTES or count == 0:
        raise ValueError(f"{length} bytes at {offset} are no whole sectors")
    words = np.empty((count, _WORDS), np.uint64)
    # A write's sectors take consecutive fill, beginning at a place that its number scatters.
    start = (stamp.number * 0x9E37_79B9_7F4A_7C15 + stamp.seed) % _POOL_SECTORS
    words[:, _HEADER_WORDS:] = _pool().take(np.arange(start, start + count), axis=0, mode="wrap")
    words[:, 0] = MAGIC
    words[:, 2] = stamp.number
    words[:, 3] = np.arange(offset, offset + length, SECTOR_BYTES, dtype=np.uint64)
    words[:, 4] = stamp.time_ns
    words[:, 5] = stamp.seed
    words[:, 1] = _checksums(words)
    return words.tobytes()


def read(sector: bytes) -> Found | None:
    """What the sector says of itself; None when no application of ours wrote it."""
    words = np.frombuffer(sector, np.uint64, count=_WORDS).reshape(1, _WORDS)
    magic, checksum, number, offset, time_ns, seed = (int(word) for word in words[0, :_HEADER_WORDS])
    if magic != MAGIC:
        return None
    return Found(Stamp(seed, number, time_ns), offset, sound=int(_checksums(words)[0]) == checksum)


def _checksums(words: _Words) -> _Words:
    """One checksum a sector (shape (n,)), over every word but its own place."""
    weighted = words * _weights()
    return np.asarray(weighted.sum(axis=1, dtype=np.uint64) - weighted[:, 1], dtype=np.uint64)


@lru_cache(maxsize=1)
def _weights() -> _Words:
    generator: Any = np.random.default_rng(0x5EC7)
    return np.asarray(generator.integers(0, 1 << 63, _WORDS, dtype=np.uint64) * 2 + 1, dtype=np.uint64)


@lru_cache(maxsize=1)
def _pool() -> _Words:
    """Fill for `_POOL_SECTORS` sectors, every second one random, the others text."""
    fill_bytes = (_WORDS - _HEADER_WORDS) * 8
    generator = np.random.default_rng(0xF111)
    pool = np.frombuffer(generator.bytes(_POOL_SECTORS * fill_bytes), np.uint8).reshape(_POOL_SECTORS, -1).copy()
    text = np.frombuffer((_TEXT * 8)[:fill_bytes], np.uint8)
    pool[1::2] = text
    return pool.view(np.uint64)
