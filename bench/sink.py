"""The sink: an HTTPS endpoint that speaks page blobs and keeps no data, as a process of its own.

It stands where storage would, so that a benchmark measures the path to storage and not an emulator: TLS is real, the
requests are those that Azure would get, and whatever is written is received, decrypted and dropped. Figures measured
against it are figures of *a path into a sink*, and every benchmark that uses it says so.

As cheap per byte as Python allows: uvloop, and one buffer for all connections, into which each is decrypted (nothing is
kept, so the next one may overwrite it). What requests mean is `page_blobs`' matter.

    python -m bench.sink --directory D      prints its port; on SIGTERM one JSON object with its own cpu seconds

With `--record FILE` it writes down when each segment was answered for, and what the segment's header says of it: a
line of `StoredSegment`, the truth about what is stored and since when.

Weak: HTTP is understood as far as the storage client speaks it (no chunked bodies).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from dataclasses import astuple, dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, cast

import uvloop

from bench.certificates import HOST, Certificates
from bench.measure import own_cpu
from bench.page_blobs import KEPT_BYTES, Answer, PageBlobs, Request
from replicar.formats import segment
from simulator.child import Child

ACCOUNT_NAME: Final = "sink"
ACCOUNT_KEY: Final = "bm9ib2R5IGxvb2tzIGF0IHRoaXM="  # base64 of a remark: signatures are not looked at
#: Sixteen TLS records; more makes it fall out of the processor's nearer caches.
BUFFER_BYTES: Final = 256 << 10
MAX_HEAD_BYTES: Final = 64 << 10
START_SECONDS: Final = 30.0
_LISTENING = re.compile(r"^the sink listens on port (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A segment that the sink took: when it answered (wall clock), and what stands in the header."""

    answered_ns: int
    machine: int
    number: int
    first_sequence: int
    last_sequence: int
    first_ns: int
    last_ns: int
    raw_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, header: segment.SegmentHeader) -> Self:
        where = header.position
        return cls(
            time.time_ns(),
            where.machine_id.int,
            where.number,
            where.first_sequence,
            where.last_sequence,
            header.first_time_ns,
            header.last_time_ns,
            header.raw_bytes,
            header.total_bytes,
        )

    @classmethod
    def read_all(cls, path: Path) -> list[Self]:
        """What a sink has written down so far; a line that is being written is left out."""
        whole, _, _ = path.read_text().rpartition("\n")
        return [cls(*map(int, line.split())) for line in whole.split("\n") if line]


