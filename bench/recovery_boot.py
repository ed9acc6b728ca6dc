"""How much longer a guest takes to boot from the instant view of a point than from a local file of the same disk.

The disk of `simulator.guest` goes into a sealed log in Azurite, over HTTPS; each turn a new `replicar export` serves
it, with nothing in its cache, to a guest in QEMU. Turns from a fresh copy in a local file alternate with these, so that
a disturbed machine disturbs both. A boot ends when the guest's own init has mounted its disk and says so.

Weak: without KVM QEMU computes every instruction, so the processor is a larger part of a boot than it is elsewhere; and
storage is on this machine, so a round trip costs less than to Azure and the emulator's processor time more.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import keywrap
from pydantic import SecretStr

from recovery.holes import held
from replicar.control.files import write_file
from replicar.formats import segment
from replicar.storage.store import PageBlobStore
from replicar.storage.target import StorageTarget, open_store
from simulator import guest
from simulator.azurite import Azurite
from simulator.cluster import write_toml
from tests.recovery.log_builder import LogBuilder

DEFAULT_ROUNDS: Final = 3
#: Of the disk in one write, and writes in one segment, as initial replication makes them.
_WRITE_BYTES: Final = 1 << 20
_WRITES: Final = 3
_CONTAINER: Final = "boot"
_READY_SECONDS: Final = 60.0


async def measure(directory: Path, *, rounds: int = DEFAULT_ROUNDS) -> dict[str, Any]:
    """Boot in turn from a file and from the view, in a directory for scratch; the seconds of each and their ratio.

    Raises:
        PermanentError: something is missing, see `guest.missing`; or a guest did not boot.
    """
    image = directory / "guest.img"
    await asyncio.to_thread(guest.make_disk, image)
    from_file: list[float] = []
    from_view: list[float] = []
    ready: list[float] = []
    async with Azurite(directory / "azurite", in_memory=True) as azurite:
        settings, key_file, machine_id = await _replicated(azurite, image, directory)
        for turn in range(rounds):
            local = directory / "local.img"
            await asyncio.to_thread(_copied, image, local)
            from_file.append(await _boot(str(local)))
            began = time.monotonic()
            async with _export(settings, key_file, machine_id, directory / f"{turn}.sock") as uri:
                ready.append(time.monotonic() - began)
                from_view.append(await _boot(uri))
    return {
        "boot_seconds_file": _rounded(from_file),
        "boot_seconds_view": _rounded(from_view),
        "boot_seconds_ratio": round(statistics.median(from_view) / statistics.median(from_file), 3),
        "export_ready_seconds": round(statistics.median(ready), 3),
        "boot_disk_bytes": image.stat().st_size,
    }


async def _boot(drive: str) -> float:
    """Seconds from the start of QEMU to the guest's word."""
    began = time.monotonic()
    async with guest.Guest(drive) as running:
        await running.until("boot ")
        return time.monotonic() - began


async def _replicated(azurite: Azurite, image: Path, directory: Path) -> tuple[Path, Path, uuid.UUID]:
    """The image in a machine's sealed log; settings, the vault's key in a file, the machine's id."""
    write_file(directory / "account.key", azurite.account_key.encode())
    storage = {
        "endpoint": azurite.blob_endpoint,
        "account_name": azurite.account_name,
        "account_key_file": str(directory / "account.key"),
        "authority_file": str(azurite.authority_file),
        "container": _CONTAINER,
    }
    settings, key_file, vault_key = directory / "replicar.toml", directory / "vault.key", secrets.token_bytes(32)
    write_toml(settings, {"storage": storage})
    write_file(key_file, vault_key)
    target = StorageTarget(
        endpoint=azurite.blob_endpoint,
        account_name=azurite.account_name,
        account_key=SecretStr(azurite.account_key),
        authority_file=Path(azurite.authority_file),
        container=_CONTAINER,
    )
    async with open_store(target) as store:
        await store.ensure_container()
        return settings, key_file, await _sealed(store, image, vault_key)


async def _sealed(store: PageBlobStore, image: Path, vault_key: bytes) -> uuid.UUID:
    key = secrets.token_bytes(32)
    builder = LogBuilder(
        store,
        key=key,
        wrapped_key=keywrap.aes_key_wrap(vault_key, key),
        chunk_bytes=segment.DEFAULT_CHUNK_BYTES,
        blob_bytes=256 << 20,
        model=False,
    )
    descriptor = os.open(image, os.O_RDONLY)
    size = os.lseek(descriptor, 0, os.SEEK_END)
    builder.begin(size)
    await builder.seal()
    writes = 0
    try:
        for start, end in held(descriptor, 0, size):
            for at in range(start, end, _WRITE_BYTES):
                builder.write(0, at, os.pread(descriptor, min(_WRITE_BYTES, end - at), at))
                writes += 1
                if writes % _WRITES == 0:
                    await builder.seal()
    finally:
        os.close(descriptor)
    builder.mark("whole")
    await builder.seal()
    return builder.machine_id


@asynccontextmanager
async def _export(settings: Path, key_file: Path, machine_id: uuid.UUID, socket: Path) -> AsyncIterator[str]:
    """A running `replicar export`; where its disk is."""
    place = ("--socket", str(socket), "--scratch", str(socket.parent), "--settings", str(settings), "--json")
    key = ("--vault-key-file", str(key_file), "--machine-id", str(machine_id))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "replicar.cli", "export", "guest", "--latest", *place, *key),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_READY_SECONDS):
            said = json.loads(await process.stdout.readline())
        yield next(iter(said["exports"].values()))
    finally:
        process.terminate()
        await process.wait()


def _copied(image: Path, to: Path) -> None:
    """A fresh copy whose pages are on the disk: a guest writes past the page cache."""
    shutil.copyfile(image, to)
    descriptor = os.open(to, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def _rounded(seconds: list[float]) -> list[float]:
    return [round(value, 3) for value in seconds]


def main() -> None:
    """`python -m bench.recovery_boot [ROUNDS]`: this figure alone."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_ROUNDS
    with tempfile.TemporaryDirectory(prefix="replicar-boot-", dir="/var/tmp") as scratch:
        print(json.dumps(asyncio.run(measure(Path(scratch), rounds=rounds))))


if __name__ == "__main__":
    main()
