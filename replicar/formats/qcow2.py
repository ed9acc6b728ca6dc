"""A qcow2 image, version 3, as simple as one can be: one level of everything, clusters of 64 KiB, each used once.

    header | L1 table | clusters of data as they came | L2 tables | refcount blocks | refcount table

`Layout` gives clusters places while a disk is written in any order, and then the metadata that says where they are. The
format is QEMU's, https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.rst; numbers are big-endian.

Weak: where clusters lie is in memory until the end, 8 bytes each, so 128 MiB for a full disk of 1 TiB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

CLUSTER_BITS: Final = 16
CLUSTER_BYTES: Final = 1 << CLUSTER_BITS
_L2_ENTRIES: Final = CLUSTER_BYTES // 8
#: Bytes of the disk that one L2 table is about: 512 MiB.
_L2_SPAN: Final = _L2_ENTRIES * CLUSTER_BYTES
_REFCOUNT_ORDER: Final = 4  # 16 bits
_REFCOUNTS: Final = CLUSTER_BYTES * 8 >> _REFCOUNT_ORDER
#: "Refcount is exactly one": the cluster is written in place.
_COPIED: Final = 1 << 63
#: magic, version, backing file (none), cluster_bits, size, no encryption, L1 size and place, refcount table's place and
#: clusters, no snapshots, no features, refcount order, length of the header; then the end of its extensions.
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII8x")


class Layout:
    """Where the clusters of one image are."""

    def __init__(self, disk_bytes: int) -> None:
        self._size = disk_bytes
        self._tables: dict[int, npt.NDArray[np.uint64]] = {}
        self._l1_entries = -(-disk_bytes // _L2_SPAN)
        self._l1_clusters = -(-self._l1_entries * 8 // CLUSTER_BYTES)
        self._next = 1 + self._l1_clusters

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Where bytes of the disk go: (offset in the file, start, end), both of these counted from `offset`."""
        begun: tuple[int, int, int] | None = None
        at = 0
        while at < length:
            within = (offset + at) % CLUSTER_BYTES
            size = min(CLUSTER_BYTES - within, length - at)
            place = self._place((offset + at) // CLUSTER_BYTES) + within
            if begun is not None and begun[0] + begun[2] - begun[1] == place:
                begun = (begun[0], begun[1], at + size)
            else:
                if begun is not None:
                    yield begun
                begun = (place, at, at + size)
            at += size
        if begun is not None:
            yield begun

    def finish(self) -> tuple[int, list[tuple[int, bytes]]]:
        """The file's length, and what else to write, as (offset, bytes); the header comes last."""
        writes: list[tuple[int, bytes]] = []
        l1 = np.zeros(self._l1_clusters * _L2_ENTRIES, dtype=np.uint64)
        for index, table in sorted(self._tables.items()):
            place = self._take() * CLUSTER_BYTES
            l1[index] = place | _COPIED
            writes.append((place, table.astype(">u8").tobytes()))
        blocks, table_clusters = self._refcount_clusters()
        first_block = self._next
        total = first_block + blocks + table_clusters
        counts = np.zeros(blocks * _REFCOUNTS, dtype=np.uint16)
        counts[:total] = 1
        writes.append((first_block * CLUSTER_BYTES, counts.astype(">u2").tobytes()))
        places = (np.arange(blocks, dtype=np.uint64) + first_block) * CLUSTER_BYTES
        writes.append(((first_block + blocks) * CLUSTER_BYTES, places.astype(">u8").tobytes()))
        writes.append((CLUSTER_BYTES, l1.astype(">u8").tobytes()))
        header = _HEADER.pack(
            *(b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, self._size, 0, self._l1_entries, CLUSTER_BYTES),
            *((first_block + blocks) * CLUSTER_BYTES, table_clusters, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER.size - 8),
        )
        return total * CLUSTER_BYTES, [*writes, (0, header)]

    def _refcount_clusters(self) -> tuple[int, int]:
        """Refcount blocks and clusters of their table, which count themselves."""
        blocks = table = 1
        while True:
            total = self._next + blocks + table
            needed = -(-total // _REFCOUNTS)
            wanted = (needed, -(-needed * 8 // CLUSTER_BYTES))
            if wanted == (blocks, table):
                return wanted
            blocks, table = max(blocks, wanted[0]), max(table, wanted[1])

    def _place(self, cluster: int) -> int:
        """Where a cluster of the disk lies; it gets its place when it is first asked for."""
        index, entry = divmod(cluster, _L2_ENTRIES)
        table = self._tables.get(index)
        if table is None:
            table = self._tables[index] = np.zeros(_L2_ENTRIES, dtype=np.uint64)
        known = int(table[entry])
        if not known:
            known = self._take() * CLUSTER_BYTES | _COPIED
            table[entry] = known
        return known & ~_COPIED

    def _take(self) -> int:
        self._next += 1
        return self._next - 1
