"""Initial replication: resumed over a death, beside live writes, and over holes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import MIB, agent_core, frames_of, replay


async def test_initial_replication_resumes_where_it_was(tmp_path: Path) -> None:
    content = random.Random(9).randbytes(8 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    async with agent_core(tmp_path) as core:
        seeding = asyncio.create_task(core.seeder.run())
        while core.ladder.dirty_bytes > 4 * MIB:
            await asyncio.sleep(0)
        seeding.cancel()
        await asyncio.gather(seeding, return_exceptions=True)
        left = core.ladder.dirty_bytes
        assert 0 < left <= 4 * MIB
    async with agent_core(tmp_path) as core:
        assert core.ladder.dirty_bytes == left
        seeding = asyncio.create_task(core.seeder.run())
        while core.ladder.in_gap:
            await asyncio.sleep(0.01)
        seeding.cancel()
        await asyncio.gather(seeding, return_exceptions=True)
        assert core.seeder.copied_bytes == left
        assert replay(frames_of(core.log), 8 * MIB) == content


async def test_initial_replication_beside_live_writes_ends_with_the_disks_content(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(random.Random(4).randbytes(4 * MIB) + bytes(4 * MIB))
    async with agent_core(tmp_path, limit_bytes=256 * MIB) as core, await NbdClient.connect(core.socket) as client:
        seeding = asyncio.create_task(core.seeder.run())
        draw = random.Random(11)
        while core.ladder.in_gap:
            for _ in range(5):
                await client.write(draw.randrange(0, 8 * MIB - 65536, 512), draw.randbytes(draw.choice((512, 65536))))
        seeding.cancel()
        await asyncio.gather(seeding, return_exceptions=True)
        core.log.seal()
        assert replay(frames_of(core.log), 8 * MIB) == core.disk.path.read_bytes()


async def test_holes_cost_a_record_each_and_not_their_size(tmp_path: Path) -> None:
    async with agent_core(tmp_path, disk_bytes=512 * MIB, limit_bytes=8 * MIB) as core:
        seeding = asyncio.create_task(core.seeder.run())
        while core.ladder.in_gap:
            await asyncio.sleep(0.01)
        seeding.cancel()
        await asyncio.gather(seeding, return_exceptions=True)
        assert core.log.used_bytes < 4096
