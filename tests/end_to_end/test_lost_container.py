"""Storage loses everything: what the parts then say to do is done, and the machine is protected again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from simulator import command
from tests.end_to_end.stage import DISK, stage


async def test_after_a_lost_container_the_next_step_that_is_named_protects_the_machine_anew(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        cluster = it.cluster
        async with it.writing():
            await asyncio.sleep(0.3)
        await it.settle()
        await cluster.delete_container()
        async with it.writing(seed=2):
            await asyncio.sleep(0.5)

        # The operator does as told: let the container be made again, and enrol the machine again.
        await cluster.process_server.stop()
        (cluster.process_server_directory / "container.json").unlink()
        await cluster.agent.stop()
        again: list[str | Path] = [
            "--config-server",
            cluster.config_server_address,
            "--passphrase-file",
            cluster.vault / "passphrase",
        ]
        place: list[str | Path] = ["--directory", cluster.agent_directory, "--name", cluster.machine]
        (await command.run("mobility-agent", "enrol", *again, *place)).require()
        await cluster.start_process_server()
        await cluster.start_agent()

        async with it.writing(seed=3):
            await asyncio.sleep(0.3)
        async with asyncio.timeout(60):
            while (await cluster.replicar("tag", cluster.machine, "anew", "--wait-stored")).status != 0:
                await asyncio.sleep(0.5)
        comparison = await it.recover("--point", "anew")
        assert comparison.equal, comparison
        (await cluster.replicar("verify", cluster.machine)).require()
        assert it.recovered().read_bytes() == cluster.disks[DISK].read_bytes()
