"""Initial replication across the death of its process server: it goes on, and only what was not stored comes again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulator.cluster import Cluster

MIB = 1 << 20
DISK_BYTES = 40 * MIB
#: A copy is a frame of at most this much.
COPY_BYTES = MIB
RATE = 4 * MIB
#: So small a journal that most is still to be copied when the process server is there: copies take half of it.
SETTINGS = {
    "journal_bytes": 16 * MIB,
    "journal_file_bytes": 4 * MIB,
    "seed_bytes_per_second": RATE,
    "audit_bytes_per_second": 0,
}
#: Stored, in copies, when the server is killed.
STORED = 14
#: Frames' heads and tables, and the records of the stream, beside what is copied.
BESIDE_BYTES = MIB


async def _until(cluster: Cluster, held: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The agent's status once it is so."""
    async with asyncio.timeout(90):
        while not held(status := cluster.agent_status()):
            await asyncio.sleep(0.05)
    return status


async def test_a_server_killed_during_initial_replication_costs_what_was_not_stored(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(6).randbytes(DISK_BYTES))
    async with Cluster(tmp_path / "cluster", disks={"data": image}, agent_settings=SETTINGS, in_memory=True) as cluster:
        await cluster.start()
        (await cluster.replicar("protect", cluster.machine)).require()
        await _until(cluster, lambda now: now.get("stored_sequence", 0) > STORED)
        cluster.process_server.kill()
        killed = cluster.agent_status()
        assert killed["in_gap"]
        assert killed["dirty_bytes"] > 0
        await cluster.start_process_server()
        await _until(cluster, lambda now: not now["in_gap"] and now["stored_sequence"] == now["captured_sequence"])
        done = cluster.agent_status()
        assert done["resync_read_bytes"] == DISK_BYTES  # each byte of the disk was read once
        # The status is up to a second old, and a copy takes a quarter of that: so many more may have gone out by then.
        unstored = killed["captured_sequence"] - killed["stored_sequence"] + 2 * RATE // MIB
        assert done["bytes_sent"] <= DISK_BYTES + unstored * COPY_BYTES + BESIDE_BYTES
        (await cluster.replicar("tag", cluster.machine, "whole", "--wait-stored")).require()
        recovered = tmp_path / "recovered.raw"
        (await cluster.replicar("recover", cluster.machine, "--point", "whole", "--raw", recovered)).require()
        assert recovered.read_bytes() == image.read_bytes()
