"""The process server is away while ten times the journal is written: nobody waits, the stream says so, and it mends.

How long a write waits is the whole machine's affair, so the bound is held twice. By default beside other tests, with a
floor that only a wait for the server would pass; and, as a soak, by itself: the same load in turns with and without the
server, and the median of the rounds' p99 without it is at most twice that with it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from replicar.nbd.client import NbdClient
from simulator.demo.story import moment
from tests.end_to_end.stage import DISK, DISK_BYTES, Stage, stage

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20
JOURNAL_BYTES = 16 * MIB
WRITE_BYTES = 64 << 10
#: At 25 MB/s a journal of 16 MiB takes less than a second; a status is a second old, and its rate is of some more.
FULL_SECONDS = 60
#: While the server is away only this much of the disk is written, again and again.
BUSY_BYTES = 8 * MIB
#: A write that waits less than this is not waiting for the server: tests beside this one make that much noise. Alone on
#: two cores it was 6 ms before and 2 ms while it was away; one that waited for room in the log would wait for seconds.
FLOOR_SECONDS = 0.100
#: The same where nothing else runs: less than this is scheduling, whoever is waited for.
QUIET_FLOOR_SECONDS = 0.004
#: Turns with and without the server, and their writes a second, which the server keeps up with.
ROUNDS = 5
ROUND_RATE = 150.0
#: Standard deviations of a count that is called chance.
NOISE = 3.0


async def _write(
    client: NbdClient, draw: random.Random, count: int, *, per_second: float, until: int = DISK_BYTES
) -> list[float]:
    """Paced writes all over the first `until` bytes of the disk; how long each waited, seconds."""
    waited, due = [], time.monotonic()
    for _ in range(count):
        place = draw.randrange(0, (until - WRITE_BYTES) // 4096) * 4096
        began = time.monotonic()
        await client.write(place, draw.randbytes(WRITE_BYTES))
        waited.append(time.monotonic() - began)
        due = max(due + 1 / per_second, time.monotonic() - 0.05)
        await asyncio.sleep(max(due - time.monotonic(), 0))
    return waited


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def _status(running: Stage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((running.cluster.agent_directory / "status.json").read_text())
    return found


async def _estimate(running: Stage) -> float:
    """What the agent says of when its journal will be full, as soon as it sees that it fills; seconds."""
    while (found := _status(running)["journal_full_seconds"]) is None or found > FULL_SECONDS:
        await asyncio.sleep(0.05)
    return float(found)


async def _away(directory: Path, journals: int) -> None:
    draw = random.Random(31)
    settings = {"journal_bytes": JOURNAL_BYTES, "journal_file_bytes": 4 * MIB, "audit_bytes_per_second": 0}
    async with stage(directory, agent_settings=settings) as running:
        cluster = running.cluster
        async with await NbdClient.connect(cluster.nbd(DISK), export=DISK) as client:
            usual = await _write(client, draw, 400, per_second=150)
            await running.settle("before")
            cluster.process_server.kill()
            away_ns = time.time_ns()
            filling = asyncio.create_task(_estimate(running))
            waited = await _write(
                client, draw, journals * JOURNAL_BYTES // WRITE_BYTES, per_second=400, until=BUSY_BYTES
            )
            await asyncio.sleep(1.2)  # the status is written every second
            full = _status(running)
            assert await asyncio.wait_for(filling, 10) > 0
            assert full["rung"] == "extents"
            assert full["in_gap"]
            used = sum(path.stat().st_blocks * 512 for path in (cluster.agent_directory / "log").glob("changes-*"))
            assert used <= JOURNAL_BYTES
            back_ns = time.time_ns()
            await cluster.start_process_server()
            await running.whole()
            await _write(client, draw, 20, per_second=100)
            await client.flush()
        await running.settle("after")

        print(f"p99 {_p99(usual) * 1000:.2f} ms before, {_p99(waited) * 1000:.2f} ms while it was away")
        assert _p99(waited) <= max(2 * _p99(usual), FLOOR_SECONDS)
        mended = _status(running)
        assert mended["rung"] == "ordered"
        assert 0 < mended["resync_read_bytes"] - full["resync_read_bytes"] <= BUSY_BYTES
        points = (await cluster.replicar("points", cluster.machine, "--json")).require().json()
        (gap,) = [gap for gap in points["gaps"] if "full" in gap["reason"]]
        assert gap["last_sequence"] is not None
        inside = moment((away_ns + 3 * back_ns) // 4000 * 1000)
        target = directory / "inside.raw"
        refused = await cluster.replicar("recover", cluster.machine, "--at", inside, "--disk", DISK, "--raw", target)
        assert refused.status != 0
        recovered = directory / "latest.raw"
        (await cluster.replicar("recover", cluster.machine, "--latest", "--disk", DISK, "--raw", recovered)).require()
        assert recovered.read_bytes() == running.image.path.read_bytes()


async def test_ten_journals_are_written_while_the_server_is_away_and_order_comes_back(tmp_path: Path) -> None:
    await _away(tmp_path, 10)


@pytest.mark.soak
async def test_a_hundred_journals_are_written_while_the_server_is_away(tmp_path: Path) -> None:
    await _away(tmp_path, 100)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_without_the_server_no_write_waits_longer_than_twice_the_usual(tmp_path: Path) -> None:
    draw, usual, away = random.Random(32), list[float](), list[float]()
    settings = {"journal_bytes": JOURNAL_BYTES, "journal_file_bytes": 4 * MIB, "audit_bytes_per_second": 0}
    async with stage(tmp_path, agent_settings=settings) as running:
        cluster, count = running.cluster, 10 * JOURNAL_BYTES // WRITE_BYTES
        async with await NbdClient.connect(cluster.nbd(DISK), export=DISK) as client:
            for number in range(ROUNDS):
                usual += await _write(client, draw, count, per_second=ROUND_RATE, until=BUSY_BYTES)
                await running.settle(f"before-{number}")
                cluster.process_server.kill()
                away += await _write(client, draw, count, per_second=ROUND_RATE, until=BUSY_BYTES)
                assert _status(running)["in_gap"]
                await cluster.start_process_server()
                await running.whole()
    bound = 2 * _p99(usual)
    for name, values in (("usual", usual), ("away", away)):
        figures = (statistics.median(values), _p99(values), sorted(values)[int(len(values) * 0.999)], max(values))
        over = sum(value > bound for value in values)
        print(
            f"{name}: median, p99, p99.9, longest, ms:",
            *(f"{value * 1000:.2f}" for value in figures),
            f"; {over} of {len(values)} beyond twice the usual p99",
        )
    assert _p99(away) <= bound
    beyond = sum(value > bound for value in away)
    usually = sum(value > bound for value in usual)
    assert beyond <= usually + NOISE * math.sqrt(usually + 1)
