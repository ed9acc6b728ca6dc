"""How soon a point of a large disk can be read, and how fast all of it comes back, from a log that was really sealed.

A disk of so many GiB is written at random, 4 KiB a write, to the same share of its size whatever that is; segments are
compressed and sealed as the process server does, into a store in memory, and indexed. Then points are chosen evenly
over the log: opening one and reading a block of it is the *first byte*. The store answers at once, so these are seconds
of our own work; `first_byte_requests` says how often storage would have to be waited for besides.

`materialise_ratio` compares writing a whole disk into memory with decrypting and decompressing the same chunks and
copying them, one after the other in two threads, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zstandard

from bench.measure import cores
from bench.report import Report
from recovery.chunks import MachineLog
from recovery.indexing import make_index
from recovery.points import AtSequence, Latest, locate
from recovery.view import Piece, View
from replicar.clock import SystemClock
from replicar.formats import frame, logblob, segment
from replicar.formats.frame import Flag, Kind
from replicar.formats.logblob import BlobHeader, BlobName
from replicar.formats.record import Disk, Gap, pack_record
from replicar.log.reader import LogReader
from replicar.log.tail import Stored
from replicar.storage import MemoryStore

DEFAULT_GIB: Final = 64
DEFAULT_POINTS: Final = 1000
#: One 4 KiB block of so many is written.
DEFAULT_SHARE: Final = 64
SMALL_GIB: Final = 4
WRITE_BYTES: Final = 4096
WRITES_A_FRAME: Final = 250
FRAMES_A_SEGMENT: Final = 4
MATERIALISED_MIB: Final = 256
#: Segments that the small disk's log has at least: four checkpoints.
SMALL_SEGMENTS: Final = 128
_START_NS: Final = 1_780_000_000_000_000_000


class CountingStore(MemoryStore):
    """Counts reads."""

    reads = 0

    async def read(self, name: str, offset: int, length: int) -> bytes:
        self.reads += 1
        return await super().read(name, offset, length)


@dataclass
class SealedLog:
    """A machine's log in memory, and how it came to be."""

    log: MachineLog
    store: CountingStore
    segments: int
    writes: int
    last_sequence: int
    digest: bytes
    index_bytes: int = 0


