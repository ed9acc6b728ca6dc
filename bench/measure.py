"""Processor time, as the kernel counts it: of a process with all its threads, and of the whole machine.

Cpu seconds say more than wall clock seconds do on a machine that is not ours alone; what others used meanwhile is
measured too, so that a disturbed run can be told from a slow program.

Weak: the kernel gives a process's time in ticks (10 ms, mostly), so windows should last a second or more; and work
that it does on behalf of nobody in particular (writing back, interrupts) is charged to whoever happens to run.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

#: Of input, in every figure "per GB" here.
GB: Final = 1e9
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cpu:
    """Seconds of processor time."""

    user: float = 0.0
    system: float = 0.0

    @property
    def total(self) -> float:
        return self.user + self.system

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.user + other.user, self.system + other.system)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.user - other.user, self.system - other.system)

    def per_gb(self, count: float) -> Cpu:
        """The same for each GB, if `count` bytes took this."""
        return Cpu(self.user / count * GB, self.system / count * GB)

    def as_dict(self) -> dict[str, float]:
        return {"user": round(self.user, 3), "system": round(self.system, 3), "total": round(self.total, 3)}


def own_cpu() -> Cpu:
    """Of this process so far, to the microsecond."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Cpu(usage.ru_utime, usage.ru_stime)


def process_cpu(process_id: int) -> Cpu:
    """Of any process so far, its threads included and its children not.

    Raises:
        OSError: there is no such process.
    """
    text = Path(f"/proc/{process_id}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()  # a name may hold anything, parentheses and blanks too
    return Cpu(int(fields[11]) / _TICKS, int(fields[12]) / _TICKS)


def page_faults(process_id: int) -> int:
    """How often the kernel had to give a process a page of memory so far."""
    text = Path(f"/proc/{process_id}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[7])


def peak_memory_bytes(process_id: int) -> int:
    """The most that a process had in memory at once."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def machine_cpu() -> float:
    """Seconds that all cores together were busy so far, whoever used them (a neighbour of this virtual machine too)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICKS


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time: the wall clock and every process's seconds, taken together."""

    wall: float
    machine: float
    processes: dict[str, Cpu]
    faults: dict[str, int]

    @classmethod
    def now(cls, processes: dict[str, int]) -> Self:
        """
        Args:
            processes: process ids by the name of the part.
        """
        times = {name: process_cpu(process_id) for name, process_id in processes.items()}
        faults = {name: page_faults(process_id) for name, process_id in processes.items()}
        return cls(time.monotonic(), machine_cpu(), times, faults)


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two moments."""

    seconds: float
    processes: dict[str, Cpu]
    faults: dict[str, int]
    others_cores: float  # used by everybody else, in the mean

    @classmethod
    def between(cls, start: Moment, end: Moment) -> Self:
        seconds = end.wall - start.wall
        processes = {name: end.processes[name] - cpu for name, cpu in start.processes.items()}
        ours = sum(cpu.total for cpu in processes.values())
        faults = {name: end.faults[name] - count for name, count in start.faults.items()}
        others = (end.machine - start.machine - ours) / seconds if seconds else 0.0
        return cls(seconds, processes, faults, max(others, 0.0))
