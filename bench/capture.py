"""`capture`: what it costs whoever writes to a disk that the agent captures it; see `capture_nbd`, `capture_trace`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Final

from bench import capture_nbd, capture_trace
from bench.measure import cores, machine_cpu
from bench.report import Report

DEFAULT_SECONDS: Final = 3.0
DEFAULT_ROUNDS: Final = 5
DEFAULT_MIB: Final = 1024


def run(*, directory: Path | None, seconds: float, rounds: int, mib: int) -> Report:
    """Measure; the report says how."""
    where = directory or Path(tempfile.gettempdir())
    others = _others_cores()
    figures: dict[str, Any] = capture_nbd.run(where, seconds=seconds, rounds=rounds, image_bytes=mib << 20)
    figures |= capture_trace.run(where, seconds=seconds, rounds=rounds, image_bytes=mib << 20)
    figures["others_cores_before"] = others
    remarks = ["half text or random bytes, it is the same here: content is not looked at"]
    if "trace_iops_ratio" not in figures:
        remarks.append("not root: nothing was traced, nothing shown as a file")
    if others > 0.1:
        remarks.append(f"others used {others:.2f} of {cores()} cores before the run: take the ratios with care")
    parameters = {"seconds": seconds, "rounds": rounds, "image_bytes": mib << 20}
    return Report("capture", parameters, figures, (), tuple(remarks))


def _others_cores() -> float:
    """How many cores others keep busy, looked at for a second in which this process does nothing."""
    before, began = machine_cpu(), time.monotonic()
    time.sleep(1.0)
    return round((machine_cpu() - before) / (time.monotonic() - began), 2)
