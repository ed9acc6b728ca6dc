"""Opened chunks written where they belong in a file, by whatever threads opened them, one of which writes at a time.

The kernel lets one writer into a file at a time, and a thread that waits for it could open the next chunk instead. So
whoever comes while another writes leaves its batch to that one and goes on; when too many wait, it waits with them.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Final

import numpy as np

from recovery.aio import MOST_WRITES, Blocks, WriteContext, address_of, described
from recovery.files import GRANULE_BYTES, held_stretches, write_at
from recovery.plan import Copies
from replicar.errors import CorruptionError

#: Batches beyond which whoever brings another waits. Each holds the chunks that its bytes are in; there are this many,
#: one more of each thread, and the one that is being written.
MOST_WAITING: Final = 4


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is to be written, described for the kernel, and the chunks it lies in, which have to stay."""

    chunks: Sequence[memoryview]
    blocks: Blocks
    total_bytes: int


class FileWriter:
    """Writes into a file that holds nothing but zeros: zeros that are worth a hole are left out.

    Args:
        descriptor: of the file.
        context: by which many writes are one call; None: each is one.
    """

    def __init__(self, descriptor: int, context: WriteContext | None) -> None:
        self.written_bytes = 0
        self._descriptor, self._context = descriptor, context
        self._batches: deque[_Batch] = deque()
        self._writing = threading.Lock()
        self._failed: BaseException | None = None

    def write(self, chunks: Sequence[memoryview], wanted: Sequence[Copies]) -> None:
        """Write what is wanted of some opened chunks, one of `wanted` for each. For threads, several at once: when all
        of them have returned, all is written.

        Raises:
            CorruptionError: more is wanted of a chunk than it has.
            OSError: a write failed, of this batch or of another; nothing is written any more then.
        """
        self._batches.append(self._described(chunks, wanted))
        # Looked at again after every release: what came between the last look and the release was left to this thread.
        while self._batches and self._writing.acquire(blocking=len(self._batches) > MOST_WAITING):
            try:
                if self._failed is not None:
                    self._batches.clear()
                    raise self._failed
                while self._batches:
                    self._put(self._batches.popleft())
            except BaseException as error:
                self._failed = error
                raise
            finally:
                self._writing.release()

    def _described(self, chunks: Sequence[memoryview], wanted: Sequence[Copies]) -> _Batch:
        address: list[int] = []
        offset: list[int] = []
        length: list[int] = []
        for chunk, copies in zip(chunks, wanted, strict=True):
            end = max(map(add, copies.source, copies.length))
            if end > len(chunk) or min(copies.source) < 0:
                raise CorruptionError(f"the index names byte {end} of a chunk that has {len(chunk)}")
            held = _without_zeros(chunk, copies) if max(copies.length) > GRANULE_BYTES else copies
            base = address_of(chunk)
            address += [base + source for source in held.source]
            offset += held.target
            length += held.length
        rows = (np.array(column, np.int64) for column in (address, length, offset))
        return _Batch(chunks, described(self._descriptor, *rows), sum(length))

    def _put(self, batch: _Batch) -> None:
        """One thread at a time; so nothing is done here that could have been done before."""
        for first in range(0, len(batch.blocks), MOST_WRITES):
            blocks = batch.blocks[first : first + MOST_WRITES]
            if self._context is None:
                left = np.arange(len(blocks))
            else:
                left = np.flatnonzero(self._context.write(blocks) != blocks["length"].astype(np.int64))
            for row in left.tolist():  # what was not done together is done, or fails with a reason, alone
                at, count = int(blocks["address"][row]), int(blocks["length"][row])
                data = memoryview((ctypes.c_char * count).from_address(at)).cast("B")
                write_at(self._descriptor, data, int(blocks["offset"][row]))
        self.written_bytes += batch.total_bytes


def _without_zeros(chunk: memoryview, copies: Copies) -> Copies:
    """The same copies without stretches of zeros that are worth a hole."""
    held = Copies(copies.chunk, [], [], [])
    for source, target, length in zip(copies.source, copies.target, copies.length, strict=True):
        piece = chunk[source : source + length]
        stretches = held_stretches(piece) if length > GRANULE_BYTES else [(0, length)]
        for start, end in stretches:
            held.source.append(source + start)
            held.target.append(target + start)
            held.length.append(end - start)
    return held
