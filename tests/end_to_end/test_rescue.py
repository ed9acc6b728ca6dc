"""Every server is gone, with all that it knew: a machine comes back from the container and the vault's key alone."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from simulator import command
from simulator.cluster import write_toml
from simulator.oracle import FileImage
from tests.end_to_end.stage import DISK, stage


@pytest.mark.timeout(600)
async def test_a_machine_is_rescued_when_every_servers_directory_is_deleted(tmp_path: Path) -> None:
    async with stage(tmp_path) as it:
        cluster = it.cluster
        async with it.writing():
            await asyncio.sleep(0.5)
            point = await it.tag("last-good")
        await it.settle()
        storage = cluster.target()
        key_file = tmp_path / "kept" / "vault.key"
        key_file.parent.mkdir()
        shutil.copy(cluster.vault / "vault.key", key_file)
        for child in cluster.children:
            child.kill()
        for directory in (cluster.vault, cluster.process_server_directory, cluster.agent_directory):
            shutil.rmtree(directory)
        it.image.path.unlink()

        settings = tmp_path / "kept" / "replicar.toml"
        names = ("endpoint", "account_name", "account_key_file", "container", "authority_file")
        write_toml(settings, {"storage": {name: str(getattr(storage, name)) for name in names}})

        async def rescue(*words: str | Path) -> command.Result:
            arguments = ("rescue", *words, "--vault-key-file", key_file, "--settings", settings)
            return (await command.run("replicar", *arguments)).require()

        (machine,) = (await rescue("--json")).json()["machines"]
        shown = (await rescue(machine["machine_id"], "--json")).json()
        assert [disk["name"] for disk in shown["disks"]] == [DISK]
        assert {found["name"] for found in shown["points"]} == {"last-good", "settled"}
        path = tmp_path / "rescued.raw"
        await rescue(machine["machine_id"], "--point", "last-good", "--raw", path)
        comparison = await asyncio.to_thread(it.oracle.compare, FileImage(path), "rescued", point["time_ns"])
        assert comparison.equal, comparison
