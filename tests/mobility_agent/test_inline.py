"""Inline capture as an application sees it: real NBD clients, and a log that says what the disk went through."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from pathlib import Path

import pytest

from mobility_agent.capture.disk import Disk
from replicar.errors import PermanentError
from replicar.nbd import protocol as nbd
from replicar.nbd.client import NbdClient
from tests.mobility_agent.core import MIB, agent_core, frames_of, gap_flags, replay
from tests.support.tools import need


async def _random_load(client: NbdClient, size: int, count: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        length = draw.choice((512, 4096, 16384, 65536, 128 << 10))
        offset = draw.randrange(0, size - length, 512)
        what = draw.random()
        if what < 0.75:
            await client.write(offset, draw.randbytes(length), fua=what < 0.02)
        elif what < 0.85:
            await client.trim(offset, length)
        elif what < 0.95:
            await client.write_zeroes(offset, length)
        else:
            await client.flush()


async def test_the_log_replayed_is_the_disk(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        async with await NbdClient.connect(core.socket, export="root") as client:
            await _random_load(client, core.disk.size_bytes, 300, seed=1)
        core.log.seal()
        frames = frames_of(core.log)
        assert replay(frames, core.disk.size_bytes) == core.disk.path.read_bytes()


async def test_four_clients_at_once_make_one_order(tmp_path: Path) -> None:
    async with agent_core(tmp_path, limit_bytes=64 * MIB) as core:
        clients = [await NbdClient.connect(core.socket) for _ in range(4)]
        async with asyncio.TaskGroup() as group:  # all over the same 64 KiB, so that order decides
            for number, client in enumerate(clients):
                group.create_task(_random_load(client, 192 << 10, 200, seed=number))
        for client in clients:
            await client.close()
        core.log.seal()
        assert core.ladder.rung == "ordered"
        frames = frames_of(core.log)
        assert replay(frames, core.disk.size_bytes) == core.disk.path.read_bytes()
        sequences = [frame.header.first_sequence for frame in frames]
        assert sequences == sorted(sequences)


async def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        await client.write(4096, b"a" * 4096)
        await client.write_zeroes(4096, 512)
        await client.trim(5120, 512)
        assert await client.read(4096, 4096) == bytes(512) + b"a" * 512 + bytes(512) + b"a" * 2560


async def test_pipelined_large_reads_do_not_pile_up(tmp_path: Path) -> None:
    async with agent_core(tmp_path, disk_bytes=32 * MIB) as core, await NbdClient.connect(core.socket) as client:
        await client.write(0, b"x" * MIB)
        answers = await asyncio.gather(*(client.read(0, 16 * MIB) for _ in range(12)))
        assert all(answer[:MIB] == b"x" * MIB and not any(answer[MIB : MIB + 4096]) for answer in answers)


async def test_a_write_larger_than_the_advertised_maximum_is_taken_in_pieces(tmp_path: Path) -> None:
    content = random.Random(5).randbytes(5 * MIB)
    async with agent_core(tmp_path) as core:
        async with await NbdClient.connect(core.socket) as client:
            await asyncio.gather(client.write(MIB, content), client.write(7 * MIB, b"z" * 512))
            assert await client.read(MIB, len(content)) == content
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes) == core.disk.path.read_bytes()


async def test_more_small_writes_than_one_table_holds(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        async with await NbdClient.connect(core.socket) as client:
            await asyncio.gather(*(client.write(512 * (i % 4096), bytes([i % 251]) * 512) for i in range(9000)))
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes) == core.disk.path.read_bytes()


@pytest.mark.parametrize(("offset", "length"), [(8 * MIB, 512), (8 * MIB - 512, 1024), (1, 512), (512, 100)])
async def test_a_request_outside_the_disk_or_the_sectors_is_refused_and_costs_nothing(
    tmp_path: Path, offset: int, length: int
) -> None:
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        before = core.log.next_sequence
        with pytest.raises(PermanentError):
            await client.write(offset, b"q" * length)
        with pytest.raises(PermanentError):
            await client.trim(offset, length)
        assert core.log.next_sequence == before
        await client.write(0, b"still here".ljust(512))


async def test_garbage_where_a_request_belongs_hangs_up_and_keeps_what_came_before(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        reader, writer = await asyncio.open_unix_connection(core.socket)
        hello = await reader.readexactly(18)
        assert hello.startswith(b"NBDMAGIC")
        writer.write(struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, 1, 4) + b"root")
        await reader.readexactly(10)
        write = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.Command.WRITE, 1, 0, 512)
        writer.write(write + b"k" * 512 + b"garbage" * 10)
        await reader.read()  # the end
        writer.close()
        assert core.disk.path.read_bytes()[:512] == b"k" * 512
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes)[:512] == b"k" * 512


async def test_an_unknown_export_is_named_as_such(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        with pytest.raises(PermanentError):
            await NbdClient.connect(core.socket, export="other")


async def test_bytes_of_reads_do_not_fill_the_log(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        before = core.log.used_bytes
        for _ in range(50):
            await asyncio.gather(*(client.read(0, 512) for _ in range(100)))
        assert core.log.used_bytes == before


async def test_a_failing_disk_answers_an_error_and_opens_a_gap_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        core.ladder.regions[0].clear(0, core.disk.size_bytes)
        assert core.ladder.close_gap()
        read_only = core.disk.fd
        with core.disk.path.open("rb") as refused:  # writing to it gives EBADF, as a dying disk gives EIO
            monkeypatch.setattr(core.disk, "fd", refused.fileno())
            with pytest.raises(PermanentError):
                await client.write(MIB, b"d" * 4096)
            assert core.ladder.in_gap
            monkeypatch.setattr(core.disk, "fd", read_only)
        assert core.ladder.dirty_bytes == MIB
        core.log.seal()
        assert len(gap_flags(frames_of(core.log))) == 3  # begin, end, begin


async def test_a_full_log_falls_to_extents_and_climbs_back_by_itself(tmp_path: Path) -> None:
    async with agent_core(tmp_path, disk_bytes=32 * MIB, limit_bytes=8 * MIB) as core:
        core.ladder.regions[0].clear(0, core.disk.size_bytes)
        assert core.ladder.close_gap()
        async with await NbdClient.connect(core.socket) as client:
            for place in range(0, 24 * MIB, MIB // 2):
                await client.write(place, random.Random(place).randbytes(MIB // 2))
            rungs = [core.ladder.rung]
            assert core.log.state.gap_open
            frames = frames_of(core.log)
            held = replay(frames, core.disk.size_bytes)
            core.log.trim(core.log.next_sequence - 1)  # storage has it all; the server is back
            seeding = asyncio.create_task(core.seeder.run())
            while core.ladder.in_gap:
                await client.write(30 * MIB, random.randbytes(4096))
                core.log.seal()
                fresh = frames_of(core.log, frames[-1].header.next_sequence)
                held, frames = replay(fresh, core.disk.size_bytes, base=held), frames + fresh
                core.log.trim(frames[-1].header.last_sequence)
                await asyncio.sleep(0.01)
            seeding.cancel()
            await asyncio.gather(seeding, return_exceptions=True)
        assert [*rungs, core.ladder.rung] == ["extents", "ordered"]
        fresh = frames_of(core.log, frames[-1].header.next_sequence)
        assert replay(fresh, core.disk.size_bytes, base=held) == core.disk.path.read_bytes()


async def test_a_second_agent_on_the_same_socket_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with agent_core(tmp_path) as core:
        with pytest.raises(PermanentError, match="can't be served"):
            async with (
                agent_core(tmp_path / "other") as second,
                type(core.capture)(second.ladder, {"root": core.socket}),
            ):
                raise AssertionError("two servers on one socket")


async def test_a_disk_that_another_agent_serves_is_refused(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        with pytest.raises(PermanentError, match="in use by another process"):
            Disk(0, "again", core.disk.path)
    Disk(0, "free now", core.disk.path).close()


async def test_a_socket_left_by_a_killed_agent_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "nbd"))
    async with agent_core(tmp_path) as core, await NbdClient.connect(core.socket) as client:
        await client.flush()


async def _run(*command: str, cwd: Path | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=cwd
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_qemu_io_writes_zeroes_discards_and_reads(tmp_path: Path) -> None:
    need("qemu-io")
    async with agent_core(tmp_path) as core:
        commands = ["write -P 0x41 0 1M", "write -P 0x42 1M 3M", "discard 0 512k", "write -z 2M 64k", "flush",
                    "write -f -P 7 512 512", "read -P 7 512 512", "read -P 0 1k 511k", "read -P 0 2M 64k"]  # fmt: skip
        arguments = [part for command in commands for part in ("-c", command)]
        output = await _run("qemu-io", "-f", "raw", f"nbd+unix:///root?socket={core.socket}", *arguments)
        assert "verification failed" not in output
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes) == core.disk.path.read_bytes()


async def test_nbdcopy_and_nbdinfo_work(tmp_path: Path) -> None:
    need("nbdcopy")
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(3 * MIB) + bytes(5 * MIB))
    async with agent_core(tmp_path) as core:
        uri = f"nbd+unix:///root?socket={core.socket}"
        assert "8388608" in await _run("nbdinfo", uri)
        await _run("nbdcopy", "--flush", str(source), uri)
        await _run("nbdcopy", uri, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == source.read_bytes() == core.disk.path.read_bytes()
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes) == source.read_bytes()


async def test_fio_verifies_its_own_random_writes(tmp_path: Path) -> None:
    need("fio")
    async with agent_core(tmp_path, disk_bytes=16 * MIB, limit_bytes=32 * MIB) as core:
        await _run(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri=nbd+unix:///root?socket={core.socket}"),
            *("--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--size=16m", "--verify=crc32c", "--do_verify=1"),
            *("--fsync=32", "--trim_percentage=0"),
            cwd=tmp_path,  # fio leaves its verification state where it runs
        )
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes) == core.disk.path.read_bytes()
