"""Points of disks that are mounted and in use: what the log says is what the disks were, to the byte."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from mobility_agent.capture.trace.choice import Method
from replicar.errors import LimitError
from replicar.formats import record
from replicar.formats.frame import Kind
from tests.mobility_agent.trace.rig import Churn, Rig, loop_disk, run, tracing
from tests.support.tools import need

pytestmark = pytest.mark.needs_root


async def _points(tmp_path: Path, filesystem: str, count: int) -> None:
    with loop_disk(tmp_path, "a", filesystem=filesystem) as loop:
        async with tracing(tmp_path, [loop]) as rig:
            for _ in range(count // 10):
                with Churn([loop.mountpoint], seed=rig.count):
                    for _ in range(10):
                        await asyncio.sleep(0.1)
                        await rig.point()
            assert rig.disks[0].doubts == 0
            assert len(rig.replica.offered) == count
            recovered = tmp_path / "recovered.img"
            recovered.write_bytes(rig.replica.disks[0])
    if filesystem == "ext4":
        run(need("e2fsck"), "-f", "-n", recovered)
    else:  # it looks at the log only if that is clean, which a mount does
        with ExitStack() as closing:
            device = run("losetup", "-f", "--show", recovered)
            closing.callback(run, "losetup", "-d", device)
            (tmp_path / "recovered").mkdir()
            run("mount", "-o", "nouuid", device, tmp_path / "recovered")
            run("umount", tmp_path / "recovered")
            run("xfs_repair", "-n", device)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
async def test_a_hundred_points_and_the_last_mounts(tmp_path: Path, filesystem: str) -> None:
    await _points(tmp_path, filesystem, 100)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
async def test_the_recovered_file_system_is_whole(tmp_path: Path, filesystem: str) -> None:
    await _points(tmp_path, filesystem, 10)


async def test_capture_that_begins_on_a_busy_disk_finds_a_moment_at_rest(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop, Churn([loop.mountpoint], seed=3):
        await asyncio.sleep(0.5)
        async with tracing(tmp_path, [loop]) as rig:
            await asyncio.sleep(3.0)
            assert rig.disks[0].completeness.is_begun
            await rig.point()
            assert rig.disks[0].doubts == 0


@pytest.mark.parametrize("method", [Method.BPF, Method.TRACEFS])
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
async def test_at_every_point_the_replica_is_the_frozen_source(tmp_path: Path, filesystem: str, method: Method) -> None:
    with loop_disk(tmp_path, "a", filesystem=filesystem) as loop:
        async with tracing(tmp_path, [loop], method=method) as rig:
            with Churn([loop.mountpoint], seed=1):
                for _ in range(5):
                    await asyncio.sleep(0.4)
                    await rig.point()
            await rig.point()
            assert rig.disks[0].doubts == 0
            assert rig.source.lost() == 0
            assert len(rig.replica.offered) == 6


async def test_two_disks_have_their_points_at_the_same_moment(tmp_path: Path) -> None:
    with ExitStack() as closing:
        loops = [closing.enter_context(loop_disk(tmp_path, name, filesystem="ext4")) for name in "ab"]
        async with tracing(tmp_path, loops) as rig:
            with Churn([loop.mountpoint for loop in loops], seed=7):
                for _ in range(4):
                    await asyncio.sleep(0.3)
                    await rig.point()
            assert [disk.doubts for disk in rig.disks] == [0, 0]


async def test_scripts_run_around_the_freeze_and_what_they_wrote_is_in_the_point(tmp_path: Path) -> None:
    content = os.urandom(8192)

    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:

        @asynccontextmanager
        async def settled() -> AsyncIterator[None]:
            (loop.mountpoint / "settled").write_bytes(content)
            yield
            (loop.mountpoint / "after").write_bytes(content[::-1])

        async with tracing(tmp_path, [loop]) as rig:
            point = await rig.capture.point(lambda: _mark(rig, "settled"), around=settled)
            rig.replica.feed(point.sequence)
            assert content in rig.replica.disks[0]
            assert content[::-1] not in rig.replica.disks[0]


async def test_it_knows_since_when_changes_are_in_no_point(tmp_path: Path) -> None:
    def refuse() -> int:
        raise LimitError("no room")

    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        async with tracing(tmp_path, [loop]) as rig:
            await rig.point()
            assert rig.capture.is_whole
            began = time.time_ns()
            (loop.mountpoint / "file").write_bytes(os.urandom(8192))
            run("sync", "-f", loop.mountpoint)
            with pytest.raises(LimitError):  # frozen and read, but not logged: it is in no point
                await rig.capture.point(refuse)
            since = rig.capture.changed_since_ns
            assert since is not None
            assert began < since < time.time_ns()
            assert (await rig.point()).changed_since_ns == since


async def test_a_mark_that_can_not_be_set_leaves_the_stream_in_its_gap(tmp_path: Path) -> None:
    def refuse() -> int:
        raise LimitError("no room")

    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        async with tracing(tmp_path, [loop]) as rig:
            with pytest.raises(LimitError):
                await rig.capture.point(refuse)
            assert rig.ladder.in_gap
            await rig.point()


def _mark(rig: Rig, name: str) -> int:
    return rig.log.append_record(Kind.MARK, record.Mark(name))
