"""How fast a whole disk comes back, beside the same work done by the libraries alone; the two in turn, in one run.

The disk was replicated as disks are: all of it in writes of 1 MiB, then an eighth of its blocks anew at random, 4 KiB
each. Ours is a view copied into a file, as `replicar recover --raw` writes it. The raw side opens the very same chunks
(AES-256-GCM, then zstd) in a thread a core, and writes as many bytes into such a file one after the other: it knows
beforehand where everything lies, checks no structure and puts nothing in its place. Files are in memory (memfd), so no
disk is measured. Rounds alternate, so that a disturbed machine disturbs both; each round gives a ratio of its own, of
wall-clock time and of processor time, and the median counts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import zstandard

from bench.measure import cores, own_cpu
from bench.sealed import SealedLog
from recovery.output import copy_to_file
from recovery.points import Latest, locate
from recovery.view import View
from replicar.formats import cipher, segment
from replicar.log.reader import LogReader, Segment

DEFAULT_ROUNDS: Final = 7


@dataclass(frozen=True, slots=True)
class _Side:
    seconds: float
    cpu_seconds: float


async def materialise(made: SealedLog, *, rounds: int = DEFAULT_ROUNDS) -> dict[str, Any]:
    """Both sides in turn; ratios are raw by ours, so 1 is as fast as the libraries."""
    reader = LogReader(made.store, made.log.machine_id, made.log.keys)
    parts = [(found, await reader.read_sealed(found)) async for found in reader.segments()]
    made.store.remembers = True  # from the round that warms up; the raw side has its bytes at hand as well
    opening = [_opener(found, data, made.log.key(found.table.header.key_id)) for found, data in parts]
    ours: list[_Side] = []
    raw: list[_Side] = []
    total = 0
    for _ in range(rounds + 1):
        side, total = await _ours(made)
        ours.append(side)
        raw.append(_raw(opening, total))
    pairs = list(zip(ours, raw, strict=True))[1:]  # the first round warms up
    wall = [theirs.seconds / mine.seconds for mine, theirs in pairs]
    cpu = [theirs.cpu_seconds / mine.cpu_seconds for mine, theirs in pairs]
    return {
        "materialise_ratio": round(statistics.median(wall), 3),
        "materialise_ratios": [round(value, 3) for value in wall],
        "materialise_cpu_ratio": round(statistics.median(cpu), 3),
        "materialise_mb_per_second": round(total / statistics.median(side.seconds for side in ours[1:]) / 1e6, 1),
        "raw_mb_per_second": round(total / statistics.median(side.seconds for side in raw[1:]) / 1e6, 1),
    }


async def _ours(made: SealedLog) -> tuple[_Side, int]:
    view = View(made.log, await locate(made.log, Latest(), stored_number=made.segments))
    disk = view.disks[0]
    file = os.memfd_create("ours")
    try:
        os.ftruncate(file, disk.size_bytes)
        before, began = own_cpu(), time.perf_counter()
        written = await copy_to_file(view, disk, file)
        return _Side(time.perf_counter() - began, (own_cpu() - before).total), written
    finally:
        os.close(file)


def _opener(found: Segment, sealed: bytes, data_key: bytes) -> Callable[[], list[bytes]]:
    """What opens all chunks of a segment, with nothing left to look up."""
    header, edges = found.table.header, found.table.chunk_offsets
    key = cipher.segment_key(data_key, header.salt, header.position)
    chunks = []
    for index, entry in enumerate(found.table.chunks):
        codec = int(entry["codec"])
        raw_bytes = min(header.chunk_bytes, header.raw_bytes - index * header.chunk_bytes)
        body = sealed[int(edges[index]) : int(edges[index + 1])]
        associated = cipher.chunk_data(header.position, index, raw_bytes, codec)
        chunks.append((cipher.nonce(index + 1), body, associated, codec == segment.CODEC_ZSTD))

    def opened() -> list[bytes]:
        decompressor = zstandard.ZstdDecompressor()
        plain = (key.decrypt(nonce, body, data) for nonce, body, data, _ in chunks)
        return [decompressor.decompress(each) if chunk[3] else each for each, chunk in zip(plain, chunks, strict=True)]

    return opened


def _raw(opening: Sequence[Callable[[], list[bytes]]], total: int) -> _Side:
    file = os.memfd_create("raw")

    def one(opener: Callable[[], list[bytes]], at: int) -> None:
        for data in opener():
            os.pwrite(file, data[: max(min(len(data), total - at), 0)], at)
            at += len(data)

    try:
        os.ftruncate(file, total)
        share = total // len(opening) + 1
        before, began = own_cpu(), time.perf_counter()
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(one, opening, [number * share for number in range(len(opening))]))
        return _Side(time.perf_counter() - began, (own_cpu() - before).total)
    finally:
        os.close(file)
