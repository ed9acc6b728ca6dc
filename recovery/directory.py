"""Where the segments are that an index names, and what opens their chunks.

An *entry* has a segment's header, its place and its digest: enough to fetch the table in one request and to know that
it is the very one which was indexed. Entries lie in pages of a tier, sorted by number; a reader loads the pages it
needs, and the tables of the segments it reads from, and keeps the ones it used last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from recovery.chunks import MachineLog, slim
from replicar.errors import CorruptionError
from replicar.formats import segment
from replicar.formats.segment import DIGEST_BYTES, HEADER_BYTES, SegmentHeader
from replicar.log.reader import Segment

ENTRY: Final = np.dtype(
    [
        *(("blob", "<u4"), ("reserved", "<u4"), ("offset", "<u8")),
        *(("digest", f"V{DIGEST_BYTES}"), ("header", f"V{HEADER_BYTES}")),
    ]
)
#: Of a page; 240 KiB before compression.
PAGE_ENTRIES: Final = 1024
#: Opened tables that a reader keeps; 2 to 3 KiB each without their descriptors.
TABLES_KEPT: Final = 8192


@dataclass(frozen=True, slots=True)
class Located:
    """A segment's header, its digest (what the next one names), and where it lies."""

    header: SegmentHeader
    digest: bytes
    blob: str
    offset: int

    @property
    def number(self) -> int:
        return self.header.position.number


def located(found: Segment) -> Located:
    return Located(found.table.header, found.table.digest, found.blob, found.offset)


def pack_entries(items: Sequence[Located], blobs: Mapping[str, int]) -> bytes:
    """A page of entries; `blobs` numbers the blobs' names."""
    rows = np.zeros(len(items), dtype=ENTRY)
    for row, item in enumerate(items):
        rows[row] = (blobs[item.blob], 0, item.offset, item.digest, item.header.pack())
    return rows.tobytes()


def unpack_entries(data: bytes, blobs: Sequence[str], what: str) -> dict[int, Located]:
    """The entries of a page by number.

    Raises:
        CorruptionError: it is no such page.
    """
    if not data or len(data) % ENTRY.itemsize or len(data) > PAGE_ENTRIES * ENTRY.itemsize:
        raise CorruptionError(f"{what} has {len(data)} bytes")
    rows: np.ndarray[Any, Any] = np.frombuffer(data, dtype=ENTRY)
    found = {}
    for blob, _, offset, digest, raw in rows.tolist():
        header = segment.read_header(bytes(raw))
        if header is None or blob >= len(blobs):
            raise CorruptionError(f"{what} has an entry without a segment")
        found[header.position.number] = Located(header, bytes(digest), blobs[blob], offset)
    return found


class Tables:
    """Opened tables of a machine's segments, without their descriptors; the ones used last are kept."""

    def __init__(self, log: MachineLog) -> None:
        self._log = log
        self._kept: OrderedDict[int, Segment] = OrderedDict()

    async def open(self, item: Located) -> Segment:
        """The segment, ready for its chunks to be fetched.

        Raises:
            CorruptionError: it is not the one that was indexed, or damaged.
        """
        found = self._kept.get(item.number)
        if found is None:
            found = slim(await read_segment(self._log, item))
            self._kept[item.number] = found
            if len(self._kept) > TABLES_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(item.number)
        return found


async def read_segment(log: MachineLog, item: Located) -> Segment:
    """Fetch and open the table of a segment.

    Raises:
        CorruptionError: it is not the one that was indexed, or damaged.
    """
    header = item.header
    sealed = await log.store.read(item.blob, item.offset + header.table_offset, header.table_bytes)
    table = segment.open_table(header, sealed, log.key(header.key_id)) if any(sealed) else None
    if table is None or table.digest != item.digest:
        raise CorruptionError(
            f"segment {item.number} is not there any more as it was indexed",
            hint="it was altered in storage, or what it held was given up by retention; choose a point that is kept",
            number=item.number,
            blob=item.blob,
            offset=item.offset,
        )
    return Segment(table, item.blob, item.offset)


def pages_of(items: Iterable[Located]) -> list[list[Located]]:
    """Entries sorted by number, cut into pages."""
    ordered = sorted(items, key=lambda item: item.number)
    return [ordered[start : start + PAGE_ENTRIES] for start in range(0, len(ordered), PAGE_ENTRIES)]
