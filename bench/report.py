"""What a benchmark came to, with everything that somebody needs to judge or repeat it, as JSON or as a table."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import cores

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Report:
    """One run.

    Args:
        name: of the benchmark.
        parameters: everything that was or could have been set.
        figures: what was measured; units are in the names.
        faults: why the run says nothing about what it was to measure; none in a valid run.
        remarks: what a reader should bear in mind.
    """

    name: str
    parameters: dict[str, Any]
    figures: dict[str, Any]
    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    arguments: tuple[str, ...] = field(default=())

    @property
    def valid(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "valid": self.valid,
            **self.figures,
            "faults": list(self.faults),
            "remarks": list(self.remarks),
            "parameters": self.parameters,
            "command": shlex.join(["python", "-m", "bench", *self.arguments]),
            "machine": machine(),
            "commit": commit(),
        }


def show(report: Report, *, as_json: bool) -> None:
    """Print it: one JSON object, or a table."""
    data = report.as_dict()
    if as_json:
        print(json.dumps(data))
        return
    table = Table(title=f"{report.name}: {'valid' if report.valid else 'NOT VALID'}", show_header=False)
    for key, value in data.items():
        for name, text in _rows(key, value):
            table.add_row(name, text)
    Console().print(table)


def machine() -> dict[str, Any]:
    """The machine this runs on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(memory / (1 << 30), 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "system": platform.system(),
    }


def commit() -> dict[str, Any]:
    """The commit that was measured; `dirty` when the tree holds something else. Nulls where git can't say."""
    identifier = _git("rev-parse", "--verify", "--quiet", "HEAD")
    changes = _git("status", "--porcelain")
    return {"id": identifier or None, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _rows(key: str, value: Any) -> list[tuple[str, str]]:
    """A value as rows, nested ones indented by their keys."""
    if isinstance(value, dict):
        return [row for name, inner in value.items() for row in _rows(f"{key}.{name}", inner)]
    if isinstance(value, list):
        return [(key, str(each)) for each in value]
    return [(key, f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value))]
