"""CRCs of many blocks at once, as file systems keep them.

Python has no CRC-32C and no CRC-16, and a loop over bytes would take minutes for a large disk. All blocks are the rows
of one table here, and numpy goes through it column after column: the step from byte to byte can't be had at once, that
from block to block can.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_CRC32C: Final = 0x82F63B78
_CRC16: Final = 0xA001


def _table(polynomial: int) -> npt.NDArray[np.uint32]:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ polynomial, values >> 1).astype(np.uint32)
    return values


_TABLES: Final = {polynomial: _table(polynomial) for polynomial in (_CRC32C, _CRC16)}


def crc32c(rows: npt.NDArray[np.uint8], begin: int | npt.NDArray[np.uint32] = 0xFFFFFFFF) -> npt.NDArray[np.uint32]:
    """The CRC-32C of every row, not inverted at the end. Shape (rows, bytes) to (rows,).

    Args:
        begin: what it goes on from, for all rows or for each.
    """
    return _crc(rows, begin, _CRC32C)


def crc16(rows: npt.NDArray[np.uint8], begin: int | npt.NDArray[np.uint32] = 0xFFFF) -> npt.NDArray[np.uint32]:
    """The same for CRC-16 with the polynomial 0x8005, reflected."""
    return _crc(rows, begin, _CRC16)


def crc32c_of(data: bytes, begin: int = 0xFFFFFFFF) -> int:
    """The CRC-32C of one block, not inverted at the end."""
    return int(crc32c(np.frombuffer(data, np.uint8).reshape(1, -1), begin)[0])


def _crc(rows: npt.NDArray[np.uint8], begin: int | npt.NDArray[np.uint32], polynomial: int) -> npt.NDArray[np.uint32]:
    table = _TABLES[polynomial]
    found = np.empty(len(rows), np.uint32)
    found[:] = begin
    for column in np.ascontiguousarray(rows.T):
        found = table[(found ^ column) & 0xFF] ^ (found >> np.uint32(8))
    return found
