"""Bursts and pauses for a long time: memory stays flat, the cache stays bounded, and what is recovered is the truth.

A machine is mostly idle and now and then busy, for minutes here and for half an hour in `make nightly`.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from simulator.child import Child
from simulator.cluster import MIB
from tests.end_to_end.stage import Stage, stage

CACHE_BYTES = 64 * MIB
BURST_SECONDS, PAUSE_SECONDS = 2.0, 6.0
BURST_BYTES_PER_SECOND = 6e6
#: Before this share of the time is over, buffers and caches of the interpreter's own are still being filled.
WARM_SHARE = 0.35
#: What a process may seem to grow by over the rest of it: pages that it touches for the first time.
GROWTH_MIB = 24.0
#: What recovery may take for each minute of the log, on a busy machine.
RECOVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Sample:
    """What the parts have in memory (MiB) and the server in its cache (bytes), at a moment."""

    seconds: float
    memory: dict[str, float]
    cache_bytes: int


def memory_mib(child: Child) -> float:
    assert child.process_id is not None
    for line in Path(f"/proc/{child.process_id}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("a process without memory")


def cache_used(here: Stage) -> int:
    status = json.loads((here.cluster.process_server_directory / "status.json").read_text())
    return int(status["cache_bytes"] - status["cache_bytes_free"])


def grown_mib(samples: list[Sample], part: str) -> float:
    """By a straight line through the samples, which one of them alone can't bend."""
    seconds, memory = np.array([(each.seconds, each.memory[part]) for each in samples]).T
    return float(np.polyfit(seconds, memory, 1)[0] * (seconds[-1] - seconds[0]))


async def bursts(here: Stage, seconds: float) -> list[Sample]:
    """Write and wait, by turns; a look at the parts after each."""
    samples, began, number = [], time.monotonic(), 0
    while time.monotonic() - began < seconds:
        number += 1
        async with here.writing(bytes_per_second=BURST_BYTES_PER_SECOND, seed=number):
            await asyncio.sleep(BURST_SECONDS)
        at_its_fullest = cache_used(here)
        await asyncio.sleep(PAUSE_SECONDS)
        memory = {child.name: memory_mib(child) for child in here.cluster.children}
        samples.append(Sample(time.monotonic() - began, memory, max(at_its_fullest, cache_used(here))))
    return samples


@pytest.mark.parametrize(
    "minutes",
    [
        pytest.param(2, marks=pytest.mark.timeout(420)),
        pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(3600 + 600)]),
    ],
)
async def test_bursts_leave_memory_flat_the_cache_bounded_and_the_disk_true(tmp_path: Path, minutes: int) -> None:
    async with stage(tmp_path, process_server_settings={"cache_bytes": CACHE_BYTES}) as here:
        samples = await bursts(here, minutes * 60.0)
        await here.settle()
        assert max(each.cache_bytes for each in samples) <= CACHE_BYTES
        warm = [each for each in samples if each.seconds >= WARM_SHARE * minutes * 60]
        grown = {part: grown_mib(warm, part) for part in warm[0].memory}
        assert max(grown.values()) < GROWTH_MIB, f"MiB grown by: {grown}; {samples}"
        # Nobody indexes here, so the whole log is read: some five small segments for each second of a burst.
        comparison = await here.recover("--latest", limit_seconds=RECOVERY_SECONDS * minutes)
        assert comparison.equal, str(comparison)
        assert comparison.changes_required > 100 * minutes
