"""The two hops of the path, each alone: TLS 1.3 one way, and HTTPS PUT into the sink; both ends over loopback.

TLS: blocking sockets, 1 MiB a write, received into one buffer; the receiver is a process of its own. That is the
cheapest way this Python has of moving encrypted bytes. PUT: aiohttp on uvloop, bodies of a full segment's size, four at
once, into `sink`.

    python -m bench.raw_network DIRECTORY      the receiver: prints its port, then what it took
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import uvloop

from bench.certificates import HOST, Certificates
from bench.measure import Cpu, own_cpu, process_cpu
from bench.raw_steps import pieces
from bench.sink import Sink
from replicar.errors import PermanentError
from replicar.formats.logblob import HEADER_BYTES
from replicar.formats.segment import ALIGNMENT

WRITE_BYTES: Final = 1 << 20
RECEIVE_BYTES: Final = 256 << 10
UPLOADS: Final = 4
BLOB_BYTES: Final = 64 << 30
WAIT_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class BothEnds:
    """What each end of a hop took for `count` bytes."""

    near: Cpu
    far: Cpu
    count: int


def tls_one_way(certificates: Certificates, data: memoryview, total_bytes: int) -> BothEnds:
    """Send so much to a receiver in another process.

    Raises:
        PermanentError: the receiver did not get it all.
    """
    command = [sys.executable, "-m", "bench.raw_network", str(certificates.authority.parent)]
    receiver = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert receiver.stdout is not None
    with receiver, socket.create_connection((HOST, int(receiver.stdout.readline()))) as plain:
        plain.settimeout(WAIT_SECONDS)
        with certificates.client_context().wrap_socket(plain, server_hostname=HOST) as secure:
            before = own_cpu()
            for piece in pieces(data, WRITE_BYTES, total_bytes):
                secure.sendall(piece)
            near = own_cpu() - before
            secure.unwrap().close()
        said = json.loads(receiver.stdout.readline())
    if said["count"] < total_bytes:
        raise PermanentError(f"of {total_bytes} bytes over TLS, {said['count']} arrived")
    return BothEnds(near, Cpu(said["user"], said["system"]), said["count"])


def https_put(sink: Sink, body_bytes: int, total_bytes: int) -> BothEnds:
    """PUT so much into the sink, in pages of `body_bytes` (a multiple of 512, at most 4 MiB).

    Raises:
        PermanentError: the sink refused it.
    """
    assert body_bytes % ALIGNMENT == 0
    return uvloop.run(_put_all(sink, body_bytes, -(-total_bytes // body_bytes)))


async def _put_all(sink: Sink, body_bytes: int, requests: int) -> BothEnds:
    url = f"{sink.blob_endpoint}/bench/{uuid.uuid4()}"
    bodies = [memoryview(bytearray(body_bytes)) for _ in range(UPLOADS)]
    left = iter(range(requests))

    async def upload(body: memoryview) -> None:
        for number in left:
            start = HEADER_BYTES + number * body_bytes
            headers = {"x-ms-page-write": "update", "x-ms-range": f"bytes={start}-{start + body_bytes - 1}"}
            async with session.put(url, params={"comp": "page"}, data=body, headers=headers) as answer:
                await answer.read()
                _require(answer.status)

    connector = aiohttp.TCPConnector(ssl=sink.certificates.client_context(), limit=UPLOADS)
    async with aiohttp.ClientSession(connector=connector) as session:
        made = {"x-ms-blob-type": "PageBlob", "x-ms-blob-content-length": str(BLOB_BYTES)}
        async with session.put(url, headers=made) as answer:
            _require(answer.status)
        near, far = own_cpu(), process_cpu(sink.process_id)
        async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
            for body in bodies:
                group.create_task(upload(body))
        return BothEnds(own_cpu() - near, process_cpu(sink.process_id) - far, requests * body_bytes)


def _require(status: int) -> None:
    if status != 201:
        raise PermanentError(f"the sink answered {status}", hint="look at its log")


def main() -> None:
    """The receiver."""
    directory = Path(sys.argv[1])
    certificates = Certificates(directory / "authority.pem", directory / "certificate.pem", directory / "key.pem")
    buffer = memoryview(bytearray(RECEIVE_BYTES))
    with socket.create_server((HOST, 0)) as server:
        server.settimeout(WAIT_SECONDS)
        print(server.getsockname()[1], flush=True)
        plain, _ = server.accept()
    plain.settimeout(WAIT_SECONDS)
    with certificates.server_context().wrap_socket(plain, server_side=True) as secure:
        before, count = own_cpu(), 0
        while received := secure.recv_into(buffer):
            count += received
        cpu = own_cpu() - before
        secure.unwrap()
    print(json.dumps({"count": count, "user": cpu.user, "system": cpu.system}), flush=True)


if __name__ == "__main__":
    main()