class Sink:
    """The process, for whoever starts it; it has what `simulator.azurite.Azurite` has, as far as clients care.

    Args:
        directory: made if need be; takes the certificates and the log.
        recording: whether segments are written down, in `record`.
    """

    account_name = ACCOUNT_NAME
    account_key = ACCOUNT_KEY

    def __init__(self, directory: Path, *, recording: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory.resolve()
        self.certificates = Certificates.make(self.directory)
        self.authority_file = self.certificates.authority
        self.port = 0
        self.record = self.directory / "record"
        command: list[str | Path] = [sys.executable, "-m", "bench.sink", "--directory", self.directory]
        command += ["--record", self.record] if recording else []
        self.child = Child("sink", command, self.directory / "sink.log")

    @property
    def blob_endpoint(self) -> str:
        return f"https://{HOST}:{self.port}/{ACCOUNT_NAME}"

    @property
    def process_id(self) -> int:
        process_id = self.child.process_id
        assert process_id is not None, "the sink runs"
        return process_id

    async def start(self) -> None:
        """Return when it listens.

        Raises:
            PermanentError: it does not.
        """
        self.child.start()
        await self.child.until("listening", lambda: _LISTENING.search(self.child.said()) is not None, START_SECONDS)
        found = _LISTENING.search(self.child.said())
        assert found is not None
        self.port = int(found[1])

    async def stop(self) -> dict[str, Any]:
        """End it; what it says of itself: `bytes_put`, `requests`, `cpu_seconds` (user, system, total)."""
        (await self.child.stop())
        lines = [line for line in self.child.said().splitlines() if line.startswith("{")]
        return cast(dict[str, Any], json.loads(lines[-1])) if lines else {}

    def kill(self) -> None:
        self.child.kill()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class _Connection(asyncio.BufferedProtocol):
    """One client's requests, one after the other."""

    def __init__(self, blobs: PageBlobs, buffer: memoryview, record: IO[str] | None) -> None:
        self._blobs = blobs
        self._buffer = buffer
        self._record = record
        self._segment = b""  # the beginning of a large body, where there is a record
        self._head = b""
        self._request: Request | None = None  # whose body is coming
        self._left = 0
        self._kept: bytearray | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        at = 0
        while at < count:
            if self._request is None:
                at = self._read_head(at, count)
                continue
            taken = min(self._left, count - at)
            if self._kept is not None:
                self._kept += self._buffer[at : at + taken]
            elif self._record is not None and (lacking := segment.HEADER_BYTES - len(self._segment)) > 0:
                self._segment += self._buffer[at : at + min(taken, lacking)]
            self._left -= taken
            at += taken
            if not self._left:
                self._finish(self._request)

    def _read_head(self, at: int, count: int) -> int:
        """Take what belongs to the request's head; where it ends."""
        before = len(self._head)
        self._head += bytes(self._buffer[at : min(count, at + MAX_HEAD_BYTES)])
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) >= MAX_HEAD_BYTES:
                self._transport.abort()
            return count
        head, self._head = self._head[:end].decode("latin-1"), b""
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, target, _version = first.split(" ", 2)
        self._request = Request(method, target, headers)
        self._left = int(headers.get("content-length", "0"))
        self._kept = bytearray() if 0 < self._left <= KEPT_BYTES else None
        if headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._left:
            self._finish(self._request)
        return at + end + 4 - before

    def _finish(self, request: Request) -> None:
        if self._kept:
            request = Request(request.method, request.target, request.headers, bytes(self._kept))
        self._request, self._kept = None, None
        answer = self._blobs.answer(request)
        if self._record is not None and request.method == "PUT":
            self._note(self._record, self._segment or request.body[: segment.HEADER_BYTES], answer)
        self._transport.write(_pack(answer, with_body=request.method != "HEAD"))

    def _note(self, record: IO[str], head: bytes, answer: Answer) -> None:
        self._segment = b""
        header = segment.read_header(head) if head.startswith(segment.MAGIC) else None
        if header is not None and answer.status == HTTPStatus.CREATED:
            record.write(" ".join(map(str, astuple(StoredSegment.of(header)))) + "\n")


def _pack(answer: Answer, *, with_body: bool) -> bytes:
    headers = {"Content-Length": str(len(answer.body)), "x-ms-version": "2021-12-02"} | answer.headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n{lines}\r\n".encode("latin-1")
    return head + answer.body if with_body else head


async def _serve(certificates: Certificates, record: IO[str] | None) -> dict[str, Any]:
    blobs, buffer = PageBlobs(), memoryview(bytearray(BUFFER_BYTES))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    context = certificates.server_context()
    server = await loop.create_server(lambda: _Connection(blobs, buffer, record), HOST, 0, ssl=context)
    began = own_cpu()
    print(f"the sink listens on port {server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()
    cpu = own_cpu() - began
    return {"bytes_put": blobs.bytes_put, "requests": blobs.requests, "cpu_seconds": cpu.as_dict()}


def main() -> None:
    """The process: certificates are in the directory already."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sink", description="A page-blob endpoint that keeps nothing."
    )
    parser.add_argument("--directory", type=Path, required=True, help="where authority, certificate and key are")
    parser.add_argument("--record", type=Path, help="a file for a line of each segment that came")
    options = parser.parse_args()
    directory: Path = options.directory
    record: IO[str] | None = options.record.open("w", buffering=1) if options.record is not None else None
    certificates = Certificates(directory / "authority.pem", directory / "certificate.pem", directory / "key.pem")
    print(json.dumps(uvloop.run(_serve(certificates, record))), flush=True)


if __name__ == "__main__":
    main()
