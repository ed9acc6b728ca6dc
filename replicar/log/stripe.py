"""One blob of a log, walked from segment to segment."""

from __future__ import annotations

from typing import Final

from replicar.errors import CorruptionError, PermanentError
from replicar.formats import logblob, segment
from replicar.formats.segment import SegmentHeader
from replicar.storage.store import PageBlobStore, is_gone

#: What one request reads at least; a table of a segment full of 4 KiB writes is about 20 KiB.
WINDOW_BYTES: Final = 64 << 10


class GoneError(Exception):
    """A blob that was listed is not there any more: a signal to the reader, which lists them anew."""


async def read_listed(store: PageBlobStore, name: str, offset: int, length: int) -> bytes:
    try:
        return await store.read(name, offset, length)
    except PermanentError as error:
        if is_gone(error):
            raise GoneError from error
        raise


class Stripe:
    """A place in a blob, and the window of it that was read last."""

    def __init__(self, store: PageBlobStore, name: str, size_bytes: int, offset: int | None) -> None:
        self.name = name
        self.offset = offset or logblob.HEADER_BYTES
        self._store = store
        self._size = size_bytes
        self._window, self._window_offset = b"", 0

    async def seek(self, number: int) -> SegmentHeader | None:
        """Go to segment `number`; its header, or None if the next one here has a higher number, or nothing is here.

        Raises:
            CorruptionError: something lies on the way that is no segment.
        """
        while self.offset + segment.HEADER_BYTES <= self._size:
            header = segment.read_header(await self.read(self.offset, segment.HEADER_BYTES))
            if header is None or header.position.number >= number:
                return header if header is not None and header.position.number == number else None
            self.offset += header.total_bytes
        return None

    async def highest(self, limit: int) -> int:
        """The highest number from the current place on, as far as segments can be walked and up to `limit`; or 0."""
        number = 0
        try:
            while self.offset + segment.HEADER_BYTES <= self._size and number < limit:
                header = segment.read_header(await self.read(self.offset, segment.HEADER_BYTES))
                if header is None:
                    break
                number = max(number, header.position.number)
                self.offset += header.total_bytes
        except CorruptionError:
            pass  # something else lies there; what was seen before counts
        return number

    async def read(self, offset: int, length: int) -> bytes:
        start = offset - self._window_offset
        if start < 0 or start + length > len(self._window):
            wanted = min(max(length, WINDOW_BYTES), self._size - offset)
            if wanted < length:
                raise CorruptionError(f"a segment of {self.name} reaches beyond the blob's end", blob=self.name)
            self._window, self._window_offset = await read_listed(self._store, self.name, offset, wanted), offset
            start = 0
        return self._window[start : start + length]
