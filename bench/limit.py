"""`limit`: what these cores could do at best, from what the libraries of the path cost alone.

Counted, in cpu seconds (user and system) for each GB (1e9 bytes) of input, is what *every* program must spend that does
what this one promises, with these libraries: each byte is

    sent and received once over TLS 1.3          agent to process server
    hashed once                                  frames are verified when they arrive
    written once to a durable cache              O_DIRECT, with a sync
    compressed once                              zstd at the process server's default level, in a segment's chunks
    encrypted once, as it is then compressed     AES-256-GCM
    put once over HTTPS, compressed              aiohttp on uvloop; the sink's side too, since it runs on these cores
                                                 (the product's own uploads, from threads, come to about the same)

and nothing else: no protocol, no bookkeeping, no Python between the libraries, no thread waiting for another. Buffers
are owned and reused, so no memory is faulted in. Each step is measured alone, so none disturbs another one's caches.
Steps behind the compression are weighted by the bytes that are left by then.

`limit_mb_per_s` is what all cores together would reach if they did only that, without ever being idle. No real program
can; how near one comes is `ratio` (by wall clock) and `cpu_ratio` (by cpu seconds) of the `datapath` benchmark.

Weak: one step's cost alone is not its cost beside others, which share memory bandwidth and caches with it; so the limit
is a little higher than anything can reach. Writing the input into the agent's change log and hashing it there happens
before (see `datapath`) and is not counted.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import data as content, raw_network, raw_steps
from bench.measure import GB, Cpu, cores
from bench.report import Report
from bench.sink import Sink
from process_server.settings import Settings
from replicar.formats.segment import ALIGNMENT, MAX_RAW_BYTES
from replicar.memory import keep_memory

MIB: Final = 1 << 20
#: Of distinct data; no chunk sees it come round.
DATA_MIB: Final = 64
DEFAULT_MIB: Final = 1024
REMARKS: Final = (
    content.DESCRIPTION,
    "the upload goes into a sink: an HTTPS endpoint that keeps nothing",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One library's work. `cpu` is for each GB that passes there, of which there are `weight` for a GB of input."""

    name: str
    cpu: Cpu
    weight: float = 1.0

    @property
    def seconds_per_gb(self) -> float:
        """Cpu seconds per GB of input."""
        return self.cpu.total * self.weight


@dataclass(frozen=True, slots=True)
class Limit:
    """All steps, measured once."""

    steps: tuple[Step, ...]
    compress_ratio: float
    direct: bool

    @property
    def seconds_per_gb(self) -> float:
        """Cpu seconds per GB of input, of all steps together."""
        return sum(step.seconds_per_gb for step in self.steps)

    @property
    def mb_per_s(self) -> float:
        return cores() * GB / 1e6 / self.seconds_per_gb

    def as_dict(self) -> dict[str, Any]:
        return {
            "limit_mb_per_s": round(self.mb_per_s, 1),
            "cpu_seconds_per_gb": {step.name: round(step.seconds_per_gb, 3) for step in self.steps},
            "cpu_seconds_per_gb_total": round(self.seconds_per_gb, 3),
            "steps": {
                step.name: {**step.cpu.as_dict(), "bytes_per_input_byte": round(step.weight, 3)} for step in self.steps
            },
            "compress_ratio": round(self.compress_ratio, 3),
            "cache_past_page_cache": self.direct,
        }


def default_level() -> int:
    """The zstd level that a process server uses unless told otherwise."""
    level: int = Settings.model_fields["compression_level"].default
    return level


def measure(directory: Path, sink: Sink, *, mib: int, level: int) -> Limit:
    """Measure every step once; blocks for some seconds.

    Args:
        directory: on the filesystem that the cache is to be on.
        sink: running.
        mib: MiB of input for each step.
        level: zstd's.
    """
    total = mib * MIB
    data = content.mixed(min(mib, DATA_MIB) * MIB)
    compressed = raw_steps.compressing(data, total, level)
    share = 1 / compressed.ratio
    body = int(MAX_RAW_BYTES * share) // ALIGNMENT * ALIGNMENT
    tls = raw_network.tls_one_way(sink.certificates, data, total)
    put = raw_network.https_put(sink, body, int(total * share))
    cache, direct = raw_steps.caching(directory, total)
    steps = (
        Step("tls_send", tls.near.per_gb(tls.count)),
        Step("tls_receive", tls.far.per_gb(tls.count)),
        Step("hash", raw_steps.hashing(data, total).per_gb(total)),
        Step("cache_write", cache.per_gb(total)),
        Step("compress", compressed.cpu.per_gb(total)),
        Step("encrypt", raw_steps.sealing(compressed.chunks, int(total * share)).per_gb(total * share), share),
        Step("https_put", put.near.per_gb(put.count), share),
        Step("sink", put.far.per_gb(put.count), share),
    )
    return Limit(steps, compressed.ratio, direct)


def measure_once(directory: Path, *, mib: int, level: int) -> Limit:
    """`measure` with a sink of its own; nothing is left in `directory` or running."""
    with tempfile.TemporaryDirectory(prefix="replicar-limit-", dir=directory) as name:
        place = Path(name)
        sink = Sink(place / "sink")
        try:
            asyncio.run(sink.start())
            return measure(place, sink, mib=mib, level=level)
        finally:
            sink.kill()


def mean(limits: Sequence[Limit]) -> dict[str, float]:
    """Cpu seconds per GB of input by step, averaged over several measurements."""
    names = [step.name for step in limits[0].steps]
    return {
        name: sum(limit.steps[place].seconds_per_gb for limit in limits) / len(limits)
        for place, name in enumerate(names)
    }


def run(*, mib: int = DEFAULT_MIB, directory: Path | None = None, level: int | None = None) -> Report:
    """The benchmark. Nothing of it is left in `directory`."""
    level = default_level() if level is None else level
    kept = keep_memory()
    place = directory or Path(tempfile.gettempdir())
    limit = measure_once(place, mib=mib, level=level)
    remarks = list(REMARKS)
    if not kept:
        remarks.append("the allocator can't be told to keep memory; compressing includes faulting it in")
    if not limit.direct:
        remarks.append("the cache's filesystem does not take O_DIRECT; writes went through the page cache")
    parameters = {"mib": mib, "level": level, "seed": content.SEED, "directory": str(place)}
    return Report("limit", parameters, limit.as_dict(), remarks=tuple(remarks))
