"""The real Azurite behind the demo and the tests: it speaks TLS, keeps or forgets blobs, and dies with its owner."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
from azure.storage.blob import BlobServiceClient

from replicar.errors import PermanentError
from simulator.azurite import Azurite


def _service(azurite: Azurite) -> BlobServiceClient:
    return BlobServiceClient(
        azurite.blob_endpoint, azurite.account_key, connection_verify=str(azurite.authority_file), retry_total=0
    )


def _is_alive(process_id: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_page_blob_is_written_and_read_over_verified_tls(azurite: Azurite, container_name: str) -> None:
    with _service(azurite) as service:
        blob = service.create_container(container_name).get_blob_client("disk")
        blob.create_page_blob(4096)
        blob.upload_page(b"\x5a" * 512, offset=1024, length=512)
        assert blob.download_blob().readall() == bytes(1024) + b"\x5a" * 512 + bytes(4096 - 1536)


def test_a_client_that_does_not_know_the_authority_is_told_by_tls(azurite: Azurite) -> None:
    address = urllib.parse.urlsplit(azurite.blob_endpoint)
    with (
        socket.create_connection((address.hostname, address.port), timeout=10) as connection,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(connection, server_hostname=address.hostname)


def test_the_private_key_is_for_its_owner_only(azurite: Azurite) -> None:
    assert stat.S_IMODE((azurite.directory / "azurite-key.pem").stat().st_mode) == 0o600


async def test_blobs_on_disk_survive_a_restart_on_the_same_port(tmp_path: Path, container_name: str) -> None:
    azurite = Azurite(tmp_path, in_memory=False)
    async with azurite:
        first = azurite.blob_endpoint
        with _service(azurite) as service:
            service.create_container(container_name).upload_blob("note", b"still here")
    async with azurite:
        assert azurite.blob_endpoint == first
        with _service(azurite) as service:
            assert service.get_blob_client(container_name, "note").download_blob().readall() == b"still here"
    assert azurite.process_id is None


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        port = occupant.getsockname()[1]
        azurite = Azurite(tmp_path, in_memory=True, port=port)
        with pytest.raises(PermanentError, match=rf"EADDRINUSE.*{port}"):
            azurite.start()
    assert azurite.process_id is None


def test_azurite_dies_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from simulator.azurite import Azurite\n"
        "azurite = Azurite(pathlib.Path(sys.argv[1]), in_memory=True)\n"
        "azurite.start()\n"
        "print(azurite.process_id, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        process_id = int(owner.stdout.readline())
        assert _is_alive(process_id)
        os.kill(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _is_alive(process_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(process_id)
