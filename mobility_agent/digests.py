"""The replica's digests: what the stream says each chunk of a disk holds, so that comparing a disk with its copy costs
reading the disk, and sending only what differs.

For every chunk of 64 KiB there are 16 bytes: the SHA-256 of its content, cut to 128 bits; zeros mean "not known". A
digest is of the *stream*, never of the disk: of the last content that descriptors up to now give that chunk.

    a WRITE or ZERO goes into the log      the chunks that it touches are forgotten, whatever it holds
    a background copy of whole chunks      is such a ZERO or WRITE; then its digests are put, since they are known

Forgetting is done for a frame at a time, when the frame is sealed, which is before it can be sent. Whoever compares
seals the open frame first. What is written while order can't be kept is not in the stream, and forgets nothing: that is
what makes a resynchronisation cheap.

Why a digest can be trusted after a death:

- Killed process: the mapping survives. A frame may have been sealed, or be staged, without its chunks having been
  forgotten, but that is the log's last one, and the ladder forgets for it again when it starts.
- Power cut: any page of this file may be older or newer than the log. Every chunk whose entry was put or forgotten
  since the last checkpoint lies in a region that the touched record names: writes are recorded there first, and so are
  copies. All of these regions are forgotten. The rest is as it was when a checkpoint made this file durable, after the
  log and before regions were retired.
- A past that is not known at all: everything is forgotten.

SHA-256, because whoever chooses what a machine writes must not be able to choose two contents of one digest.

Weak: 256 MiB of file for each TiB of disk, of which only what is compared comes into memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from mobility_agent import grown
from mobility_agent.mapped import MappedFile
from replicar.formats.frame import PACK_DESCRIPTOR, Kind

CHUNK_BYTES: Final = 1 << 16
DIGEST_BYTES: Final = 16
_MAGIC: Final = b"RPDIGST\x01"
_PAGE: Final = 4096
_HEADER = struct.Struct("<8sQQ")
#: Rows up to which a loop beats a dozen calls of numpy.
_SHORT_TABLE: Final = 16
# Plain numbers: on every frame's path an enumeration's lookup costs more than what is done with it.
_WRITE, _ZERO = int(Kind.WRITE), int(Kind.ZERO)
_CHANGES: Final = (_WRITE, _ZERO)

#: Digests of chunks in a row, shape (chunks, 2): the 16 bytes as two little-endian words.
Rows: TypeAlias = npt.NDArray[np.uint64]


def digest(content: bytes | memoryview) -> bytes:
    """The digest of one chunk."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


_ZERO_CHUNK: Final = np.frombuffer(digest(bytes(CHUNK_BYTES)), np.uint64)


