"""An agent in a process of its own that shows its disk as a file, and loop devices with file systems on that.

The process is `killable`'s, so that nothing here waits for a file that this very process would have to serve.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from mobility_agent.capture.fuse import session
from tests.mobility_agent.core import FILE_BYTES, MIB, agent_core, frames_of, replay
from tests.mobility_agent.killable import LARGE_LOG
from tests.mobility_agent.trace.rig import run
from tests.support.tools import need

#: The smallest that the file system takes.
SIZES = {"ext4": 96 * MIB, "xfs": 320 * MIB}
LIMIT_SECONDS = 60
BUSY_SECONDS = 30


class Agent:
    """The agent of one directory; `start`, `kill`, `stop` as often as one likes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "shown" / "disk"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.mobility_agent.killable", str(self.directory), "--file", str(self.file)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"serving\n"

    async def stop(self) -> None:
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            await asyncio.wait_for(self._process.wait(), LIMIT_SECONDS)
            self._process = None

    async def replica(self) -> bytes:
        """What the log says that the disk is; the agent is stopped."""
        assert self._process is None
        async with agent_core(self.directory, limit_bytes=LARGE_LOG) as core:
            assert not core.ladder.dirty_bytes, "the log was full, so it is not all there"
            return replay(frames_of(core.log), core.disk.size_bytes)

    @property
    def disk(self) -> Path:
        return self.directory / "disk.img"


@asynccontextmanager
async def agent(directory: Path, size_bytes: int) -> AsyncIterator[Agent]:
    """A running agent with an empty disk; whatever is left of it is taken away."""
    assert size_bytes + 4 * FILE_BYTES < LARGE_LOG
    with (directory / "disk.img").open("wb") as file:
        file.truncate(size_bytes)
    made = Agent(directory)
    await made.start()
    try:
        yield made
    finally:
        await made.kill()
        session.release(directory / "files")


@contextmanager
def looped(file: Path) -> Iterator[Path]:
    """A loop device on the file."""
    device = Path(run("losetup", "-f", "--show", "--direct-io=on", file))
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextmanager
def mounted(device: Path, where: Path, *options: str) -> Iterator[Path]:
    """The file system on it. Whoever used it last, and is gone or about to be, is waited for."""
    where.mkdir(exist_ok=True)
    run("mount", *options, device, where)
    try:
        yield where
    finally:
        for _ in range(BUSY_SECONDS):
            if subprocess.run(["umount", where], capture_output=True, check=False, timeout=60).returncode == 0:
                break
            time.sleep(1)
        else:
            run("umount", where)


def make_filesystem(kind: str, device: Path) -> None:
    run(need(f"mkfs.{kind}"), *(["-q"] if kind == "xfs" else ["-q", "-F"]), device)


def check_filesystem(kind: str, image: Path) -> None:
    """As its own tool sees it, which finds nothing to mend."""
    run(*(["xfs_repair", "-n", "-f"] if kind == "xfs" else ["e2fsck", "-fn"]), image)


def fio(directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """fio at work in a directory: random writes past the page cache, each of which can be verified."""
    words = ["--rw=randwrite", "--bs=4k-64k", "--ioengine=libaio", "--iodepth=8", "--direct=1", "--verify=crc32c"]
    command = [need("fio"), "--name=load", "--size=24m", f"--directory={directory}", *words, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=directory)
