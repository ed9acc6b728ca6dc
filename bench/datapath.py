"""`datapath`: how fast changes get from an agent through a process server into storage, beside what is possible at all.

The parts are processes of their own, over TLS: an agent (`datapath_agent`: the product's change log and sender, the log
being full to begin with), a real `process-server run` with its cache on disk, a real `config-server run` for identities
and assignment, and `sink` for storage. The time runs from the first byte sent until the last one is *stored*, as the
agent learns it, so cache, compression, encryption, upload and both acknowledgements are in it.

`limit` is measured before and after in the same run, and its mean is what the path is compared with:

    ratio       mb_per_s to limit_mb_per_s: both cores are idle some of the time, and Python is not free
    cpu_ratio   raw cpu seconds per GB to the path's own: how much of the work is the libraries'

MB are 1e6 bytes of what applications wrote; frames' headers and tables, retries and acknowledgements come on top and
count as cost. Frames are as large as capture makes them for a sender that is behind, as one with a full log is; one
that keeps up, or whose machine flushes often, sends smaller ones (`--frame-kib 64`), which cost more. What others use
of the cores meanwhile is shown, since it lowers `ratio` (and hardly `cpu_ratio`).

Weak: one machine, one connection, everything on the same cores, no network in between; the config server's heartbeats
go on beside it and are not counted. Where the kernel groups processes by session (autogroup), `nice` does not lift the
parts above others, since each has a session of its own: only a quiet machine gives a `ratio` that means something.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from bench import data as content, limit as limits, writes
from bench.datapath_agent import TRANSFER_SECONDS
from bench.limit import Limit
from bench.measure import GB, Cpu, cores, peak_memory_bytes
from bench.report import Report
from bench.sink import Sink
from mobility_agent.changelog import SEAL_BYTES
from replicar.errors import PermanentError
from replicar.memory import keep_memory
from simulator.child import Child
from simulator.cluster import MIB, READY_SECONDS, Cluster
from simulator.workloads import Kind

DEFAULT_GIB: Final = 2.0
#: As capture seals them for a sender that is behind, which is what a full log is.
DEFAULT_FRAME_KIB: Final = SEAL_BYTES >> 10
DEFAULT_WRITE_KIB: Final = 4
DEFAULT_WORKLOAD: Final = Kind.SEQUENTIAL.value
CACHE_BYTES: Final = 1024 * MIB
#: Filling the log comes before the transfer.
FILL_SECONDS: Final = 300.0
#: Others that use more than this of the cores make a run worth repeating.
QUIET_CORES: Final = 0.1
#: Which part of the path each raw step belongs to.
PARTS: Final = {
    "agent": ("tls_send",),
    "process_server": ("tls_receive", "hash", "cache_write", "compress", "encrypt", "https_put"),
    "sink": ("sink",),
}


class SinkCluster(Cluster):
    """The parts with a sink for storage, and the benchmark's agent for an agent."""

    def __init__(self, directory: Path, level: int) -> None:
        settings = {"cache_bytes": CACHE_BYTES, "compression_level": level, "heartbeat_seconds": 5.0}
        super().__init__(directory, disks={}, process_server_settings=settings)
        self.sink = Sink(self.directory / "sink")

    async def start_storage(self) -> None:
        await self.sink.start()

    async def prepare(self) -> None:
        """Everything but the agent runs, and its machine is assigned to the process server."""
        await self.start_storage()
        await self.make_vault()
        await self.start_config_server()
        await self.enrol_process_server()
        await self.enrol_agent()
        await self.start_process_server()
        async with self.control() as control, asyncio.timeout(READY_SECONDS):
            while not any(each.online for each in (await control.status()).process_servers):  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # another process tells us nothing but by being asked
            await control.protect(self.machine)

    async def send(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Run the agent to its end; what it measured.

        Raises:
            PermanentError: it failed, or took too long.
        """
        server, sink = self.process_server.process_id, self.sink.process_id
        command = [sys.executable, "-m", "bench.datapath_agent", "--directory", str(self.agent_directory), *arguments]
        log = self.directory / "agent.log"
        agent = Child("agent", [*command, f"process_server={server}", f"sink={sink}"], log)
        agent.start()
        try:
            status = await agent.ended(FILL_SECONDS + TRANSFER_SECONDS)
        except TimeoutError:
            raise agent.failure("did not end in time") from None
        finally:
            agent.kill()
        if status:
            raise agent.failure(f"ended with status {status}")
        result: dict[str, Any] = json.loads(agent.said().splitlines()[-1])
        assert server is not None
        result["peak_memory_bytes"] = peak_memory_bytes(server)
        return result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        self.sink.kill()

    def target_fields(self) -> dict[str, Any]:
        key_file = self.directory / "account-key"
        if not key_file.exists():
            key_file.touch(mode=0o600)
            key_file.write_text(self.sink.account_key)
        return {
            "endpoint": self.sink.blob_endpoint,
            "account_name": self.sink.account_name,
            "account_key_file": str(key_file),
            "container": self.container,
            "authority_file": str(self.sink.authority_file),
        }


def run(
    *,
    gib: float = DEFAULT_GIB,
    frame_kib: int = DEFAULT_FRAME_KIB,
    write_kib: int = DEFAULT_WRITE_KIB,
    workload: str = DEFAULT_WORKLOAD,
    limit_mib: int = limits.DEFAULT_MIB,
    directory: Path | None = None,
) -> Report:
    """The benchmark. Nothing of it is left in `directory`, and nothing left running."""
    if gib <= 0 or not 0 < write_kib <= frame_kib <= 1024 or frame_kib % write_kib:
        raise PermanentError("these sizes make no frames", hint="1 to 1024 KiB a frame, whole writes in each")
    keep_memory()
    level, place = limits.default_level(), directory or Path(tempfile.gettempdir())
    before = limits.measure_once(place, mib=limit_mib, level=level)
    with tempfile.TemporaryDirectory(prefix="replicar-datapath-", dir=place) as name:
        arguments = ["--bytes", str(int(gib * (1 << 30))), "--frame-kib", str(frame_kib), "--write-kib", str(write_kib)]
        arguments += ["--workload", writes.named(workload, write_kib << 10).kind]
        measured = asyncio.run(_path(Path(name), level, arguments))
    after = limits.measure_once(place, mib=limit_mib, level=level)
    parameters = {
        "gib": gib,
        "frame_kib": frame_kib,
        "write_kib": write_kib,
        "workload": workload,
        "limit_mib": limit_mib,
        "level": level,
        "seed": content.SEED,
        "cache_bytes": CACHE_BYTES,
        "directory": str(place),
    }
    others = measured["others_cores"]
    remarks = [*limits.REMARKS]
    if others > QUIET_CORES:
        remarks.append(f"others used {others:.2f} cores meanwhile: ratio is lower than on a quiet machine")
    return Report("datapath", parameters, _figures(measured, (before, after)), _faults(measured), tuple(remarks))


async def _path(directory: Path, level: int, arguments: Sequence[str]) -> dict[str, Any]:
    async with SinkCluster(directory, level) as cluster:
        await cluster.prepare()
        measured = await cluster.send(arguments)
        await cluster.process_server.stop()
        return measured | {"sink": await cluster.sink.stop()}


def _faults(measured: dict[str, Any]) -> tuple[str, ...]:
    """Why this was no run from one end to the other."""
    faults = []
    if measured["connections"] != 1 or measured["resends"]:
        faults.append(
            f"{measured['connections']} connections and {measured['resends']} repeats, where one pass was due"
        )
    if measured["sent_bytes"] != measured["frame_bytes"]:
        faults.append(f"{measured['sent_bytes']} bytes were sent of {measured['frame_bytes']}")
    if not measured["sink"].get("bytes_put"):
        faults.append("the sink got nothing")
    return tuple(faults)


def _figures(measured: dict[str, Any], around: Sequence[Limit]) -> dict[str, Any]:
    written, seconds = measured["written_bytes"], measured["seconds"]
    raw = limits.mean(around)
    raw_total = sum(raw.values())
    path = {part: Cpu(**cpu).per_gb(written) for part, cpu in measured["cpu"].items()}
    path_total = sum(cpu.total for cpu in path.values())
    mb_per_s, limit_mb_per_s = written / seconds / 1e6, cores() * GB / 1e6 / raw_total
    uploaded = measured["sink"].get("bytes_put", 0)
    return {
        "mb_per_s": round(mb_per_s, 1),
        "limit_mb_per_s": round(limit_mb_per_s, 1),
        "ratio": round(mb_per_s / limit_mb_per_s, 3),
        "cpu_ratio": round(raw_total / path_total, 3),
        "cpu_seconds_per_gb": {part: cpu.as_dict() for part, cpu in path.items()},
        "cpu_seconds_per_gb_total": round(path_total, 3),
        "raw_cpu_seconds_per_gb": {part: round(sum(raw[step] for step in steps), 3) for part, steps in PARTS.items()},
        "raw_cpu_seconds_per_gb_total": round(raw_total, 3),
        "raw_steps_cpu_seconds_per_gb": {name: round(value, 3) for name, value in raw.items()},
        "limits_mb_per_s": [round(limit.mb_per_s, 1) for limit in around],
        "cores_used": round(path_total * written / GB / seconds, 2),
        "others_cores": round(measured["others_cores"], 2),
        "idle_cores": round(max(0.0, cores() - path_total * written / GB / seconds - measured["others_cores"]), 2),
        "compress_ratio": round(written / uploaded, 3) if uploaded else None,
        "seconds": round(seconds, 3),
        "bytes": {"written": written, "sent": measured["sent_bytes"], "uploaded": uploaded},
        "page_faults_per_gb": {part: round(count / written * GB) for part, count in measured["page_faults"].items()},
        "process_server_peak_memory_mib": round(measured["peak_memory_bytes"] / MIB),
        "cache_past_page_cache": all(limit.direct for limit in around),
    }
