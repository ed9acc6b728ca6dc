"""The NBD client against servers of other makes: qemu-nbd and nbdkit."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from pathlib import Path

import pytest

from replicar.errors import PermanentError, TransientError
from replicar.nbd.client import NbdClient
from replicar.nbd.client_protocol import MAX_IN_FLIGHT, ExportFlag
from tests.nbd.nbd_servers import nbdkit, qemu_nbd

DISK_BYTES = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    return path


async def test_everything_a_disk_can_be_asked_for_lands_in_the_file(image: Path) -> None:
    model = bytearray(image.read_bytes())
    async with qemu_nbd(image, "--discard=unmap", "--detect-zeroes=off") as (socket, _):
        async with await NbdClient.connect(socket) as client:
            assert client.size_bytes == DISK_BYTES
            assert {ExportFlag.FLUSH, ExportFlag.FUA, ExportFlag.TRIM, ExportFlag.WRITE_ZEROES} <= set(client.flags)
            assert client.block_bytes[2] >= 1 << 20
            await client.write(4096, b"a" * 512)
            await client.write(1 << 20, b"b" * 300_000 + bytes(544), fua=True)
            await client.write_zeroes(65536, 65536, no_hole=True)
            await client.trim(1 << 19, 4096)
            await client.flush()
            model[4096:4608] = b"a" * 512
            model[1 << 20 : (1 << 20) + 300_544] = b"b" * 300_000 + bytes(544)
            model[65536 : 2 * 65536] = bytes(65536)
            assert await client.read(4096, 8192) == model[4096 : 4096 + 8192]
            assert await client.read(1 << 20, 1 << 20) == model[1 << 20 : 2 << 20]
            assert client.in_flight == 0
        written = image.read_bytes()
    model[1 << 19 : (1 << 19) + 4096] = written[1 << 19 : (1 << 19) + 4096]  # what TRIM leaves is the server's choice
    assert written == model


async def test_many_requests_are_in_flight_and_every_reply_finds_its_own(image: Path) -> None:
    data = image.read_bytes()
    async with qemu_nbd(image) as (socket, _), await NbdClient.connect(socket) as client:
        offsets = [random.Random(2).randrange(DISK_BYTES // 4096) * 4096 for _ in range(2 * MAX_IN_FLIGHT)]
        pieces = await asyncio.gather(*(client.read(offset, 4096) for offset in offsets))
        assert [data[offset : offset + 4096] for offset in offsets] == pieces


async def test_requests_wait_for_each_other_only_on_the_servers_side(tmp_path: Path) -> None:
    slow = ("--filter=delay", "memory", "1M", "rdelay=300ms")
    async with nbdkit(tmp_path / "nbd", *slow) as (socket, _), await NbdClient.connect(socket) as client:
        began = time.monotonic()
        await asyncio.gather(*(client.read(index * 4096, 4096) for index in range(8)))
        assert time.monotonic() - began < 1.5


async def test_times_enclose_what_the_server_did(tmp_path: Path) -> None:
    slow = ("--filter=delay", "memory", "1M", "wdelay=100ms")
    async with nbdkit(tmp_path / "nbd", *slow) as (socket, _), await NbdClient.connect(socket) as client:
        heard: list[int] = []
        before = time.time_ns()
        timing = await client.write(0, bytes(4096), on_issue=heard.append)
        assert heard == [timing.issued_ns]
        assert before <= timing.issued_ns
        assert timing.issued_ns + 90_000_000 < timing.acknowledged_ns <= time.time_ns()


async def test_tcp_works_as_well(tmp_path: Path) -> None:
    async with nbdkit(tmp_path / "nbd", "memory", "1M") as (socket, _):
        relay = await asyncio.start_server(lambda r, w: _relay(r, w, socket), "127.0.0.1", 0)
        async with relay, await NbdClient.connect(relay.sockets[0].getsockname()) as client:
            await client.write(512, b"x" * 512)
            assert await client.read(512, 512) == b"x" * 512


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: Path) -> None:
    there_reader, there_writer = await asyncio.open_unix_connection(socket)
    await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_a_refused_request_names_itself_and_the_connection_goes_on(tmp_path: Path) -> None:
    broken = ("--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    async with nbdkit(tmp_path / "nbd", *broken) as (socket, _), await NbdClient.connect(socket) as client:
        with pytest.raises(PermanentError, match="WRITE of 512 bytes at 4096: No space left") as raised:
            await client.write(4096, bytes(512))
        assert raised.value.fields["errno"] == errno.ENOSPC
        assert await client.read(0, 512) == bytes(512)


async def test_an_unknown_export_is_named(image: Path) -> None:
    async with qemu_nbd(image, "-x", "system") as (socket, _):
        with pytest.raises(PermanentError, match="no export 'data'"):
            await NbdClient.connect(socket, export="data")
        async with await NbdClient.connect(socket, export="system") as client:
            assert client.size_bytes == DISK_BYTES


async def test_a_server_that_is_killed_leaves_no_request_waiting(tmp_path: Path) -> None:
    slow = ("--filter=delay", "memory", "1M", "wdelay=60")
    async with nbdkit(tmp_path / "nbd", *slow) as (socket, process), await NbdClient.connect(socket) as client:
        async with asyncio.TaskGroup() as tasks:
            writes = [tasks.create_task(_fate(client, index * 4096)) for index in range(20)]
            await asyncio.sleep(0.2)
            process.kill()
        assert {type(task.result()) for task in writes} == {TransientError}
        assert not client.connected
        with pytest.raises(TransientError):
            await client.flush()


async def _fate(client: NbdClient, offset: int) -> TransientError | None:
    try:
        await client.write(offset, bytes(4096))
    except TransientError as error:
        return error
    return None


async def test_nobody_listening_is_a_transient_error_that_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"no NBD server answers at .*nowhere\.sock"):
        await NbdClient.connect(tmp_path / "nowhere.sock")


async def test_a_server_of_another_protocol_is_told(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org ESMTP ready\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(greet, tmp_path / "other.sock"):
        with pytest.raises(PermanentError, match="no fixed-newstyle NBD server"):
            await NbdClient.connect(tmp_path / "other.sock")


async def test_a_cancelled_caller_does_not_confuse_those_who_wait(tmp_path: Path) -> None:
    slow = ("--filter=delay", "memory", "1M", "rdelay=200ms")
    async with nbdkit(tmp_path / "nbd", *slow) as (socket, _), await NbdClient.connect(socket) as client:
        first = asyncio.create_task(client.read(0, 4096))
        second = asyncio.create_task(client.read(4096, 8192))
        await asyncio.sleep(0.05)
        first.cancel()
        assert len(await second) == 8192
        assert len(await client.read(0, 512)) == 512
