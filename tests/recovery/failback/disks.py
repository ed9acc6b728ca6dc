"""Disks in memory that count what passes, and can be made to fail."""

from __future__ import annotations


class MemoryDisk:
    """A disk; `written` counts bytes, and after `fail_after` of its writes every other one fails."""

    def __init__(self, data: bytes, *, fail_after: int | None = None) -> None:
        self.data = bytearray(data)
        self.written = 0
        self.flushes = 0
        self._left = fail_after

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.data)
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        if self._left is not None:
            if self._left == 0:
                raise OSError("the disk is gone")
            self._left -= 1
        assert offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data
        self.written += len(data)

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length))
        self.written -= length

    async def flush(self) -> None:
        self.flushes += 1
