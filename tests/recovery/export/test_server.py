"""A view over NBD, as clients of other makes see it: what it holds, what it does not, and what they write over it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from pathlib import Path

import pytest

from bench.certificates import Certificates
from recovery.export.server import ExportServer
from recovery.view import View
from replicar.errors import CorruptionError, PermanentError, TransientError
from replicar.nbd.client import NbdClient
from replicar.nbd.tls import server_context
from tests.recovery.export.support import MIB, SIZES, build, exported, run, served, view_of
from tests.recovery.log_builder import LogBuilder
from tests.support.tools import need


@pytest.fixture
async def builder() -> LogBuilder:  # instead of the empty one
    return await build()


@pytest.fixture
async def view(builder: LogBuilder) -> View:
    return await view_of(builder)


async def test_every_disk_is_an_export_and_its_bytes_are_the_points(
    builder: LogBuilder, view: View, tmp_path: Path
) -> None:
    need("nbdcopy")
    async with ExportServer(served(view), tmp_path / "s"):
        for index in range(2):
            copy = tmp_path / "copy"
            status, output = await run("nbdcopy", f"nbd+unix:///disk{index}?socket={tmp_path}/s", copy)
            assert status == 0, output
            assert copy.read_bytes() == bytes(builder.disks[index])
    assert not (tmp_path / "s").exists()


async def test_holes_are_told_and_copied_as_holes(builder: LogBuilder, view: View, tmp_path: Path) -> None:
    need("nbdinfo")
    async with ExportServer(served(view), tmp_path / "s"):
        uri = f"nbd+unix:///disk0?socket={tmp_path}/s"
        status, output = await run("nbdinfo", "--json", "--map", uri)
        assert status == 0, output
        data = [(part["offset"], part["length"]) for part in json.loads(output) if part["type"] == 0]
        assert data == [
            *((0, 2 * MIB), (3 * MIB, MIB)),
            *((9 * MIB - 4096, 12288), (SIZES[0] - 8192, 8192)),
        ]
        status, output = await run("nbdcopy", uri, tmp_path / "copy")
        assert status == 0, output
    assert (tmp_path / "copy").read_bytes() == bytes(builder.disks[0])
    assert (tmp_path / "copy").stat().st_blocks * 512 < 5 * MIB


async def test_a_read_only_export_says_so_and_takes_no_writes(builder: LogBuilder, view: View, tmp_path: Path) -> None:
    need("nbdinfo")
    async with ExportServer(served(view), tmp_path / "s"):
        _, output = await run("nbdinfo", "--json", f"nbd+unix:///disk0?socket={tmp_path}/s")
        (export,) = json.loads(output)["exports"]
        assert (export["is_read_only"], export["can_multi_conn"], export["export-size"]) == (True, True, SIZES[0])
        async with await NbdClient.connect(tmp_path / "s", export="disk0") as client:
            with pytest.raises(PermanentError):
                await client.write(0, bytes(512))
            assert await client.read(0, 4096) == builder.disks[0][:4096]


async def test_what_is_written_is_read_back_and_thrown_away_at_the_end(
    builder: LogBuilder, view: View, tmp_path: Path
) -> None:
    expected = bytearray(builder.disks[0])
    random_ = random.Random(1)
    async with ExportServer(served(view, scratch=tmp_path), tmp_path / "s"):
        assert [path.name for path in tmp_path.iterdir()] == ["s"]  # the overlays have no names
        async with await NbdClient.connect(tmp_path / "s", export="disk0") as client:
            for _ in range(60):
                offset = 512 * random_.randrange(SIZES[0] // 512 - 64)
                length = 512 * random_.randrange(1, 64)
                if random_.random() < 0.3:
                    await client.write_zeroes(offset, length)
                    expected[offset : offset + length] = bytes(length)
                else:
                    data = random_.randbytes(length)
                    await client.write(offset, data)
                    expected[offset : offset + length] = data
            async with await NbdClient.connect(tmp_path / "s", export="disk0") as other:
                assert await other.read(0, SIZES[0]) == expected
        status, output = await run("nbdcopy", f"nbd+unix:///disk0?socket={tmp_path}/s", tmp_path / "copy")
        assert status == 0, output
        assert (tmp_path / "copy").read_bytes() == expected
    async with exported(served(view, scratch=tmp_path), tmp_path / "s", "disk0") as client:
        assert await client.read(0, SIZES[0]) == builder.disks[0]


async def test_a_kept_overlay_is_there_when_the_export_is_begun_again(
    builder: LogBuilder, view: View, tmp_path: Path
) -> None:
    expected = bytearray(builder.disks[1])
    for number in range(3):
        async with exported(served(view, overlay=tmp_path / "over"), tmp_path / "s", "disk1") as client:
            assert await client.read(0, SIZES[1]) == expected
            data = bytes([number + 1]) * 4096
            await client.write(number * 9 * 512, data)
            expected[number * 9 * 512 : number * 9 * 512 + 4096] = data


async def test_two_exports_do_not_share_an_overlay(view: View, tmp_path: Path) -> None:
    async with ExportServer(served(view, overlay=tmp_path / "over"), tmp_path / "s"):
        with pytest.raises(TransientError, match="in use"):
            served(view, overlay=tmp_path / "over")


class Burst:
    """Writes to slots of the disk at random, many at once, with a flush now and then, until its server is gone."""

    def __init__(self, random_: random.Random, acknowledged: bytearray) -> None:
        self._random, self._acknowledged = random_, acknowledged
        self.unsure: list[tuple[int, bytes]] = []

    async def run(self, client: NbdClient) -> None:
        slots = list(range(SIZES[0] // 8192 - 1))
        self._random.shuffle(slots)
        async with asyncio.TaskGroup() as group:
            for number, slot in enumerate(slots):
                group.create_task(self._write(client, slot))
                if number % 50 == 49:
                    await client.flush()

    async def _write(self, client: NbdClient, slot: int) -> None:
        write = (slot * 8192, self._random.randbytes(4096 + 512 * self._random.randrange(8)))
        self.unsure.append(write)
        await client.write(*write)
        self.unsure.remove(write)
        self._acknowledged[write[0] : write[0] + len(write[1])] = write[1]

    def settle(self, held: bytes) -> None:
        """Nobody knows of the writes that were not answered, but each sector is as before or as written."""
        for offset, data in self.unsure:
            for at in range(0, len(data), 512):
                place = slice(offset + at, offset + at + 512)
                assert held[place] in (data[at : at + 512], self._acknowledged[place])
                self._acknowledged[place] = held[place]


@pytest.mark.parametrize("seed", range(4))
async def test_a_killed_export_loses_nothing_it_acknowledged(builder: LogBuilder, tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    acknowledged = bytearray(builder.disks[0])
    for _ in range(2):
        burst = Burst(random_, acknowledged)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.recovery.export.killable", str(tmp_path)), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"serving\n"
        async with await NbdClient.connect(tmp_path / "nbd.sock", export="disk0") as client:
            assert await client.read(0, SIZES[0]) == acknowledged
            task = asyncio.create_task(burst.run(client))
            await asyncio.sleep(random_.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            await asyncio.gather(task, return_exceptions=True)
        await process.wait()
        disks = served(await view_of(builder), overlay=tmp_path / "over")
        async with exported(disks, tmp_path / "s", "disk0") as client:
            held = await client.read(0, SIZES[0])
        burst.settle(held)
        assert held == acknowledged


async def test_damage_is_an_error_for_who_reads_it_and_nobody_else(builder: LogBuilder, tmp_path: Path) -> None:
    need("qemu-io")
    view = await view_of(builder)
    blob, offset, _ = builder.placed[1]
    page = bytearray(await builder.store.read(blob, offset + 1024, 512))
    page[7] ^= 1
    await builder.store.put_pages(blob, offset + 1024, bytes(page))
    async with ExportServer(served(view), tmp_path / "s"):
        uri = f"nbd+unix:///disk0?socket={tmp_path}/s"
        _, output = await run("qemu-io", "-r", "-f", "raw", "-c", "read 8k 4k", uri)
        assert "Input/output error" in output
        status, output = await run("qemu-io", "-r", "-f", "raw", "-c", f"read {9 * MIB} 4k", uri)
        assert status == 0, output
        assert "4 KiB" in output
    with pytest.raises(CorruptionError):
        await view.read(view.disks[0], 8192, 4096)


async def test_bytes_under_way_are_bounded_and_everybody_is_served(
    builder: LogBuilder, view: View, tmp_path: Path
) -> None:
    server = ExportServer(served(view), tmp_path / "s", under_way_bytes=MIB)
    most = 0
    take = server.take

    def watched(connection: object, length: int) -> bool:
        nonlocal most
        taken = take(connection, length)  # type: ignore[arg-type]
        most = max(most, server._under_way)
        return taken

    server.take = watched  # type: ignore[method-assign]
    async with server:
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(await NbdClient.connect(tmp_path / "s", export="disk0"))
                for _ in range(3)
            ]
            reads = [client.read(at, MIB // 2) for at in range(0, 4 * MIB, MIB // 2) for client in clients]
            answers = await asyncio.gather(*reads)
        assert server._under_way == 0
    assert most <= MIB
    wanted = [bytes(builder.disks[0][at : at + MIB // 2]) for at in range(0, 4 * MIB, MIB // 2) for _ in clients]
    assert answers == wanted


async def test_off_this_machine_disks_are_served_over_tls_only(builder: LogBuilder, view: View, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="without TLS"):
        async with ExportServer(served(view), ("127.0.0.2", 0)):
            pass
    need("nbdcopy")
    files = Certificates.make(tmp_path / "pki", host="127.0.0.2")
    context = server_context(files.certificate, files.key, files.authority)
    (tmp_path / "client").mkdir()
    for name, source in (
        *(("ca-cert.pem", files.authority), ("client-cert.pem", files.certificate), ("client-key.pem", files.key)),
    ):
        (tmp_path / "client" / name).write_bytes(source.read_bytes())
    async with ExportServer(served(view, scratch=tmp_path), ("127.0.0.2", 0), tls=context) as server:
        host, port = server.address  # type: ignore[misc]
        status, _ = await run("nbdcopy", f"nbd://{host}:{port}/disk1", tmp_path / "plain")
        assert status != 0
        uri = f"nbds://{host}:{port}/disk1?tls-certificates={tmp_path / 'client'}"
        status, output = await run("nbdcopy", uri, tmp_path / "copy")
        assert status == 0, output
    assert (tmp_path / "copy").read_bytes() == builder.disks[1]
