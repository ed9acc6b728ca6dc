"""What every part says of its own process, by the names that Prometheus's own libraries use for it."""

from __future__ import annotations

import os
import resource
from importlib import metadata
from pathlib import Path
from typing import Final

from replicar.observe.exposition import Page

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def page_of(part: str, proc: Path = Path("/proc")) -> Page:
    """A page that begins with the process: version, processor time, memory, open files; what is not known, left out."""
    page = Page()
    page.gauge(
        "replicar_build_info", "1; the labels say what runs.", 1, part=part, version=metadata.version("replicar")
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    page.counter(
        "process_cpu_seconds_total", "Processor time of this process, user and system.", used.ru_utime + used.ru_stime
    )
    try:
        resident = int((proc / "self/statm").read_text().split()[1]) * resource.getpagesize()
        files = len(os.listdir(proc / "self/fd"))
        # The name may hold anything, but ends with the last bracket.
        started = int((proc / "self/stat").read_text().rpartition(")")[2].split()[19]) / _TICKS
        booted = next(
            int(line.split()[1]) for line in (proc / "stat").read_text().splitlines() if line.startswith("btime ")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return page
    page.gauge("process_resident_memory_bytes", "Memory of this process that is in RAM.", resident)
    page.gauge("process_open_fds", "Open files and connections.", files)
    page.gauge(
        "process_max_fds", "Files and connections that may be open.", resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    )
    page.gauge("process_start_time_seconds", "When this process began, since 1970.", booted + started)
    return page
