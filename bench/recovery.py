"""How soon a point of a large disk can be read, how fast all of it comes back, and how fast a machine boots from it.

A disk of so many GiB is written at random, 4 KiB a write, to the same share of its size whatever that is; segments are
compressed and sealed as the process server does, into a store in memory, and indexed. Then points are chosen evenly
over the log: opening one and reading a block of it is the *first byte*. The store answers at once, so these are seconds
of our own work; `first_byte_requests` says how often storage would have to be waited for besides.

`materialise` and `recovery_boot` say what their figures are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import recovery_boot
from bench.materialise import materialise
from bench.report import Report
from bench.sealed import FRAMES_A_SEGMENT, WRITE_BYTES, WRITES_A_FRAME, SealedLog, sealed_log
from recovery.points import AtSequence, locate
from recovery.view import View
from replicar.errors import ReplicarError
from simulator import guest

DEFAULT_GIB: Final = 64
DEFAULT_POINTS: Final = 1000
#: One 4 KiB block of so many is written.
DEFAULT_SHARE: Final = 64
SMALL_GIB: Final = 4
MATERIALISED_MIB: Final = 256
#: Of the blocks of the disk that is materialised, one of so many is written anew.
REWRITTEN: Final = 8
#: Segments that the small disk's log has at least: four checkpoints.
SMALL_SEGMENTS: Final = 128
#: What a request takes in the sample that is read as over a network, and how many points that has.
ROUND_TRIP_SECONDS: Final = 0.01
FAR_POINTS: Final = 50


@dataclass
class Opened:
    """What opening points took: seconds, and requests to the store."""

    seconds: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


async def first_byte(made: SealedLog, sequence: int, random_: random.Random, opened: Opened) -> None:
    """From nothing to a block that was written before a point."""
    block = int(made.blocks[random_.randrange(made.writes_before(sequence))])
    before, began = made.store.reads, time.perf_counter()
    view = View(made.log, await locate(made.log, AtSequence(sequence), stored_number=made.segments))
    data = await view.read(view.disks[0], block * WRITE_BYTES, WRITE_BYTES)
    opened.seconds.append(time.perf_counter() - began)
    opened.requests.append(made.store.reads - before)
    assert any(data), "a block that was written holds something"


async def first_bytes(logs: list[SealedLog], points: int) -> list[Opened]:
    """Points evenly over each log; the logs in turn, so that a disturbed machine disturbs all of them."""
    random_, found = random.Random(2), [Opened() for _ in logs]
    places = [np.linspace(made.first_write, made.last_sequence, points, dtype=np.int64).tolist() for made in logs]
    for at in range(points):
        for made, sequences, opened in zip(logs, places, found, strict=True):
            await first_byte(made, sequences[at], random_, opened)
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=int, default=DEFAULT_GIB, help="GiB of the large disk (%(default)s)")
    parser.add_argument("--points", type=int, default=DEFAULT_POINTS, help="points that are opened (%(default)s)")
    parser.add_argument(
        "--share", type=int, default=DEFAULT_SHARE, help="one block of so many is written (%(default)s)"
    )
    parser.add_argument(
        "--boots", type=int, default=recovery_boot.DEFAULT_ROUNDS, help="boots from either side (%(default)s); 0: none"
    )


def run(*, gib: int, points: int, share: int, boots: int, directory: Path | None = None) -> Report:
    """The benchmark. Logs are in memory; guests boot in `directory`, which can be written past the page cache."""
    return asyncio.run(_run(gib, points, share, boots, directory))


async def _run(gib: int, points: int, share: int, boots: int, directory: Path | None) -> Report:
    figures, segments = await _opening(gib, points, share)
    blocks = (MATERIALISED_MIB << 20) // WRITE_BYTES
    figures |= await materialise(await sealed_log(MATERIALISED_MIB << 20, blocks // REWRITTEN, 5, is_copied=True))
    faults: list[str] = []
    remarks = ["the logs' store is in memory: a request costs what Python costs; see first_byte_requests"]
    if missing := guest.missing() or ("" if os.geteuid() == 0 else "its disk is made as root"):
        remarks.append(f"nothing was booted: {missing}")
    elif boots:
        with tempfile.TemporaryDirectory(prefix="replicar-boot-", dir=directory) as scratch:
            try:
                figures |= await recovery_boot.measure(Path(scratch), rounds=boots)
            except ReplicarError as error:  # the other figures stand
                faults.append(f"a guest did not boot: {error.message}")
    parameters = {"gib": gib, "small_gib": SMALL_GIB, "points": points, "share": share, "boots": boots}
    return Report("recovery", {**parameters, "segments": segments}, figures, tuple(faults), tuple(remarks))


async def _opening(gib: int, points: int, share: int) -> tuple[dict[str, Any], int]:
    blocks = (1 << 30) // WRITE_BYTES // share
    large = await sealed_log(gib << 30, gib * blocks, 1)
    # As densely written, but long enough for a point to have as many segments between it and a checkpoint.
    writes = max(SMALL_GIB * blocks, SMALL_SEGMENTS * WRITES_A_FRAME * FRAMES_A_SEGMENT)
    small = await sealed_log(SMALL_GIB << 30, writes, 3)
    of_large, of_small = await first_bytes([large, small], points)
    large.store.round_trip_seconds = ROUND_TRIP_SECONDS
    (far,) = await first_bytes([large], min(points, FAR_POINTS))
    figures = {
        "first_byte_seconds": round(max(of_large.seconds), 4),
        "first_byte_seconds_median": round(of_large.median, 4),
        "first_byte_requests": max(of_large.requests),
        "first_byte_seconds_10_ms_away": round(max(far.seconds), 4),
        "first_byte_growth": round(of_large.median / of_small.median, 3),
        "index_bytes_per_write": round(large.index_bytes / large.writes, 2),
    }
    return figures, large.segments
