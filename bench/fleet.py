"""`fleet`: a thousand machines on one process server, one of them greedy.

The process server is the real command, its storage is the sink. The agents are light ones, several hundred to a process
(see `fleet_agents`), with real certificates of a real authority; the server has their assignments in its file, as it
has when the config server is away, which it is here.

    rss_mib                         the most that the server had in memory, all the time
    modest_rpo_seconds_p99          over all modest machines and all instants, sampled every 100 ms (see `rpo`)
    mb_per_s                        stored of all machines while it was measured; all of it is in the end
    generator_cores, sink_cores     what clients and storage took of the same cores, which is the server's no more
    server_ms_per_segment           the server's processor time, its bytes' cost included, for each segment

The modest ones write at `--modest-mb-per-s` together; the greedy one as much as it is let.

Weak: everything is on the same cores, a thousand clients' TLS included; there is no network between.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from bench import rpo
from bench.limit import default_level
from bench.measure import Moment, Window, cores, peak_memory_bytes
from bench.report import Report
from bench.sink import Sink, StoredSegment
from config_server.authority import Authority
from process_server import assignments
from replicar.clock import SystemClock
from replicar.control.identity import Identity, Role, new_key, signing_request
from replicar.control.messages import ProcessServerAssignment, ProcessServerInstructions
from replicar.errors import PermanentError
from replicar.formats.logblob import WRAPPED_KEY_BYTES
from simulator import command
from simulator.child import Child
from simulator.cluster import MIB, free_port, write_toml

DEFAULT_AGENTS: Final = 1000
DEFAULT_SECONDS: Final = 20.0
DEFAULT_MB_PER_S: Final = 50.0
DEFAULT_FRAME_KIB: Final = 64
CACHE_BYTES: Final = 4096 * MIB
PROCESSES: Final = 2
#: Until all are connected, their logs being made one by one; and until everything is stored at the end.
CONNECT_SECONDS: Final = 300.0
DRAIN_SECONDS: Final = 120.0
#: Before it is measured, so that it is no beginning that is measured.
SETTLE_SECONDS: Final = 5.0
SAMPLE_SECONDS: Final = 0.1


class Site:
    """An authority, the identities it issued, and a process server that has its assignments."""

    def __init__(self, directory: Path, agents: int, level: int) -> None:
        self.sink = Sink(directory / "sink", recording=True)
        self.server_directory = directory / "process-server"
        self.identities = directory / "identities"
        self.names = [f"m{number}" for number in range(agents)]
        self.port = free_port()
        self._directory, self._level = directory, level
        self._authority = Authority.create("fleet", SystemClock().now_ns())
        self.server = Child(
            "process-server",
            [*command.program("process-server"), "run", "--settings", self.server_directory / "settings.toml"],
            directory / "process-server.log",
        )

    def enrol(self) -> uuid.UUID:
        """Identities for all, and the assignments; the server's id."""
        server = self._identity(Role.PROCESS_SERVER, "ps-1", self.server_directory)
        messages = tuple(
            ProcessServerAssignment(
                machine_id=self._identity(Role.MACHINE, name, self.identities / name).id,
                name=name,
                epoch=1,
                incarnation=0,
                wrapped_key=base64.b64encode(bytes(WRAPPED_KEY_BYTES)).decode(),
                key_id=str(uuid.uuid4()),
                data_key=SecretStr(base64.b64encode(os.urandom(32)).decode()),
            )
            for name in self.names
        )
        assignments.save(self.server_directory, ProcessServerInstructions(assignments=messages, heartbeat_seconds=10.0))
        return server.id

    def _identity(self, role: Role, name: str, directory: Path) -> Identity:
        party, key = uuid.uuid4(), new_key()
        issued = self._authority.issue(signing_request(key), role, party, SystemClock().now_ns())
        directory.mkdir(parents=True)
        return Identity(
            id=party,
            role=role,
            name=name,
            config_server="127.0.0.1:1",
            vault="fleet",
            vault_id=uuid.UUID(int=1),
            incarnation=0,
            certificate_pem=issued.pem,
            authority_pem=self._authority.certificate_pem,
            key_pem=key,
        ).save(directory)

    async def start(self) -> None:
        await self.sink.start()
        key = self._directory / "account-key"
        key.touch(mode=0o600)
        key.write_text(self.sink.account_key)
        storage = {
            "endpoint": self.sink.blob_endpoint,
            "account_name": self.sink.account_name,
            "account_key_file": str(key),
            "container": "fleet",
            "authority_file": str(self.sink.authority_file),
        }
        settings = {
            "directory": str(self.server_directory),
            "listen_host": "127.0.0.1",
            "advertise_host": "127.0.0.1",
            "port": self.port,
            "cache_bytes": CACHE_BYTES,
            "compression_level": self._level,
            "storage": storage,
        }
        write_toml(self.server_directory / "settings.toml", settings)
        self.server.start()
        await self.server.until("listening", lambda: "listening on" in self.server.said(), CONNECT_SECONDS)

    def kill(self) -> None:
        self.server.kill()
        self.sink.kill()