class Digests:
    """The digests of one disk. All methods run on one thread, but `rows`.

    Args:
        path: their file; made, with nothing known, if it is missing or describes a disk that was larger. Of one that
            was smaller, nothing is known of what was added.
    """

    def __init__(self, path: Path, disk_bytes: int) -> None:
        self.disk_bytes = disk_bytes
        self.chunks = -(-disk_bytes // CHUNK_BYTES)
        size = _PAGE + self.chunks * DIGEST_BYTES
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        head = grown.header(_HEADER, _MAGIC, disk_bytes, CHUNK_BYTES)
        found = os.pread(fd, len(head), 0)
        before = grown.size_before(_HEADER, _MAGIC, found, disk_bytes, CHUNK_BYTES)
        is_new = found != head
        if is_new and before is None:
            os.ftruncate(fd, 0)  # what was known of another disk is holes now, which read as not known
        os.ftruncate(fd, size)
        self.file = MappedFile(fd, size)
        self._rows: Rows = np.frombuffer(self.file.mapping, np.uint64, self.chunks * 2, _PAGE).reshape(-1, 2)
        if before is not None and before % CHUNK_BYTES:
            self._rows[before // CHUNK_BYTES] = 0  # it was short, and is not any more
        if is_new:
            self.file.mapping[: len(head)] = head
            self.file.sync()

    @property
    def known(self) -> int:
        """How many chunks are known."""
        return int(np.count_nonzero(self._rows.any(axis=1)))

    # --- what the stream got ---

    def observe(self, table: npt.NDArray[np.void], disk: int) -> None:
        """Forget what a frame's descriptors change on `disk`."""
        if len(table) <= _SHORT_TABLE:
            rows = self._rows
            for offset, length, _, _, of, kind, _ in PACK_DESCRIPTOR.iter_unpack(table.tobytes()):
                if of == disk and kind in _CHANGES:
                    rows[offset // CHUNK_BYTES : (offset + length - 1) // CHUNK_BYTES + 1] = 0
            return
        changes = table[(table["disk"] == disk) & ((table["kind"] == _WRITE) | (table["kind"] == _ZERO))]
        if changes.size:
            self.forget(changes["offset"].astype(np.int64), changes["length"].astype(np.int64))

    def forget(self, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Nothing is known of the chunks that these ranges touch. Shapes (n,), bytes."""
        first, last = offsets // CHUNK_BYTES, (offsets + lengths - 1) // CHUNK_BYTES
        self._rows[first] = 0
        self._rows[last] = 0
        for begin, end in zip(*(part[last - first > 1].tolist() for part in (first, last)), strict=True):
            self._rows[begin : end + 1] = 0

    def forget_all(self) -> None:
        # The file is cut instead of written: what was never known takes no room.
        self._rows[:] = 0

    def put(self, offset: int, rows: Rows) -> None:
        """The stream has these whole chunks now, from `offset` on."""
        first = offset // CHUNK_BYTES
        self._rows[first : first + len(rows)] = rows

    def put_zeros(self, offset: int, length: int) -> None:
        """The stream has zeros in all whole chunks of this range."""
        first, end = self.whole(offset, length)
        self._rows[first:end] = _ZERO_CHUNK
        if first < end == self.chunks and self.disk_bytes % CHUNK_BYTES:
            short = digest(bytes(self.disk_bytes % CHUNK_BYTES))
            self._rows[end - 1] = np.frombuffer(short, np.uint64)

    # --- comparing ---

    def whole(self, offset: int, length: int) -> tuple[int, int]:
        """The chunks that lie wholly within a range, as (first, end); the disk's last one may be short."""
        end = offset + length
        first = -(-offset // CHUNK_BYTES)
        return first, max(self.chunks if end >= self.disk_bytes else end // CHUNK_BYTES, first)

    def rows(self, offset: int, content: memoryview) -> Rows:
        """The digests of the whole chunks of `content`, which is the disk's from `offset` on. For another thread."""
        first, end = self.whole(offset, len(content))
        made = bytearray((end - first) * DIGEST_BYTES)
        for number in range(end - first):
            start = (first + number) * CHUNK_BYTES - offset
            made[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] = digest(content[start : start + CHUNK_BYTES])
        return np.frombuffer(bytes(made), np.uint64).reshape(-1, 2)

    def differing(
        self, offset: int, length: int, rows: Rows, *, zeros_apart: bool = False
    ) -> Iterator[tuple[int, int]]:
        """The parts of a range that the stream does not have, or is not known to have, as (offset, length), rising.

        Args:
            rows: what `rows` gave for this range. Parts of chunks at its ends always count as differing.
            zeros_apart: whole chunks of zeros are parts of their own.
        """
        first, end = self.whole(offset, length)
        if first == end:
            yield offset, length
            return
        kinds = np.ones(end - first + 2, np.int8)  # with a part of a chunk before and behind
        kinds[1:-1] = (self._rows[first:end] != rows).any(axis=1)
        kinds[0] = offset < first * CHUNK_BYTES
        kinds[-1] = end < self.chunks and end * CHUNK_BYTES < offset + length
        if zeros_apart:
            kinds[1:-1] *= 1 + (rows == _ZERO_CHUNK).all(axis=1)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], kinds, [0])))).tolist()
        for begin, stop in pairwise(edges):
            if kinds[begin]:
                start = max((first - 1 + begin) * CHUNK_BYTES, offset)
                yield start, min((first - 1 + stop) * CHUNK_BYTES, offset + length) - start

    def has_zeros(self, offset: int, length: int) -> bool:
        """Whether the stream is known to have zeros in the whole of a range of whole chunks."""
        first, end = self.whole(offset, length)
        if first * CHUNK_BYTES != offset or first == end or min(end * CHUNK_BYTES, self.disk_bytes) != offset + length:
            return False
        if end == self.chunks and self.disk_bytes % CHUNK_BYTES:
            return False  # a short one; it is sent once more
        return bool((self._rows[first:end] == _ZERO_CHUNK).all())

    # --- its file ---

    def store_again(self, offset: int, length: int) -> None:
        """Have the digests of a range of the disk written by the next sync, whatever became of them."""
        first, last = offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES
        self.file.store_again(_PAGE + first * DIGEST_BYTES, _PAGE + (last + 1) * DIGEST_BYTES)

    def close(self) -> None:
        """Durably: after a clean stop the digests are believed, even if the machine restarts."""
        del self._rows
        self.file.close()
