"""`capture`, the half about NBD: the agent's own server, which logs every write, against one that logs none.

The peer is `nbdkit file`, written in C, on an image of the same size in the same directory. fio drives both by its NBD
engine, in turns within one run; a ratio is of two turns beside each other, and the median of these counts.

    nbd_iops_ratio         4 KiB random writes, 16 under way
    nbd_sequential_ratio   128 KiB writes in a row, 4 under way
    memory_per_tib_*       what serving a disk of 1 TiB takes in the agent beside one of 1 MiB: its own memory (anon),
                           and pages of mapped files, which are the kernel's to take back (file)

Weak: both write into the page cache of one machine, and fio runs on the same cores as they do.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import writes
from replicar.errors import PermanentError
from simulator.child import Child
from simulator.workloads import Kind, Workload

TIB: Final = 1 << 40
READY_SECONDS: Final = 60.0
MEMORY_SECONDS: Final = 2.0
NEEDED: Final = ("fio", "nbdkit")


@dataclass(frozen=True, slots=True)
class Load:
    """What fio does, and which of its figures counts."""

    name: str
    workload: Workload
    depth: int
    figure: str


RANDOM: Final = Load("nbd_iops", writes.named(Kind.UNIFORM, 4096), 16, "iops")
SEQUENTIAL: Final = Load("nbd_sequential", writes.named(Kind.SEQUENTIAL, 128 << 10), 4, "bw_bytes")


def run(directory: Path, *, seconds: float, rounds: int, image_bytes: int) -> dict[str, Any]:
    """The figures.

    Args:
        directory: where images and change log go; a real disk's.
        seconds: of each turn.
        rounds: turns of each server and load.
        image_bytes: of each disk.

    Raises:
        PermanentError: fio or nbdkit is missing, or fails.
    """
    for tool in NEEDED:
        if shutil.which(tool) is None:
            raise PermanentError(f"there is no {tool} here", hint="`make setup` as root installs it")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=directory, prefix="capture-") as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        for place in (ours, theirs):
            place.mkdir()
            fill(place / "image", image_bytes)
        with agent(ours, ours / "image") as agent_socket, nbdkit(theirs, theirs / "image") as nbdkit_socket:
            for load in (RANDOM, SEQUENTIAL):
                turns = [
                    (_fio(load, agent_socket, "disk", seconds), _fio(load, nbdkit_socket, "", seconds))
                    for _ in range(rounds)
                ]
                figures |= _compared(load, turns)
    with tempfile.TemporaryDirectory(dir=directory, prefix="capture-") as scratch:
        large, small = _memory(Path(scratch) / "large", TIB), _memory(Path(scratch) / "small", 1 << 20)
    for kind in ("RssAnon", "RssFile"):
        figures[f"memory_per_tib_{kind[3:].lower()}_bytes"] = max(large[kind] - small[kind], 0)
    return figures


def _compared(load: Load, turns: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [mine / other for mine, other in turns]
    unit, scale = ("iops", 1.0) if load.figure == "iops" else ("mb_per_s", 1e6)
    return {
        f"{load.name}_ratio": round(statistics.median(ratios), 3),
        f"{load.name}_ratios": [round(ratio, 3) for ratio in ratios],
        f"{load.name}_agent_{unit}": round(statistics.median(mine for mine, _ in turns) / scale, 1),
        f"{load.name}_nbdkit_{unit}": round(statistics.median(other for _, other in turns) / scale, 1),
    }


@contextmanager
def agent(directory: Path, image: Path, *, file: Path | None = None) -> Iterator[Path]:
    """The agent's capture of `image`, in a process of its own, which shows it as `file` too; its socket."""
    shown = ["--file", str(file)] if file is not None else []
    command = ["-m", "bench.capture_agent", *shown, str(directory), str(image)]
    with _serving(directory, "agent", command) as (socket, _):
        yield socket


@contextmanager
def nbdkit(directory: Path, image: Path) -> Iterator[Path]:
    """nbdkit on `image`; its socket."""
    socket = directory / "nbd.sock"
    child = Child("nbdkit", ["nbdkit", "-f", "--unix", socket, "file", image], directory / "log.txt")
    child.start()
    try:
        _wait(socket, child)
        yield socket
    finally:
        child.kill()


@contextmanager
def _serving(directory: Path, name: str, arguments: list[str]) -> Iterator[tuple[Path, Child]]:
    socket = directory / "nbd.sock"
    child = Child(name, [sys.executable, *arguments, str(socket)], directory / "log.txt")
    child.start()
    try:
        _wait(socket, child)
        yield socket, child
    finally:
        child.kill()


def _wait(socket: Path, child: Child) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not socket.exists():
        if time.monotonic() > deadline or child.died:
            raise PermanentError(f"{child.name} did not begin to serve", hint=child.said()[-500:])
        time.sleep(0.02)


def _fio(load: Load, socket: Path, export: str, seconds: float) -> float:
    command = [
        *("fio", f"--name={load.name}", "--ioengine=nbd", f"--uri=nbd+unix:///{export}?socket={socket}"),
        *(*writes.fio_options(load.workload), f"--iodepth={load.depth}", "--time_based"),
        *(f"--runtime={seconds:g}", "--ramp_time=0.5", "--randrepeat=0", "--output-format=json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False, cwd=socket.parent)
    if done.returncode:
        raise PermanentError(f"fio ended with status {done.returncode}", hint=(done.stderr or done.stdout)[-500:])
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return float(found["jobs"][0]["write"][load.figure])


def fill(path: Path, size: int) -> None:
    """An image whose every block is there already, so that nobody's first write pays for it."""
    piece = bytes(range(256)) * 4096
    with path.open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)


def _memory(directory: Path, disk_bytes: int) -> dict[str, int]:
    """What the agent has in memory when it serves a disk of so many bytes, after writes all over it.

    RssAnon is its own; RssFile are pages of mapped files (log, digests), which the kernel takes back if need be.
    """
    directory.mkdir()
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(disk_bytes)
    arguments = ["-m", "bench.capture_agent", str(directory), str(image)]
    with _serving(directory, "agent", arguments) as (socket, child):
        _fio(RANDOM, socket, "disk", MEMORY_SECONDS)
        text = Path(f"/proc/{child.process_id}/status").read_text()
    found = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in found if words[0] in ("RssAnon:", "RssFile:")}
