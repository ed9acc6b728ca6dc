"""A machine's keys through its life: rotated under writes, recovered without the config server, destroyed."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

from replicar.formats import logblob
from replicar.log.reader import LogReader
from simulator.oracle import FileImage
from tests.end_to_end.stage import DISK, stage


async def test_a_key_is_rotated_under_writes_and_the_vaults_key_opens_both_and_then_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        cluster, machine = it.cluster, it.cluster.machine
        machine_id = (await cluster.replicar("machines", machine, "--json")).require().json()["id"]
        async with it.writing() as application:
            await asyncio.sleep(0.7)
            (await cluster.replicar("rotate-key", machine)).require()
            await asyncio.sleep(1.0)
            assert application.tally.changes_lost == 0
        await it.settle()
        async with cluster.store() as store:
            runs = await LogReader(store, uuid.UUID(machine_id), {}).runs()
        assert len({run.header.key_id for run in runs}) == 2
        (await cluster.replicar("verify", machine)).require()

        cluster.config_server.kill()
        path = tmp_path / "rescued.raw"
        rescue = ("--vault-key-file", cluster.vault / "vault.key", "--machine-id", machine_id)
        (await cluster.replicar("recover", machine, "--latest", "--disk", DISK, "--raw", path, *rescue)).require()
        comparison = await asyncio.to_thread(it.oracle.compare, FileImage(path), "rescued")
        assert comparison.equal, str(comparison)
        await cluster.start_config_server()

        assert machine_id in (cluster.process_server_directory / "assignments.json").read_text()
        ended = (await cluster.replicar("remove", machine, "--destroy-keys", "--confirm", machine, "--json")).require()
        assert ended.json()["blobs_deleted"] >= len(runs)
        async with cluster.store() as store:
            left = [logblob.read_header(await store.read(info.name, 0, 512)) for info in await store.list("machines/")]
        assert left == [None]
        async with asyncio.timeout(30):
            while machine_id in (cluster.process_server_directory / "assignments.json").read_text():
                await asyncio.sleep(0.1)
        assert (await cluster.replicar("verify", machine)).status == 1
