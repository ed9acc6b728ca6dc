"""Freezes end in time, whatever happens to whoever froze."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mobility_agent.capture.trace.freeze import Filesystem, Freeze, filesystems_on, thaw_all
from mobility_agent.capture.trace.guard import Guard
from replicar.errors import TransientError
from tests.mobility_agent.trace.rig import WitnessStage, loop_disk, run, tracing

pytestmark = pytest.mark.needs_root


@dataclass
class Writer:
    """Writes a small file over and over; `longest` is the longest that one write took, in seconds."""

    directory: Path
    longest: float = 0.0
    writes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            fd = os.open(self.directory / "w", os.O_CREAT | os.O_WRONLY)
            os.pwrite(fd, b"x" * 4096, (self.writes % 64) * 4096)
            os.close(fd)
            self.longest = max(self.longest, time.monotonic() - began)
            self.writes += 1
            time.sleep(0.001)


@contextmanager
def writing(directory: Path) -> Iterator[Writer]:
    writer = Writer(directory)
    thread = threading.Thread(target=writer.run)
    thread.start()
    try:
        yield writer
    finally:
        writer._stop.set()
        thread.join(30)


class SlowStage(WitnessStage):
    """Reading takes too long the first `slow` times."""

    def __init__(self, images: list[Path], slow: int, seconds: float) -> None:
        super().__init__(images)
        self.slow, self.seconds = slow, seconds

    def read(self, freeze: Freeze) -> bool:
        if self.slow:
            self.slow -= 1
            time.sleep(self.seconds)
        return super().read(freeze)


async def test_past_the_budget_it_thaws_goes_on_and_tries_again(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        stage = SlowStage([loop.image], slow=2, seconds=1.5)
        async with tracing(tmp_path, [loop], budget_seconds=0.4, stage=stage) as rig:
            with writing(loop.mountpoint) as writer:
                point = await rig.point()
            assert point.tries >= 3
            assert point.freeze_seconds < 0.4
            # The guard thawed at the budget's end, long before the reading was over.
            assert writer.longest < 0.4 + 0.25
            assert rig.capture.freezes.count >= 3


async def test_after_a_bounded_number_of_tries_it_says_so(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        stage = SlowStage([loop.image], slow=100, seconds=0.2)
        async with tracing(tmp_path, [loop], budget_seconds=0.1, stage=stage) as rig:
            (loop.mountpoint / "x").write_bytes(b"x")
            with pytest.raises(TransientError, match="after 5 freezes"):
                await rig.point()
            assert rig.ladder.in_gap
            (loop.mountpoint / "still").write_bytes(b"writable")
            stage.slow = 0
            rig.count = 0
            rig.capture._budget = 3.0
            await rig.point()


FREEZER = """
import os, sys, time
from pathlib import Path
from mobility_agent.capture.trace.freeze import Freeze, filesystems_on
from mobility_agent.capture.trace.guard import Guard
guard = Guard()
guard.start()
with Freeze(filesystems_on({sys.argv[1]}), guard, float(sys.argv[2])):
    print("frozen", guard.process_id, flush=True)
    time.sleep(60)
"""


async def _frozen_by_another(device: str, budget_seconds: float) -> tuple[asyncio.subprocess.Process, int]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FREEZER, device, str(budget_seconds)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    word, guard = (await process.stdout.readline()).split()
    assert word == b"frozen"
    return process, int(guard)


def _write(path: Path) -> float:
    began = time.monotonic()
    path.write_bytes(b"written")
    return time.monotonic() - began


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
async def test_killed_while_frozen_it_is_thawed_at_once(tmp_path: Path, filesystem: str) -> None:
    with loop_disk(tmp_path, "a", filesystem=filesystem) as loop:
        device = (loop.block.directory / "dev").read_text().strip()
        process, guard = await _frozen_by_another(device, budget_seconds=5.0)
        process.send_signal(signal.SIGKILL)
        assert await asyncio.to_thread(_write, loop.mountpoint / "w") < 1.0
        await process.wait()
        for _ in range(100):
            if not Path(f"/proc/{guard}").exists() or "(zombie)" in Path(f"/proc/{guard}/status").read_text():
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("the guard outlives the agent")
        assert thaw_all({device}) == []


REPEATER = (
    FREEZER[: FREEZER.index("with Freeze")]
    + """
found = filesystems_on({sys.argv[1]})
print("freezing", guard.process_id, flush=True)
while True:
    with Freeze(found, guard, float(sys.argv[2])):
        time.sleep(0.01)
    time.sleep(0.002)
"""
)


async def test_killed_at_any_instant_it_is_thawed_and_the_guard_ends_in_good_order(tmp_path: Path) -> None:
    draw = random.Random(11)
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop, writing(loop.mountpoint) as writer:
        device = (loop.block.directory / "dev").read_text().strip()
        for _ in range(12):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", REPEATER, device, "5.0"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert process.stderr is not None
            assert (await process.stdout.readline()).startswith(b"freezing")
            await asyncio.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            assert await process.stderr.read() == b""  # the guard's too, which ends when it has undone everything
            await process.wait()
            assert thaw_all({device}) == []
    assert writer.longest < 1.5


async def test_stopped_while_frozen_it_is_thawed_within_the_budget(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        device = (loop.block.directory / "dev").read_text().strip()
        process, guard = await _frozen_by_another(device, budget_seconds=0.8)
        process.send_signal(signal.SIGSTOP)
        os.kill(guard, signal.SIGTERM)  # what a service manager sends to the whole group
        try:
            assert await asyncio.to_thread(_write, loop.mountpoint / "w") < 1.2
        finally:
            process.send_signal(signal.SIGKILL)
            await process.wait()


def test_without_its_guard_nothing_is_frozen(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        guard = Guard()
        guard.start()
        os.kill(guard.process_id, signal.SIGKILL)
        with pytest.raises(TransientError, match="guard"), Freeze(filesystems_on(loop.block.family()), guard, 1.0):
            raise AssertionError("frozen without a guard")
        guard.close()
        assert _write(loop.mountpoint / "w") < 0.5


async def test_a_guard_that_died_is_replaced(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        async with tracing(tmp_path, [loop]) as rig:
            await rig.point()
            os.kill(rig.capture._guard.process_id, signal.SIGKILL)
            assert (await rig.point()).tries == 2


def test_what_was_left_frozen_can_be_thawed_by_anybody(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        run("fsfreeze", "-f", loop.mountpoint)
        assert thaw_all(loop.block.family()) == [loop.mountpoint]
        assert thaw_all(loop.block.family()) == []


def test_the_file_systems_of_a_disk_are_found_inner_ones_first(tmp_path: Path) -> None:
    with (
        loop_disk(tmp_path, "a", filesystem="xfs") as outer,
        loop_disk(outer.mountpoint, "b", filesystem="ext4") as inner,
    ):
        found = filesystems_on(outer.block.family() | inner.block.family())
        assert [(item.mountpoint, item.kind) for item in found] == [
            (inner.mountpoint, "ext4"),
            (outer.mountpoint, "xfs"),
        ]
        assert all(isinstance(item, Filesystem) for item in found)
        run("mount", "-o", "remount,ro", inner.mountpoint)
        assert [item.mountpoint for item in filesystems_on(inner.block.family())] == []
