"""Free space that is left out: the replica is what the file system can read, and what is written to is copied whole."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import pytest

from mobility_agent.auditing import Auditor
from mobility_agent.capture.disk import Disk
from mobility_agent.checkpoint import Checkpointer
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


async def test_a_recovered_disk_has_every_file_and_none_of_the_garbage(tmp_path: Path) -> None:
    files = make_disk(tmp_path)
    free = free_regions(tmp_path / "disk.img")
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        replica = replay(frames_of(core.log), DISK_BYTES)
        sent = core.log.bytes_captured
    assert len(free) > 20
    source = (tmp_path / "disk.img").read_bytes()
    for number in range(DISK_BYTES // MIB):
        assert region(replica, number) == (bytes(MIB) if number in free else region(source, number))
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


async def test_a_region_that_is_written_to_is_copied_whole_without_a_gap(tmp_path: Path) -> None:
    make_disk(tmp_path)
    first, second, third = free_regions(tmp_path / "disk.img")[3:6]
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        left_out = core.ladder.left_out_bytes_of(0)
        async with await NbdClient.connect(core.socket) as client:
            await client.write(first * MIB + 4096, (b"new" * 1400)[:4096])
            await client.write_zeroes(second * MIB + 8192, 4096)
        core.log.seal()
        assert not core.ladder.in_gap
        assert core.ladder.dirty_bytes == 2 * MIB
        at_write = replay(frames_of(core.log), DISK_BYTES)
        assert region(at_write, first)[4096:4099] == b"new"
        await copied(core)
        replica, source = replay(frames_of(core.log), DISK_BYTES), core.disk.path.read_bytes()
        assert region(replica, first) == region(source, first)
        assert region(replica, second) == region(source, second)
        assert region(replica, third) == bytes(MIB)
        assert core.ladder.left_out_bytes_of(0) == left_out - 2 * MIB


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
        await copied(core)
        replica, source = replay(frames_of(core.log), DISK_BYTES), core.disk.path.read_bytes()
        assert region(replica, number) == region(source, number)


async def test_what_is_left_out_is_not_audited_and_is_once_it_was_written_to(tmp_path: Path) -> None:
    make_disk(tmp_path)
    free = free_regions(tmp_path / "disk.img")
    async with agent_core(tmp_path, limit_bytes=LOG_BYTES, copy_free_space=False) as core:
        await copied(core)
        audits = Auditor(core.ladder, SystemClock(), tmp_path / "audit.json", bytes_per_second=FAST)
        assert await audited(core, audits) == set(range(DISK_BYTES // MIB)) - set(free)
        assert audits.last_round is not None
        assert audits.last_round.skipped_bytes == len(free) * MIB
        async with await NbdClient.connect(core.socket) as client:
            await client.write(free[0] * MIB, b"x" * 4096)
        core.log.seal()
        assert free[0] not in await audited(core, audits)  # not copied yet
        await copied(core)
        assert free[0] in await audited(core, audits)


async def audited(core: Core, audits: Auditor) -> set[int]:
    """The regions that one round audits."""
    begin, before = core.log.next_sequence, audits.last_round
    while audits.last_round is before:
        assert await audits.step()
    core.log.seal()
    rows = [row for item in frames_of(core.log, begin) for row in item.table.tolist() if row[5] == Kind.AUDIT]
    return {offset // MIB for offset, *_ in rows}


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


@pytest.mark.parametrize("seed", range(4))
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
                    await client.write(draw.choice(free[-12:]) * MIB + draw.randrange(0, MIB, 4096), b"w" * 4096)
                if seed % 2:
                    await Checkpointer(core.ladder, SystemClock()).checkpoint()
                    await client.write(draw.choice(free[-12:]) * MIB, b"v" * 4096)
            core.log.seal()
            received = frames_of(core.log)
            held = replay(received, DISK_BYTES)
            power.cut(after, draw)
    async with agent_core(after, limit_bytes=LOG_BYTES, boot_id=b"later".ljust(16), copy_free_space=False) as core:
        skipped = core.ladder.skipped[0]
        await copied(core)
        replica = replay(frames_of(core.log, received[-1].header.next_sequence), DISK_BYTES, base=held)
        source = core.disk.path.read_bytes()
        assert skipped.count > 10
        for number in range(DISK_BYTES // MIB):
            left_out = skipped.differs(number * MIB, MIB)
            assert region(replica, number) == (bytes(MIB) if left_out else region(source, number)), number
