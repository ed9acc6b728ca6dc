"""Columns of numbers, packed so that zstd finds what they have in common.

A page of an index is a table of 64-bit numbers whose columns rise slowly, or repeat, or are small. Each column is
stored as the differences of its numbers (the first one from 0), the sign folded into the lowest bit, and split into
eight *planes*: first the lowest byte of every number, then the next, up to the highest. Planes of zeros cost nothing
once compressed; 4 KiB writes at random take 7 to 8 bytes each this way, writes in order less than 2.

    rows u32 | columns u32 | for each column: eight planes of `rows` bytes
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from replicar.errors import CorruptionError
from replicar.formats.frame import Buffer

Ints = npt.NDArray[np.int64]

_HEAD = struct.Struct("<II")
_PLANES: Final = 8
#: Rows of a page; four columns of them are 256 KiB before compression.
MAX_ROWS: Final = 8192


def pack_columns(columns: Sequence[Ints]) -> bytes:
    """The page of columns of equal length, 1 to MAX_ROWS rows."""
    rows = len(columns[0])
    if not 0 < rows <= MAX_ROWS or any(len(column) != rows for column in columns):
        raise ValueError(f"a page of {[len(column) for column in columns]} rows")
    parts = [_HEAD.pack(rows, len(columns))]
    for column in columns:
        step = np.diff(column, prepend=np.int64(0))
        folded = ((step << 1) ^ (step >> 63)).astype("<u8")
        parts.append(np.ascontiguousarray(folded.view(np.uint8).reshape(rows, _PLANES).T).tobytes())
    return b"".join(parts)


def unpack_columns(data: Buffer, columns: int, what: str) -> list[Ints]:
    """The columns of a page.

    Raises:
        CorruptionError: it is none with so many columns.
    """
    if len(data) < _HEAD.size:
        raise CorruptionError(f"{what} is too short")
    rows, count = _HEAD.unpack_from(data)
    if count != columns or not 0 < rows <= MAX_ROWS or len(data) != _HEAD.size + rows * columns * _PLANES:
        raise CorruptionError(f"{what} claims {rows} rows of {count} columns")
    planes = np.frombuffer(data, np.uint8, offset=_HEAD.size).reshape(columns, _PLANES, rows)
    found = []
    for column in planes:
        folded = np.ascontiguousarray(column.T).reshape(-1).view("<u8").astype(np.uint64)
        step = (folded >> np.uint64(1)).astype(np.int64) ^ -(folded & np.uint64(1)).astype(np.int64)
        found.append(np.cumsum(step, dtype=np.int64))
    return found
