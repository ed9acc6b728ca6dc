"""Which sectors of a disk are an overlay's: one bit each, set and asked for in ranges, and what was set since when.

The bits of a disk of 32 TiB take 8 GiB, of which only those pages are memory that a bit was ever set in.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from replicar.formats.overlay import PAGE_BYTES

#: Start and end, in sectors.
Run = tuple[int, int]


class Bitmap:
    """Bits in the order of the file: bit n is bit n % 8, counted from the lowest, of byte n // 8.

    `dirty` holds the numbers of pages that a bit was set in since `take_dirty`.
    """

    def __init__(self, size_bytes: int) -> None:
        self._bytes: npt.NDArray[np.uint8] = np.zeros(size_bytes, dtype=np.uint8)
        self.dirty: set[int] = set()
        self._lock = threading.Lock()  # bits are set on the event loop while a thread takes the dirty pages

    def add(self, first: int, last: int) -> None:
        """Set the bits [first, last)."""
        start, end = first // 8, (last + 7) // 8
        changed = self.preview(first, last)
        if bool(np.all(changed == self._bytes[start:end])):
            return
        with self._lock:
            self._bytes[start:end] = changed
            self.dirty.update(range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1))

    def preview(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """The bytes that hold the bits [first, last), as they would be with these set."""
        start, end = first // 8, (last + 7) // 8
        changed = self._bytes[start:end].copy()
        head, tail = 0xFF << first % 8 & 0xFF, 0xFF >> -last % 8
        if end - start == 1:
            changed[0] |= head & tail
        else:
            changed[0] |= head
            changed[1:-1] = 0xFF
            changed[-1] |= tail
        return changed

    def runs(self, first: int, last: int) -> list[Run]:
        """Where bits are set within [first, last), ascending."""
        start = first // 8
        part = self._bytes[start : (last + 7) // 8]
        if not part.any():
            return []
        bits = np.unpackbits(part, bitorder="little")[first - start * 8 : last - start * 8]
        edges = np.flatnonzero(np.diff(bits.astype(np.int8), prepend=0, append=0)) + first
        return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))

    def load(self, start: int, data: bytes) -> None:
        """Take what a file holds at byte `start` of the bitmap."""
        self._bytes[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def page(self, number: int) -> bytes:
        return self._bytes[number * PAGE_BYTES : (number + 1) * PAGE_BYTES].tobytes()

    def set_pages(self) -> list[int]:
        """The pages with a bit set, ascending."""
        return np.flatnonzero(self._bytes.reshape(-1, PAGE_BYTES).any(axis=1)).tolist()

    def take_dirty(self) -> dict[int, bytes]:
        """What the dirty pages hold now; they are clean after it."""
        with self._lock:
            pages = {number: self.page(number) for number in sorted(self.dirty)}
            self.dirty.clear()
            return pages
