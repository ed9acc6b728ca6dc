"""`replicar mount` and `replicar unmount` as an operator runs them: processes, a real Azurite, a real ext4.

The config server is left out: the vault's key in a file opens the log.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import keywrap

from replicar.control.files import write_file
from replicar.formats import segment
from replicar.storage import PageBlobStore
from simulator.azurite import Azurite
from simulator.cluster import write_toml
from tests.recovery.log_builder import LogBuilder
from tests.recovery.mount.test_mounting import CONTENT, MIB, file_system, left
from tests.support.tools import need

#: For what takes moments, on a machine that has none to spare.
PATIENCE_SECONDS = 90.0
root = pytest.mark.needs_root


@dataclass(frozen=True)
class Place:
    """A machine with an ext4 in its log, and how an operator reaches it."""

    directory: Path
    words: tuple[str, ...]

    @property
    def where(self) -> Path:
        return self.directory / "mounted"

    async def run(self, *words: str) -> asyncio.subprocess.Process:
        """A `replicar` process; its temporary files are the test's."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "replicar.cli", *words),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(self.directory)},
        )

    @asynccontextmanager
    async def mounted(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """`replicar mount`, when it has said where."""
        scratch = ("--scratch", str(self.directory))
        process = await self.run("mount", "db1", str(self.where), "--point", "whole", *scratch, *self.words)
        try:
            assert process.stdout is not None
            async with asyncio.timeout(PATIENCE_SECONDS):
                said: dict[str, Any] = json.loads(await process.stdout.readline())
            assert (said["directory"], said["file_system"]) == (str(self.where), "ext4")
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def unmount(self) -> int | None:
        process = await self.run("unmount", str(self.where))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await process.communicate()
        return process.returncode


@pytest.fixture
async def place(store: PageBlobStore, azurite: Azurite, container_name: str, tmp_path: Path) -> Place:
    need("mkfs.ext4")
    image = tmp_path / "disk.img"
    await asyncio.to_thread(_make, image)
    key, vault_key = secrets.token_bytes(32), secrets.token_bytes(32)
    builder = LogBuilder(
        store,
        key=key,
        wrapped_key=keywrap.aes_key_wrap(vault_key, key),
        chunk_bytes=segment.DEFAULT_CHUNK_BYTES,
        blob_bytes=64 * MIB,
        model=False,
    )
    data = image.read_bytes()
    image.unlink()
    builder.begin(len(data))
    for offset in range(0, len(data), MIB):
        if any(piece := data[offset : offset + MIB]):
            builder.write(0, offset, piece)
            await builder.seal()
    builder.mark("whole")
    builder.write(0, 0, bytes(MIB))  # what came later is not in the point
    await builder.seal()
    settings, key_file, account = tmp_path / "replicar.toml", tmp_path / "vault.key", tmp_path / "account.key"
    write_file(key_file, vault_key)
    write_file(account, azurite.account_key.encode())
    storage = {
        "endpoint": azurite.blob_endpoint,
        "account_name": azurite.account_name,
        "account_key_file": str(account),
        "authority_file": str(azurite.authority_file),
        "container": container_name,
    }
    write_toml(settings, {"storage": storage})
    (tmp_path / "mounted").mkdir()
    opening = ("--vault-key-file", str(key_file), "--machine-id", str(builder.machine_id))
    return Place(tmp_path, ("--settings", str(settings), *opening, "--json"))


def _make(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with file_system(image, "ext4") as where:
        (where / "letter").write_bytes(CONTENT)


@root
async def test_a_file_is_taken_out_of_a_point_and_nothing_is_left(place: Place) -> None:
    async with place.mounted() as process:
        assert (place.where / "letter").read_bytes() == CONTENT
        with pytest.raises(OSError, match="Read-only"):
            (place.where / "letter").write_bytes(b"no")
        assert await place.unmount() == 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await process.wait() == 0, "it ends when its mount does"
    assert left(place.directory) == []
    assert list(place.where.iterdir()) == []


@root
@pytest.mark.soak
async def test_it_ends_when_it_is_told_to(place: Place) -> None:
    async with place.mounted() as process:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await process.wait() == 0
    assert left(place.directory) == []


@root
async def test_what_a_killed_one_leaves_is_unmounted_by_the_command(place: Place) -> None:
    async with place.mounted() as process:
        process.kill()
        await process.wait()
    assert left(place.directory) != []
    assert await place.unmount() == 0
    assert left(place.directory) == []
    assert list(place.where.iterdir()) == []
