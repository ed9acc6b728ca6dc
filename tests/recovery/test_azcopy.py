"""The exported VHD is the same when it was fetched by the tool that people fetch it with, and is one for QEMU."""

from __future__ import annotations

import asyncio
import datetime
import os
import shutil
from pathlib import Path

import pytest
from azure.storage.blob import BlobSasPermissions, generate_blob_sas

from recovery.output import write_vhd_blob
from replicar.formats import vhd
from replicar.storage import PageBlobStore, StorageTarget
from simulator.azurite import Azurite
from tests.recovery.test_output import build, expected_vhd, view_of
from tests.support.tools import need

INSTALLED = Path(__file__).resolve().parents[2] / ".azcopy" / "azcopy"
NAME = "exported.vhd"


def azcopy() -> str:
    found = str(INSTALLED) if INSTALLED.exists() else shutil.which("azcopy")
    if found is None:
        pytest.skip("AzCopy is not installed; run: setup/azcopy.sh")
    return found


async def run(*command: str | Path, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(100):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_it_is_the_same_when_azcopy_has_fetched_it(
    azurite_store: PageBlobStore, azurite: Azurite, target: StorageTarget, tmp_path: Path
) -> None:
    program, qemu_img = azcopy(), need("qemu-img")
    builder = await build(azurite_store)
    view = await view_of(builder)
    written = await write_vhd_blob(view, view.disks[0], azurite_store, NAME)
    signature = generate_blob_sas(
        *(azurite.account_name, target.container, NAME),
        account_key=azurite.account_key,
        permission=BlobSasPermissions(read=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    url = f"{azurite.blob_endpoint}/{target.container}/{NAME}?{signature}"
    place = {"AZCOPY_LOG_LOCATION": str(tmp_path), "AZCOPY_JOB_PLAN_LOCATION": str(tmp_path), "HOME": str(tmp_path)}
    image, raw = tmp_path / "fetched.vhd", tmp_path / "disk.raw"
    # The machine's own list of authorities, with Azurite's in its place, is what AzCopy looks at.
    trust = {"SSL_CERT_FILE": str(azurite.authority_file)}
    said = await run(program, "copy", url, image, "--from-to=BlobLocal", **place, **trust)
    assert "Final Job Status: Completed" in said
    data = image.read_bytes()
    assert len(data) == written.size_bytes
    assert data == await azurite_store.read(NAME, 0, written.size_bytes)
    assert data[:-512] == expected_vhd(builder)
    assert vhd.read_footer(data[-512:]).virtual_bytes == len(data) - 512
    assert (len(data) - 512) % (1 << 20) == 0  # what Azure asks of an image that it imports
    raw.write_bytes(expected_vhd(builder))
    assert "identical" in await run(qemu_img, "compare", "-f", "vpc", "-F", "raw", image, raw)
