"""Free space that is left out: the replica is what the file system can read, and what is written to is there."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from mobility_agent.allocation.skipped import PAGE_BYTES
from mobility_agent.auditing import Auditor
from mobility_agent.capture.disk import Disk
from mobility_agent.checkpoint import Checkpointer
from mobility_agent.digests import CHUNK_BYTES
from replicar.clock import SystemClock
from replicar.formats.frame import Kind
from replicar.nbd.client import NbdClient
from simulator import e2fsprogs
from tests.mobility_agent.allocation.images import asked, noise, run
from tests.mobility_agent.core import MIB, Core, agent_core, frames_of, replay
from tests.mobility_agent.power import Power

DISK_BYTES = 48 * MIB
LOG_BYTES = 128 * MIB
FAST = 1 << 40


def make_disk(directory: Path) -> dict[str, str]:
    """An ext4 disk with garbage wherever it has nothing; name to digest of its files."""
    tree, draw = directory / "tree", random.Random(4)
    tree.mkdir()
    for number in range(20):
        (tree / f"{number}").write_bytes(draw.randbytes(number * 30_000))
    image = noise(directory / "disk.img", DISK_BYTES)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=1", "-d", tree, image)
    e2fsprogs.run("debugfs", "-w", "-R", "rm 7", str(image))  # what is deleted is garbage too
    (tree / "7").unlink()
    return digests(tree)


def digests(tree: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tree.iterdir() if path.is_file()}


def files_of(image: Path, into: Path) -> dict[str, str]:
    into.mkdir()
    e2fsprogs.run("debugfs", "-R", f"rdump / {into}", str(image))
    return digests(into)


async def copied(core: Core) -> None:
    """Return when nothing is dirty and no gap is open."""
    seeding = asyncio.create_task(core.seeder.run())
    async with asyncio.timeout(30):
        while core.ladder.in_gap or not core.ladder.is_clean:
            await asyncio.sleep(0.01)
    seeding.cancel()
    await asyncio.gather(seeding, return_exceptions=True)
    core.log.seal()


def free_regions(image: Path) -> list[int]:
    """Numbers of the regions of 1 MiB that the file system has nothing in."""
    found: list[int] = []
    for begin, end in asked(image).ranges.tolist():
        found += range(-(-begin // MIB), end // MIB)
    return found


def region(content: bytes, number: int) -> bytes:
    return content[number * MIB : (number + 1) * MIB]


def without(content: bytes, pages: Iterable[int]) -> bytes:
    """The same with zeros in these pages."""
    found = bytearray(content)
    for page in pages:
        found[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)
    return bytes(found)


def left_out(core: Core) -> list[int]:
    """Numbers of the pages that are left out now."""
    skipped = core.ladder.skipped[0]
    return [page for page in range(DISK_BYTES // PAGE_BYTES) if skipped.has_all(page * PAGE_BYTES, PAGE_BYTES)]


async def test_a_recovered_disk_has_every_file_and_none_of_the_garbage(tmp_path: Path) -> None:
    files = make_disk(tmp_path)
    free = free_regions(tmp_path / "disk.img")
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        replica = replay(frames_of(core.log), DISK_BYTES)
        sent = core.log.bytes_captured
        pages = left_out(core)
    assert len(free) > 20
    assert pages == [number * 256 + page for number in free for page in range(256)]
    assert replica == without((tmp_path / "disk.img").read_bytes(), pages)
    assert sent < DISK_BYTES - (len(free) - 1) * MIB
    image = tmp_path / "recovered"
    image.write_bytes(replica)
    e2fsprogs.check(image)
    assert files_of(image, tmp_path / "files") == files


async def test_free_space_is_copied_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    make_disk(tmp_path)
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES) as core:
        await copied(core)
        assert replay(frames_of(core.log), DISK_BYTES) == (tmp_path / "disk.img").read_bytes()


async def test_whole_pages_that_are_written_are_in_the_stream_already(tmp_path: Path) -> None:
    make_disk(tmp_path)
    first, second = free_regions(tmp_path / "disk.img")[3:5]
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        before, at = left_out(core), core.log.next_sequence
        async with await NbdClient.connect(core.socket) as client:
            await client.write(first * MIB + 4096, b"new" * 4096)
            await client.write_zeroes(second * MIB - 8192, 5 * 8192)
        core.log.seal()
        assert core.ladder.is_clean
        assert not core.ladder.in_gap
        written = {first * 256 + page for page in (1, 2, 3)} | {second * 256 + page for page in range(-2, 8)}
        assert left_out(core) == [page for page in before if page not in written]
        await copied(core)
        assert core.log.next_sequence == at + 2  # nothing but the two writes
        source = (tmp_path / "disk.img").read_bytes()
        assert replay(frames_of(core.log), DISK_BYTES) == without(source, left_out(core))


async def test_beside_what_is_written_of_a_page_the_rest_is_copied_without_a_gap(tmp_path: Path) -> None:
    make_disk(tmp_path)
    first, second, third, _ = free_regions(tmp_path / "disk.img")[3:7]
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        before, sent = left_out(core), core.log.bytes_captured
        async with await NbdClient.connect(core.socket) as client:
            await client.write(first * MIB + 512, b"new".ljust(512))
            await client.write_zeroes(second * MIB + 8192, 1024)
            await client.write((third + 1) * MIB - 512, bytes(range(256)) * 4)  # the end of one region, and the next
        core.log.seal()
        assert not core.ladder.in_gap
        assert core.ladder.dirty_bytes == 4 * MIB
        at_write = replay(frames_of(core.log), DISK_BYTES)
        assert region(at_write, first)[512:515] == b"new"
        await copied(core)
        written = {first * 256, second * 256 + 2, third * 256 + 255, third * 256 + 256}
        assert left_out(core) == [page for page in before if page not in written]
        replica, source = replay(frames_of(core.log), DISK_BYTES), core.disk.path.read_bytes()
        assert replica == without(source, left_out(core))
        assert core.log.bytes_captured - sent < 5 * CHUNK_BYTES


async def test_writes_while_the_log_is_full_bring_their_regions_back(tmp_path: Path) -> None:
    make_disk(tmp_path)
    number = free_regions(tmp_path / "disk.img")[2]
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        core.log.seal()
        core.log.ordered = False
        core.ladder.open_gap("the change log is full")
        async with await NbdClient.connect(core.socket) as client:
            await client.write(number * MIB + 512, b"unordered".ljust(512))
            await client.write(number * MIB + 16384, b"unordered" * 1024)
        await copied(core)
        pages = left_out(core)
        assert [page for page in range(number * 256, number * 256 + 8) if page not in pages] == [
            number * 256 + page for page in (0, 4, 5, 6)
        ]
        assert replay(frames_of(core.log), DISK_BYTES) == without(core.disk.path.read_bytes(), pages)


async def test_what_is_left_out_is_not_audited_and_is_once_it_was_written_to(tmp_path: Path) -> None:
    make_disk(tmp_path)
    free = free_regions(tmp_path / "disk.img")
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        audits = Auditor(core.ladder, SystemClock(), tmp_path / "audit.json", bytes_per_second=FAST)
        every = set(range(DISK_BYTES // CHUNK_BYTES))
        assert await audited(core, audits) == every - chunks(left_out(core))
        assert audits.last_round is not None
        assert audits.last_round.skipped_bytes == len(chunks(left_out(core))) * CHUNK_BYTES
        piece, first, second = b"x" * CHUNK_BYTES, free[0] * 16, free[1] * 16
        async with await NbdClient.connect(core.socket) as client:
            await client.write(free[0] * MIB, piece)
            await client.write(free[0] * MIB + len(piece), piece[:-PAGE_BYTES])
            await client.write(free[1] * MIB + 512, piece)  # and of two pages the rest, which is in no frame
        core.log.seal()
        near = set(range(first, second + 16))
        assert near & await audited(core, audits) == {first}  # the others not yet
        await copied(core)
        assert near & await audited(core, audits) == {first, second}


@pytest.mark.parametrize("length", [PAGE_BYTES, 512])
async def test_clients_come_in_between_while_audits_pass_over_much(tmp_path: Path, length: int) -> None:
    make_disk(tmp_path)
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        async with await NbdClient.connect(core.socket) as client:
            for page in left_out(core)[::16]:
                await client.write(page * PAGE_BYTES, bytes(length))
        core.log.seal()
        audits = Auditor(core.ladder, SystemClock(), tmp_path / "audit.json", bytes_per_second=FAST)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        between = asyncio.create_task(others())
        await asyncio.sleep(0)
        for number in range(DISK_BYTES // MIB):
            before = turns
            assert await audits.step()
            assert turns > before, number
        between.cancel()
        await asyncio.gather(between, return_exceptions=True)


def chunks(pages: Iterable[int]) -> set[int]:
    """The numbers of the chunks, as audits divide a disk, that these pages lie in."""
    return {page * PAGE_BYTES // CHUNK_BYTES for page in pages}


async def audited(core: Core, audits: Auditor) -> set[int]:
    """The chunks that one round audits."""
    begin, before = core.log.next_sequence, audits.last_round
    while audits.last_round is before:
        assert await audits.step()
    core.log.seal()
    rows = [row for item in frames_of(core.log, begin) for row in item.table.tolist() if row[5] == Kind.AUDIT]
    return {
        chunk
        for offset, length, *_ in rows
        for chunk in range(offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES))
    }


async def test_an_agent_that_starts_again_goes_on_and_asks_nobody(tmp_path: Path) -> None:
    make_disk(tmp_path)
    number = free_regions(tmp_path / "disk.img")[1]
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        left_out = core.ladder.left_out_bytes_of(0)
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        assert core.ladder.left_out_bytes_of(0) == left_out
        assert core.ladder.is_clean
        async with await NbdClient.connect(core.socket) as client:
            await client.write(number * MIB, b"x" * 4096)
        await copied(core)
    with Disk(0, "root", tmp_path / "disk.img") as disk:
        disk.write((number + 1) * MIB, bytes(4096))
    (tmp_path / "root.regions").unlink()  # nothing is known of the disk any more
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        assert core.ladder.left_out_bytes_of(0) == 0


async def test_a_page_leaves_although_the_agent_was_killed_before_it_could(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    make_disk(before)
    number = free_regions(before / "disk.img")[1]
    async with agent_core(before, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        core.log.on_sealed.clear()  # the frame is in the log, and nothing that comes of it was done
        async with await NbdClient.connect(core.socket) as client:
            await client.write(number * MIB, b"x" * PAGE_BYTES)
        core.log.seal()
        shutil.copytree(before, after, ignore=shutil.ignore_patterns("nbd", "tree"))
    async with agent_core(after, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        assert number * 256 not in left_out(core)
        assert number * 256 + 1 in left_out(core)
        await copied(core)
        source = core.disk.path.read_bytes()
        assert replay(frames_of(core.log), DISK_BYTES) == without(source, left_out(core))


async def test_an_operator_who_changes_their_mind_gets_everything(tmp_path: Path) -> None:
    make_disk(tmp_path)
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        assert core.ladder.left_out_bytes_of(0)
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=True) as core:
        assert core.ladder.left_out_bytes_of(0) == 0
        await copied(core)
        assert replay(frames_of(core.log), DISK_BYTES) == (tmp_path / "disk.img").read_bytes()


async def test_a_disk_whose_journal_is_not_replayed_is_copied_whole(tmp_path: Path) -> None:
    make_disk(tmp_path)
    e2fsprogs.run("debugfs", "-w", "-R", "feature needs_recovery", str(tmp_path / "disk.img"))
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        assert replay(frames_of(core.log), DISK_BYTES) == (tmp_path / "disk.img").read_bytes()


@pytest.mark.parametrize("seed", range(6))
async def test_a_power_cut_behind_a_change_of_mind_leaves_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    make_disk(before)
    with monkeypatch.context() as patched:
        power = Power(before, patched)
        async with agent_core(before, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
            await copied(core)
            await Checkpointer(core.ladder, SystemClock()).checkpoint()
            await Checkpointer(core.ladder, SystemClock()).checkpoint()
            core.log.seal()
            received = frames_of(core.log)
        async with agent_core(before, limit_bytes=LOG_BYTES, copy_free_space=True):
            power.cut(after, random.Random(seed))
    async with agent_core(after, limit_bytes=LOG_BYTES, boot_id=b"later".ljust(16), copy_free_space=True) as core:
        await copied(core)
        held = replay(received, DISK_BYTES)
        replica = replay(frames_of(core.log, received[-1].header.next_sequence), DISK_BYTES, base=held)
        assert replica == core.disk.path.read_bytes()


@pytest.mark.parametrize("seed", range(6))
async def test_after_a_power_cut_every_region_is_equal_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    make_disk(before)
    free = free_regions(before / "disk.img")
    with monkeypatch.context() as patched:
        power = Power(before, patched)
        async with agent_core(before, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
            await copied(core)
            await Checkpointer(core.ladder, SystemClock()).checkpoint()
            await Checkpointer(core.ladder, SystemClock()).checkpoint()  # the copies' regions are retired
            async with await NbdClient.connect(core.socket) as client:
                for _ in range(6):
                    place, length = draw.randrange(0, MIB - 8192, 512), draw.choice((512, 4096, 8192))
                    await client.write(draw.choice(free[-12:]) * MIB + place, b"w" * length)
                if seed % 2:
                    await Checkpointer(core.ladder, SystemClock()).checkpoint()
                    await client.write(draw.choice(free[-12:]) * MIB, b"v" * 4096)
            core.log.seal()
            received = frames_of(core.log)
            held = replay(received, DISK_BYTES)
            power.cut(after, draw)
    async with agent_core(after, limit_bytes=LOG_BYTES, boot_id=b"later".ljust(16), copy_free_space=False) as core:
        await copied(core)
        replica = replay(frames_of(core.log, received[-1].header.next_sequence), DISK_BYTES, base=held)
        pages = left_out(core)
        assert len(pages) > 10 * MIB // PAGE_BYTES
        assert replica == without(core.disk.path.read_bytes(), pages)
