"""Parts die at any instant, and what the application was told is done is there when the disk comes back."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path

import pytest

from simulator.demo.story import moment
from simulator.oracle import FileImage
from tests.end_to_end.stage import stage

MIB = 1 << 20
#: One in every run, more in `make soak`; a failure names its seed.
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_process_server_killed_again_and_again_under_writes_costs_nothing(tmp_path: Path, seed: int) -> None:
    instants = random.Random(seed)
    async with stage(tmp_path) as it:
        async with it.writing(seed=seed) as application:
            for _ in range(4):
                await asyncio.sleep(instants.uniform(0.2, 1.5))
                it.cluster.process_server.kill()
                await asyncio.sleep(instants.uniform(0.0, 0.5))
                await it.cluster.start_process_server()
            assert application.tally.changes_lost == 0
        await it.settle()
        comparison = await it.recover("--latest")
        assert comparison.equal, f"seed {seed}: {comparison}"
        assert comparison.changes_required > 500
        (await it.cluster.replicar("verify", it.cluster.machine)).require()


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_killed_agent_goes_on_and_the_recovered_disk_is_the_disk(tmp_path: Path, seed: int) -> None:
    instants = random.Random(seed)
    async with stage(tmp_path) as it:
        async with it.writing(seed=seed) as application:
            for _ in range(3):
                await asyncio.sleep(instants.uniform(0.3, 1.5))
                it.cluster.agent.kill()
                await it.cluster.start_agent()
            await asyncio.sleep(0.5)
        assert application.tally.reconnects >= 3
        await it.settle()
        comparison = await it.recover("--latest")
        assert comparison.equal, f"seed {seed}: {comparison}"
        # What was in flight at a death may have happened or not; but the disk and its replica agree about it.
        assert it.recovered().read_bytes() == it.image.path.read_bytes(), f"seed {seed}"


async def test_agent_and_process_server_dying_together_lose_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        async with it.writing():
            await asyncio.sleep(0.7)
            it.cluster.agent.kill()
            it.cluster.process_server.kill()
            await it.cluster.start_agent()
            await asyncio.sleep(0.5)
            await it.cluster.start_process_server()
            await asyncio.sleep(0.5)
        await it.settle()
        comparison = await it.recover("--latest")
        assert comparison.equal, str(comparison)
        assert it.recovered().read_bytes() == it.image.path.read_bytes()


async def test_any_instant_of_a_busy_time_is_a_point(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        instants: list[int] = []
        async with it.writing(bytes_per_second=8e6) as application:
            for _ in range(3):
                await asyncio.sleep(0.6)
                # Not at rest: this instant has writes in flight, each of which may be there or not, but whole.
                instants.append(it.oracle.changes[-1].issued_ns // 1000 * 1000)
            async with application.quiet() as quiet:
                instants.append(quiet // 1000 * 1000)
            await asyncio.sleep(0.3)
        await it.settle()
        for instant in instants:
            comparison = await it.recover("--at", moment(instant), at_ns=instant)
            assert comparison.equal, str(comparison)
        # The oracle would tell one instant from another: the last is not the first.
        first = it.oracle.compare(FileImage(it.recovered()), "first", instants[0])
        assert first.differing_bytes > 4096


async def test_replication_goes_on_while_the_config_server_is_away(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        it.cluster.config_server.kill()
        async with it.writing():
            await asyncio.sleep(1.0)
            # Both parts start again on what they last knew.
            it.cluster.process_server.kill()
            await it.cluster.start_process_server()
            await asyncio.sleep(0.5)
            it.cluster.agent.kill()
            await it.cluster.start_agent()
            await asyncio.sleep(0.5)
        await _all_stored(it.cluster.agent_directory / "status.json")
        await it.cluster.start_config_server()
        await it.settle()
        comparison = await it.recover("--latest")
        assert comparison.equal, str(comparison)


async def _all_stored(status: Path) -> None:
    """Wait until the agent says, in the file it writes every second, that all it has captured by now is in storage.

    It goes on auditing meanwhile, so its stream never stands still.
    """
    now_ns, wanted = time.time_ns(), 0
    async with asyncio.timeout(60):
        while True:
            facts = json.loads(status.read_text())
            if not wanted and facts["time_ns"] > now_ns:
                wanted = facts["captured_sequence"]
            if 0 < wanted <= facts["stored_sequence"]:
                return
            await asyncio.sleep(0.2)


async def test_a_journal_that_overflows_is_a_gap_and_not_a_loss(tmp_path: Path) -> None:
    small = {"journal_bytes": 32 * MIB, "journal_file_bytes": 4 * MIB}
    async with stage(tmp_path, agent_settings=small) as it:
        it.cluster.process_server.kill()
        async with it.writing(bytes_per_second=30e6) as application:
            await asyncio.sleep(3.0)
            async with application.quiet() as inside:
                pass
            assert application.tally.bytes_written > 40 * MIB, "the application was held up"
            await it.cluster.start_process_server()
            await asyncio.sleep(0.5)
        await it.whole()
        async with it.writing():
            await asyncio.sleep(0.5)
        await it.settle()
        comparison = await it.recover("--latest")
        assert comparison.equal, str(comparison)
        # Where order was lost no point is offered, and that is said.
        refused = await it.cluster.replicar(
            *("recover", it.cluster.machine, "--at", moment(inside // 1000 * 1000)), "--raw", tmp_path / "never.raw"
        )
        assert refused.status != 0
        assert "gap" in refused.errors
        assert not (tmp_path / "never.raw").exists()