def run(
    *,
    agents: int = DEFAULT_AGENTS,
    seconds: float = DEFAULT_SECONDS,
    modest_mb_per_s: float = DEFAULT_MB_PER_S,
    frame_kib: int = DEFAULT_FRAME_KIB,
    directory: Path | None = None,
) -> Report:
    """The benchmark. Nothing of it is left in `directory`, and nothing left running."""
    if agents < 2 * PROCESSES or seconds < 1 or modest_mb_per_s <= 0 or not 4 <= frame_kib <= 1024 or frame_kib % 4:
        raise PermanentError("these figures make no fleet", hint="four agents at least, 4 to 1024 KiB a frame")
    place, level = directory or Path(tempfile.gettempdir()), default_level()
    with tempfile.TemporaryDirectory(prefix="replicar-fleet-", dir=place) as name:
        figures, faults = asyncio.run(_fleet(Path(name), level, agents, seconds, modest_mb_per_s, frame_kib))
    parameters = {
        "agents": agents,
        "seconds": seconds,
        "modest_mb_per_s": modest_mb_per_s,
        "frame_kib": frame_kib,
        "processes": PROCESSES,
        "level": level,
        "cache_bytes": CACHE_BYTES,
        "directory": str(place),
    }
    remarks = (
        "half text, half random bytes; light agents (real TLS, certificates and protocol, no disks) and the sink are "
        "on the same cores as the server",
    )
    return Report("fleet", parameters, figures, tuple(faults), remarks)


async def _fleet(
    directory: Path, level: int, agents: int, seconds: float, mb_per_s: float, frame_kib: int
) -> tuple[dict[str, Any], list[str]]:
    site = Site(directory, agents, level)
    server_id = site.enrol()
    fleets: list[Child] = []
    try:
        await site.start()
        period = (agents - 1) * (frame_kib << 10) / (mb_per_s * 1e6)
        fleets = [_agents(directory, site, server_id, index, frame_kib, period) for index in range(PROCESSES)]
        for fleet in fleets:
            fleet.start()
        for fleet in fleets:
            await fleet.until("connecting", partial(_says, fleet, " connected"), CONNECT_SECONDS)
        _signal(fleets, signal.SIGUSR1)
        await asyncio.sleep(SETTLE_SECONDS)
        processes = {"process_server": site.server.process_id or 0, "sink": site.sink.process_id}
        processes |= {fleet.name: fleet.process_id or 0 for fleet in fleets}
        before, start = Moment.now(processes), time.time_ns()
        await asyncio.sleep(seconds)
        window, end = Window.between(before, Moment.now(processes)), time.time_ns()
        _signal(fleets, signal.SIGUSR2)
        said = []
        for fleet in fleets:
            if await fleet.ended(DRAIN_SECONDS):
                raise fleet.failure("ended with an error")
            said.append(json.loads(fleet.said().splitlines()[-1]))
        memory = peak_memory_bytes(site.server.process_id or 0)
        record = StoredSegment.read_all(site.sink.record)
    finally:
        for child in fleets:
            child.kill()
        site.kill()
    return _judge(record, said, window, start, end, memory, agents)


def _agents(directory: Path, site: Site, server: uuid.UUID, index: int, frame_kib: int, period: float) -> Child:
    words: list[str | Path] = [
        sys.executable,
        "-m",
        "bench.fleet_agents",
        "--identities",
        site.identities,
        "--server-id",
        str(server),
    ]
    words += ["--port", str(site.port), "--seed", str(index), "--frame-kib", str(frame_kib)]
    words += ["--seconds", f"{period:.6f}", *(["--greedy"] if index == 0 else []), *site.names[index::PROCESSES]]
    return Child(f"agents-{index}", words, directory / f"agents-{index}.log")


def _says(child: Child, words: str) -> bool:
    return words in child.said()


def _signal(fleets: list[Child], number: signal.Signals) -> None:
    for fleet in fleets:
        assert fleet.process_id is not None
        os.kill(fleet.process_id, number)


def _judge(
    record: list[StoredSegment],
    said: list[dict[str, Any]],
    window: Window,
    start: int,
    end: int,
    memory: int,
    agents: int,
) -> tuple[dict[str, Any], list[str]]:
    greedy = said[0]["greedy"]
    by_machine: dict[int, list[StoredSegment]] = defaultdict(list)
    for each in record:
        by_machine[each.machine].append(each)
    step = int(SAMPLE_SECONDS * 1e9)
    modest = [
        age
        for machine, segments in by_machine.items()
        if machine != greedy
        for age in rpo.ages(segments, start, end, step)
    ]
    found, seconds = rpo.summary(modest), (end - start) / 1e9
    within = [each for each in record if start <= each.answered_ns < end]
    stored = {machine: sum(each.raw_bytes for each in within if each.machine == machine) for machine in (greedy,)}
    total = sum(each.raw_bytes for each in within)
    faults = []
    if len(by_machine) != agents:
        faults.append(f"{len(by_machine)} machines of {agents} stored anything")
    for name, what in (("full", "times a modest log was full"), ("resends", "repeats"), ("connections", "reconnects")):
        if count := sum(each[name] for each in said):
            faults.append(f"{count} {what}: {[reason for each in said for reason in each['refusals']]}")
    cpu = {name: each.total for name, each in window.processes.items()}
    generator = sum(each for name, each in cpu.items() if name not in ("process_server", "sink"))
    figures = {
        "rss_mib": round(memory / MIB),
        "modest_rpo_seconds_p99": round(found.p99, 2),
        "modest_rpo_seconds_p50": round(found.p50, 2),
        "modest_rpo_seconds_max": round(found.longest, 2),
        "mb_per_s": round(total / seconds / 1e6, 1),
        "greedy_mb_per_s": round(stored[greedy] / seconds / 1e6, 1),
        "segments_per_s": round(len(within) / seconds),
        "segment_kib": round(total / max(1, len(within)) / 1024),
        "server_ms_per_segment": round(1000 * cpu["process_server"] / max(1, len(within)), 2),
        "server_cores": round(cpu["process_server"] / window.seconds, 2),
        "generator_cores": round(generator / window.seconds, 2),
        "sink_cores": round(cpu["sink"] / window.seconds, 2),
        "cores": cores(),
        "others_cores": round(max(0.0, window.others_cores), 2),
    }
    return figures, faults
