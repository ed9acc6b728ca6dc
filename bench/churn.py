"""`churn`: small writes on one machine through the whole path, and how old the oldest change not stored gets.

Everything is the product's, each a process of its own: fio writes 8 KiB at random (the simulator's workload `uniform`,
or another one that is named, see `writes`) to the disk that a real agent serves over NBD; what it captures goes over
TLS into a real process server, is sealed, and goes by HTTPS to the sink. 54 MB/s is what the product that this one
replaces names as the most that it takes from a machine.

    rpo_seconds_p99        over `seconds` at `mb_per_s`, sampled every 10 ms (see `rpo`)
    churn_mb_per_s_max     of a ladder of rates, each held for `step_seconds`, the highest that was held: fio got its
                           rate, as much was stored as was written, order was never lost, and p99 stayed under 5 s

The sink's record is the judge: it says what was stored and when, whatever the parts say of themselves. At the end a
named point is made and waited for, so everything that fio was told is written is known to be stored.

Weak: storage is the sink, on the same cores, as is fio; the ladder's steps are as far apart as `STEP` says.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import rpo, writes
from bench.datapath import SinkCluster
from bench.limit import default_level
from bench.measure import Moment, Window, cores
from bench.report import Report
from bench.rpo import Rpo
from bench.sink import Sink, StoredSegment
from bench.writes import fio_options
from replicar.errors import PermanentError
from simulator.cluster import MIB
from simulator.workloads import Kind, Workload

DEFAULT_MB_PER_S: Final = 54.0
DEFAULT_SECONDS: Final = 20.0
DEFAULT_STEP_SECONDS: Final = 6.0
DEFAULT_DISK_MIB: Final = 1024
BLOCK_BYTES: Final = 8 << 10
DEFAULT_WORKLOAD: Final = Kind.UNIFORM.value
DEPTH: Final = 16
DISK: Final = "disk"
#: The ladder: each step is so much more than the last, and there are at most so many.
STEP: Final = 1.3
MAX_STEPS: Final = 8
HELD_SECONDS: Final = 5.0
#: Of what was asked for, what has to be written, and of that, what has to be stored by the end of its step.
HELD_SHARE: Final = 0.95
READY_SECONDS: Final = 120.0
#: Others that use more than this of the cores make a run worth repeating.
QUIET_CORES: Final = 0.1


@dataclass(frozen=True, slots=True)
class Step:
    """One rate, held for a while."""

    asked_mb_per_s: float
    written_mb_per_s: float
    stored_mb_per_s: float
    rpo: Rpo
    writes: int
    latency_p99_ms: float
    start_ns: int
    end_ns: int

    @property
    def held(self) -> bool:
        enough = HELD_SHARE * self.asked_mb_per_s
        stored = self.stored_mb_per_s >= HELD_SHARE * self.written_mb_per_s
        return self.written_mb_per_s >= enough and stored and self.rpo.p99 < HELD_SECONDS


class ChurnCluster(SinkCluster):
    """The whole product, with the sink for storage, which keeps a record."""

    def __init__(self, directory: Path, level: int, disk_bytes: int, workload: Workload) -> None:
        super().__init__(directory, level)
        self.workload = workload
        self.sink = Sink(self.directory / "sink", recording=True)
        image = directory / "disk.img"
        with image.open("wb") as file:
            file.truncate(disk_bytes)
        self.disks[DISK] = image
        self._agent_settings["journal_bytes"] = 2048 * MIB

    def record(self) -> list[StoredSegment]:
        return StoredSegment.read_all(self.sink.record)

    async def protect(self) -> None:
        """Everything runs, and the disk is copied: from here on order is kept."""
        await self.prepare()
        await self.start_agent()
        await self.ordered()

    async def ordered(self) -> None:
        async with self.control() as control, asyncio.timeout(READY_SECONDS):
            while (await control.points(self.machine)).ordered_from is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # another process tells us nothing but by being asked

    async def is_ordered(self) -> bool:
        async with self.control() as control:
            return (await control.points(self.machine)).ordered_from is not None

    async def stored(self, name: str) -> int:
        """Make a named point and wait until it is stored; its sequence."""
        made = await self.replicar("tag", self.machine, name, "--wait-stored", "--json")
        return int(made.require().json()["sequence"])


def run(
    *,
    mb_per_s: float = DEFAULT_MB_PER_S,
    seconds: float = DEFAULT_SECONDS,
    step_seconds: float = DEFAULT_STEP_SECONDS,
    disk_mib: int = DEFAULT_DISK_MIB,
    workload: str = DEFAULT_WORKLOAD,
    directory: Path | None = None,
) -> Report:
    """The benchmark. Nothing of it is left in `directory`, and nothing left running."""
    if mb_per_s <= 0 or seconds < 1 or step_seconds < 0 or disk_mib < 64:
        raise PermanentError("these figures make no churn", hint="a rate above 0, a second at least, 64 MiB at least")
    chosen = writes.named(workload, BLOCK_BYTES)
    place, level = directory or Path(tempfile.gettempdir()), default_level()
    with tempfile.TemporaryDirectory(prefix="replicar-churn-", dir=place) as name:
        figures, faults = asyncio.run(
            _churn(lambda: ChurnCluster(Path(name), level, disk_mib * MIB, chosen), mb_per_s, seconds, step_seconds)
        )
    parameters = {
        "mb_per_s": mb_per_s,
        "seconds": seconds,
        "step_seconds": step_seconds,
        "disk_mib": disk_mib,
        "workload": workload,
        "block_bytes": BLOCK_BYTES,
        "depth": DEPTH,
        "level": level,
        "directory": str(place),
    }
    remarks = [
        "half of each write is random bytes; storage is a sink that takes HTTPS and keeps nothing, on the same cores, "
        "as is fio that writes"
    ]
    if figures["others_cores"] > QUIET_CORES:
        remarks.append(f"others used {figures['others_cores']:.2f} cores meanwhile: the churn held is lower for it")
    return Report("churn", parameters, figures, tuple(faults), tuple(remarks))


async def _churn(
    make: Callable[[], ChurnCluster], mb_per_s: float, seconds: float, step_seconds: float
) -> tuple[dict[str, Any], list[str]]:
    faults: list[str] = []
    async with make() as cluster:
        await cluster.protect()
        at_rate, window = await _measured(cluster, mb_per_s, seconds)
        steps: list[Step] = []
        rate = mb_per_s
        while at_rate.held and step_seconds and len(steps) < MAX_STEPS and (not steps or steps[-1].held):
            rate *= STEP
            steps.append(await _hold(cluster, rate, step_seconds))
            if not await cluster.is_ordered():
                break
        if not await cluster.is_ordered():
            steps.pop() if steps else faults.append("the change log was full, so order was lost")
        last = await cluster.stored("the-end")
        record = cluster.record()
    written = at_rate.writes + sum(step.writes for step in steps)
    described = max(each.last_sequence for each in record) - min(each.first_sequence for each in record)
    if described < written:
        faults.append(f"{written} writes were acknowledged, {described} descriptors are stored")
    if max(each.last_sequence for each in record) < last:
        faults.append("the last point is not in the sink's record")
    if not at_rate.held:
        faults.append(f"{at_rate.written_mb_per_s:.1f} MB/s were written and {at_rate.stored_mb_per_s:.1f} stored")
    best = max([at_rate, *steps], key=lambda step: step.written_mb_per_s if step.held else 0.0)
    return _figures(at_rate, steps, best, window), faults


async def _measured(cluster: ChurnCluster, mb_per_s: float, seconds: float) -> tuple[Step, Window]:
    parts = {child.name: child.process_id or 0 for child in (cluster.agent, cluster.process_server)}
    processes = parts | {"sink": cluster.sink.process_id}
    before = Moment.now(processes)
    step = await _hold(cluster, mb_per_s, seconds)
    return step, Window.between(before, Moment.now(processes))


async def _hold(cluster: ChurnCluster, mb_per_s: float, seconds: float) -> Step:
    """Write at a rate for a while, then wait until all of it is stored."""
    socket = cluster.nbd(DISK)
    command = [
        *("fio", "--name=churn", "--ioengine=nbd", f"--uri=nbd+unix:///{DISK}?socket={socket}"),
        *(*fio_options(cluster.workload), f"--iodepth={DEPTH}", "--time_based", f"--runtime={seconds:g}"),
        *("--randrepeat=0", f"--rate_iops={round(mb_per_s * 1e6 / BLOCK_BYTES)}", "--output-format=json"),
        *("--refill_buffers", "--buffer_compress_percentage=50"),
    ]
    began = time.time_ns()
    fio = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=cluster.directory
    )
    try:
        async with asyncio.timeout(seconds + 60):
            out, errors = await fio.communicate()
    finally:
        if fio.returncode is None:
            fio.kill()
    ended = time.time_ns()
    if fio.returncode:
        raise PermanentError(f"fio ended with status {fio.returncode}", hint=(errors or out).decode()[-500:])
    wrote = json.loads(out[out.index(b"{") :])["jobs"][0]["write"]
    await cluster.stored(f"step-{ended}")
    start, end = ended - int(wrote["runtime"] * 1e6), ended  # fio takes a moment to begin
    record = cluster.record()
    stored = _bytes(record, lambda each: start <= each.first_ns and each.answered_ns <= end)
    captured = _bytes(record, lambda each: start <= each.first_ns <= end)
    found = rpo.summary(rpo.ages(record, max(start, began), end))
    rate = wrote["bw_bytes"] / 1e6
    return Step(
        mb_per_s,
        rate,
        rate * stored / captured if captured else 0.0,
        found,
        int(wrote["total_ios"]),
        wrote["clat_ns"]["percentile"]["99.000000"] / 1e6,
        start,
        end,
    )


def _bytes(record: list[StoredSegment], wanted: Callable[[StoredSegment], bool]) -> int:
    return sum(each.raw_bytes for each in record if wanted(each))


def _figures(at_rate: Step, steps: list[Step], best: Step, window: Window) -> dict[str, Any]:
    return {
        "rpo_seconds_p99": round(at_rate.rpo.p99, 3),
        "rpo_seconds_p50": round(at_rate.rpo.p50, 3),
        "rpo_seconds_max": round(at_rate.rpo.longest, 3),
        "rpo_samples": at_rate.rpo.samples,
        "written_mb_per_s": round(at_rate.written_mb_per_s, 1),
        "write_latency_ms_p99": round(at_rate.latency_p99_ms, 2),
        "churn_mb_per_s_max": round(best.written_mb_per_s, 1),
        "churn_rpo_seconds_p99": round(best.rpo.p99, 3),
        "steps": [
            {
                "asked_mb_per_s": round(step.asked_mb_per_s, 1),
                "written_mb_per_s": round(step.written_mb_per_s, 1),
                "stored_mb_per_s": round(step.stored_mb_per_s, 1),
                "rpo_seconds_p99": round(step.rpo.p99, 3),
                "held": step.held,
            }
            for step in steps
        ],
        "cores_used": {name: round(cpu.total / window.seconds, 2) for name, cpu in window.processes.items()},
        "cores": cores(),
        "others_cores": round(max(0.0, window.others_cores), 2),
    }
