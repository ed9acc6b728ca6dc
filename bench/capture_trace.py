"""`capture`, the half about disks that their own machine mounts: a loop device that is tracked, or that lies on the
agent's file, beside one that nobody captures. As root only.

fio writes to the loop device by direct I/O, with the agent and without it in turns; a ratio is of two turns beside each
other, and the median of these counts.

    trace_iops_ratio        4 KiB random writes, 16 under way, tracked (events followed, what is dirty copied beside it
                            as the product does) against bare
    trace_lost              events lost, disks in doubt and points refused, in all turns; each turn ends with a point,
                            at which the sectors captured are held against those that the kernel counted
    trace_cpu_share         cores that the agent took meanwhile
    trace_events            of which so many were followed
    fuse_iops_ratio         the same load on a loop device over the agent's file, in order, against bare
    fuse_sequential_ratio   128 KiB writes in a row, 4 under way

Weak: the images lie in the page cache of one machine, and fio, the loop device's thread and the agent share its cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench import writes
from bench.capture_nbd import RANDOM, SEQUENTIAL, Load, agent, fill
from mobility_agent.capture.fuse import session
from replicar.errors import PermanentError

#: Tracking costs a few hundredths, and one turn differs from the next by a tenth: it takes more of them.
TRACE_ROUNDS: Final = 3
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_LIMIT_SECONDS: Final = 120.0


def run(directory: Path, *, seconds: float, rounds: int, image_bytes: int) -> dict[str, Any]:
    """The figures; empty for anybody but root.

    Args:
        directory: where images and change logs go; a real disk's.
        seconds: of each turn.
        rounds: turns of each; three times as many of the one that is tracked.
        image_bytes: of each disk.

    Raises:
        PermanentError: fio or a loop device fails.
    """
    if os.geteuid() != 0:
        return {}
    with tempfile.TemporaryDirectory(dir=directory, prefix="capture-") as scratch:
        where = Path(scratch)
        fill(where / "image", image_bytes)
        return _trace(where, seconds, TRACE_ROUNDS * rounds) | _fuse(where, seconds, rounds)


def _trace(where: Path, seconds: float, rounds: int) -> dict[str, Any]:
    turns, said, shares = [], [], []
    with _looped(where / "image") as device:
        for number in range(rounds):
            bare = _fio(RANDOM, device, seconds) if number % 2 else 0.0  # now this one first, now that one
            with _tracked(where / f"trace-{number}", device) as told:
                before = told.cpu_seconds()
                tracked = _fio(RANDOM, device, seconds)
                shares.append((told.cpu_seconds() - before) / seconds)
                said.append(told.point())
            turns.append((tracked, bare or _fio(RANDOM, device, seconds)))
    frozen = [facts["freeze_seconds"] for facts in said if "freeze_seconds" in facts]
    return {
        **_ratios("trace_iops", turns, 1.0, "iops"),
        "trace_lost": sum(facts["lost"] + facts["doubts"] + ("refused" in facts) for facts in said),
        "trace_events": sum(facts["events"] for facts in said),
        "trace_cpu_share": round(statistics.median(shares), 3),
        "trace_freeze_seconds_max": round(max(frozen), 4) if frozen else None,
    }


def _fuse(where: Path, seconds: float, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    ours = where / "fuse"
    ours.mkdir()
    (where / "image").rename(ours / "image")
    fill(where / "bare", (ours / "image").stat().st_size)
    try:
        file = ours / "shown" / "disk"
        with agent(ours, ours / "image", file=file), _looped(file) as captured, _looped(where / "bare") as bare:
            for load, name in ((RANDOM, "fuse_iops"), (SEQUENTIAL, "fuse_sequential")):
                turns = [(_fio(load, captured, seconds), _fio(load, bare, seconds)) for _ in range(rounds)]
                figures |= _ratios(name, turns, *((1.0, "iops") if load is RANDOM else (1e6, "mb_per_s")))
    finally:
        session.release(ours / "files")  # which a killed agent leaves to the next one
    return figures


def _ratios(name: str, turns: list[tuple[float, float]], scale: float, unit: str) -> dict[str, Any]:
    ratios = [mine / bare for mine, bare in turns]
    return {
        f"{name}_ratio": round(statistics.median(ratios), 3),
        f"{name}_ratios": [round(ratio, 3) for ratio in ratios],
        f"{name}_agent_{unit}": round(statistics.median(mine for mine, _ in turns) / scale, 1),
        f"{name}_bare_{unit}": round(statistics.median(bare for _, bare in turns) / scale, 1),
    }


class _Tracker:
    """A running `trace_agent`, that has copied its disk."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def point(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("point\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PermanentError("the agent that traces ended", hint="see what it said above")
        found: dict[str, Any] = json.loads(line)
        return found

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def _tracked(directory: Path, device: Path) -> Iterator[_Tracker]:
    directory.mkdir()
    command = [sys.executable, "-m", "bench.trace_agent", str(directory), str(device)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            told = _Tracker(process)
            told.answer()
            yield told
            assert process.stdin is not None
            process.stdin.close()
            process.wait(_LIMIT_SECONDS)
        finally:
            process.kill()


@contextmanager
def _looped(file: Path) -> Iterator[Path]:
    found = _run("losetup", "-f", "--show", "--direct-io=on", str(file))
    try:
        yield Path(found.strip())
    finally:
        _run("losetup", "-d", found.strip())


def _fio(load: Load, device: Path, seconds: float) -> float:
    said = _run(
        *("fio", f"--name={load.name}", f"--filename={device}", "--ioengine=libaio", "--direct=1", "--time_based"),
        *(*writes.fio_options(load.workload), f"--iodepth={load.depth}", f"--runtime={seconds:g}"),
        *("--ramp_time=0.5", "--randrepeat=0", "--output-format=json"),
    )
    found: dict[str, Any] = json.loads(said[said.index("{") :])
    return float(found["jobs"][0]["write"][load.figure])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False, cwd="/")
    if done.returncode:
        raise PermanentError(f"{command[0]} ended with status {done.returncode}", hint=done.stderr[-500:])
    return done.stdout