async def sealed_log(gib: int, writes: int, seed: int) -> SealedLog:
    """A disk of `gib` GiB, written at random so often; half of every block is noise."""
    random_ = np.random.default_rng(seed)
    store, machine, key = CountingStore(), uuid.UUID(int=gib + 1, version=4), os.urandom(32)
    await store.ensure_container()
    name = BlobName(machine, 1, 1, 0)
    await store.create(str(name), 64 << 30)
    header = BlobHeader(name, 1, 1, segment.FIRST_DIGEST, 1, bytes(logblob.WRAPPED_KEY_BYTES), _START_NS)
    await store.put_pages(str(name), 0, header.pack())
    compressor = zstandard.ZstdCompressor(level=1)
    noise = random_.integers(0, 256, 4 << 20, dtype=np.uint8).tobytes()
    sequence, place, number, digest, done = 1, logblob.HEADER_BYTES, 1, segment.FIRST_DIGEST, 0
    frames = [_beginning(machine, gib)]
    sequence += 3
    first = 1
    while done < writes or frames:
        while done < writes and len(frames) < FRAMES_A_SEGMENT:
            count = min(WRITES_A_FRAME, writes - done)
            blocks = random_.integers(0, (gib << 30) // WRITE_BYTES, count)
            frames.append(_frame(machine, sequence, blocks, noise, int(random_.integers(0, 3 << 20))))
            sequence, done = sequence + count, done + count
        raw = memoryview(b"".join(frames))
        where = segment.Position(machine, 1, 1, number, first, sequence - 1)
        chunks = segment.seal_chunks(raw, where, key, os.urandom(32), compressor)
        data, digest = segment.finish(chunks, list(frame.frames_in(raw)), digest)
        await store.put_pages(str(name), place, data)
        place, number, first, frames = place + len(data), number + 1, sequence, []
    log = MachineLog(store, machine, {1: key})
    made = SealedLog(log, store, number - 1, writes, sequence - 1, digest)
    stored = Stored(made.segments, made.last_sequence, digest)
    made.index_bytes = (await make_index(log, clock=SystemClock(), random=os.urandom, stored=stored)).written_bytes
    return made


def _beginning(machine: uuid.UUID, gib: int) -> bytes:
    records = [pack_record(Disk(0, "disk0", gib << 30)), pack_record(Gap("seeding")), pack_record(Gap("seeded"))]
    kinds = ((Kind.DISK, Flag(0)), (Kind.GAP, Flag.GAP_BEGIN), (Kind.GAP, Flag.GAP_END))
    table, payload = b"", b""
    for (kind, flags), data in zip(kinds, records, strict=True):
        table += frame.describe(kind, length=len(data), time_ns=_START_NS, place=len(payload), flags=flags)
        payload += data
    return frame.build_frame(machine, 1, table, payload)


def _frame(machine: uuid.UUID, sequence: int, blocks: Any, noise: bytes, at: int) -> bytes:
    table, payload = bytearray(), bytearray()
    for row, block in enumerate(blocks.tolist()):
        place = len(payload)
        half = WRITE_BYTES // 2
        start = at + row * half
        payload += noise[start : start + half] + bytes(half)
        table += frame.describe(
            Kind.WRITE, offset=block * WRITE_BYTES, length=WRITE_BYTES, time_ns=_START_NS + sequence + row, place=place
        )
    return frame.build_frame(machine, sequence, bytes(table), bytes(payload))


async def first_bytes(made: SealedLog, points: int, seed: int) -> tuple[list[float], list[int]]:
    """Seconds and requests from nothing to a block of each point."""
    random_ = random.Random(seed)
    seconds, requests = [], []
    for sequence in np.linspace(3, made.last_sequence, points, dtype=np.int64).tolist():
        before, began = made.store.reads, time.perf_counter()
        view = View(made.log, await locate(made.log, AtSequence(sequence), stored_number=made.segments))
        disk = view.disks[0]
        await view.read(disk, random_.randrange(disk.size_bytes // WRITE_BYTES) * WRITE_BYTES, WRITE_BYTES)
        seconds.append(time.perf_counter() - began)
        requests.append(made.store.reads - before)
    return seconds, requests


async def materialise(made: SealedLog) -> tuple[float, float]:
    """MB/s of a disk from a view into memory, and of the raw steps alone."""
    view = View(made.log, await locate(made.log, Latest(), stored_number=made.segments))
    disk = view.disks[0]
    total = 0

    async def sink(pieces: Sequence[Piece]) -> None:
        nonlocal total
        target = bytearray(max(len(data) for _, data in pieces))
        for _, data in pieces:
            target[: len(data)] = data
            total += len(data)

    began = time.perf_counter()
    await view.copy(disk, sink, hole_bytes=0)
    ours = total / (time.perf_counter() - began) / 1e6
    reader = LogReader(made.store, made.log.machine_id, made.log.keys)
    parts = [(found, await reader.read_sealed(found)) async for found in reader.segments()]
    began, opened = time.perf_counter(), 0

    def one(part: Any) -> int:
        data = reader.open_run(*part)
        bytearray(len(data))[:] = data
        return len(data)

    with ThreadPoolExecutor(cores()) as pool:
        opened = sum(pool.map(one, parts))
    return ours, opened / (time.perf_counter() - began) / 1e6


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=int, default=DEFAULT_GIB, help="GiB of the large disk (%(default)s)")
    parser.add_argument("--points", type=int, default=DEFAULT_POINTS, help="points that are opened (%(default)s)")
    parser.add_argument(
        "--share", type=int, default=DEFAULT_SHARE, help="one block of so many is written (%(default)s)"
    )


def run(*, gib: int, points: int, share: int, directory: Path | None = None) -> Report:
    """The benchmark. Nothing is written to `directory`: everything is in memory."""
    return asyncio.run(_run(gib, points, share))


async def _run(gib: int, points: int, share: int) -> Report:
    blocks = (1 << 30) // WRITE_BYTES // share
    large = await sealed_log(gib, gib * blocks, 1)
    seconds, requests = await first_bytes(large, points, 2)
    per_write = large.index_bytes / large.writes
    segments = large.segments
    del large
    # As densely written, but long enough for a point to have as many segments between it and a checkpoint.
    small = await sealed_log(SMALL_GIB, max(SMALL_GIB * blocks, SMALL_SEGMENTS * WRITES_A_FRAME * FRAMES_A_SEGMENT), 3)
    small_seconds, _ = await first_bytes(small, points, 4)
    del small
    writes = (MATERIALISED_MIB << 20) // WRITE_BYTES
    ours, raw = await materialise(await sealed_log(SMALL_GIB, writes, 5))
    median, small_median = statistics.median(seconds), statistics.median(small_seconds)
    return Report(
        "recovery",
        {"gib": gib, "small_gib": SMALL_GIB, "points": points, "share": share, "segments": segments},
        {
            "first_byte_seconds": round(max(seconds), 4),
            "first_byte_seconds_median": round(median, 4),
            "first_byte_requests": max(requests),
            "first_byte_growth": round(median / small_median, 3),
            "materialise_ratio": round(ours / raw, 3),
            "materialise_mb_per_second": round(ours, 1),
            "raw_mb_per_second": round(raw, 1),
            "index_bytes_per_write": round(per_write, 2),
        },
        remarks=("the store is in memory: a request costs what Python costs; see first_byte_requests",),
    )
