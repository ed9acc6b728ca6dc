"""`replicar export`, from the outside: a process that serves a point until it is told to end."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from replicar.control.files import write_file
from replicar.nbd.client import NbdClient
from tests.cli.conftest import Operator, Stored


@asynccontextmanager
async def exporting(operator: Operator, *arguments: object) -> AsyncIterator[dict[str, Any]]:
    """A running `replicar export`, and what it says of itself; ended by SIGTERM, in good order."""
    words = ("export", "db1", *map(str, arguments), "--json")
    environment = {**os.environ, "REPLICAR_SETTINGS": str(operator.settings)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "replicar.cli", *words), stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            yield json.loads(await process.stdout.readline())
        process.terminate()
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_all_disks_of_a_point_are_served_and_what_is_written_can_be_kept(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    expected = {index: bytearray(data) for index, data in stored.builder.expected[stored.points["point-4"]].items()}
    socket = tmp_path / "s"
    arguments = ("--point", "point-4", "--all", "--socket", socket, "--overlay", tmp_path / "{disk}.over")
    for _ in range(2):
        async with exporting(operator, *arguments) as said:
            assert said["sequence"] == stored.points["point-4"]
            assert said["exports"] == {f"disk{n}": f"nbd+unix:///disk{n}?socket={socket}" for n in range(2)}
            for index, data in expected.items():
                async with await NbdClient.connect(socket, export=f"disk{index}") as client:
                    assert await client.read(0, len(data)) == data
                    await client.write(512, b"\7" * 512)
                    data[512:1024] = b"\7" * 512
    assert not socket.exists()
    ended = await operator("export", "db1", "--point", "point-5", "--all", *arguments[3:], "--json")
    assert (ended.status, ended.json["error"]) == (5, "ConflictError")


async def test_no_config_server_is_needed_with_the_vaults_key(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    key = tmp_path / "vault.key"
    write_file(key, (stored.cast.house.directory / "vault.key").read_bytes())
    arguments = ("--latest", "--disk", "disk1", "--socket", tmp_path / "s", "--read-only", "--vault-key-file", key)
    async with (
        exporting(operator, *arguments, "--machine-id", stored.cast.machine_id),
        await NbdClient.connect(tmp_path / "s") as client,
    ):
        assert await client.read(0, client.size_bytes) == stored.builder.disks[1]


async def test_what_can_not_be_served_is_said(operator: Operator, stored: Stored, tmp_path: Path) -> None:
    socket = ("--socket", tmp_path / "s")
    for arguments, words in (
        (("--latest", "--all"), "say where to serve"),
        (("--all", *socket), "say which point"),
        (("--point", "point-99", "--all", *socket), "there is no point named"),
        (("--latest", "--disk", "disk9", *socket), "has no disk 'disk9'"),
        (("--latest", *socket), "say which disk is meant"),
        (("--latest", "--all", "--listen", "192.0.2.1:10809"), "without TLS"),
        (("--latest", "--all", *socket, "--read-only", "--overlay", tmp_path / "{disk}"), "goes with neither"),
        (("--latest", "--all", *socket, "--overlay", tmp_path / "one"), "can't all be written to"),
        (("--latest", "--all", "--socket", tmp_path / "no" / "s"), "can't be served at"),
        (("--latest", "--all", *socket, "--tls-key", tmp_path / "key"), "TLS takes three files"),
    ):
        ended = await operator("export", "db1", *arguments)
        assert ended.status == 1, (arguments, ended.output)
        assert words in ended.errors
        assert "next step:" in ended.errors
