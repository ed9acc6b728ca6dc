"""What capture a disk can have, found out by trying, and said in words.

Nothing is guessed from versions: eBPF is usable if these very programs load and attach, the tracing file system if an
instance can be made in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from mobility_agent.capture.trace import bpf
from mobility_agent.capture.trace.counters import Counters
from mobility_agent.capture.trace.events import BpfEvents, EventSource
from mobility_agent.capture.trace.tracefs import TracefsEvents
from mobility_agent.capture.trace.tracked import BlockDevice
from replicar.errors import PermanentError

_PROBE_RING_BYTES: Final = 1 << 16


class Method(StrEnum):
    """How events come."""

    BPF = "bpf"
    TRACEFS = "tracefs"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Choice:
    """The method, and why it is that one and no better one; for `NONE`, what the operator can do about it."""

    method: Method
    reason: str


def choose(disk: Path, *, log_directory: Path | None = None) -> Choice:
    """How the changes of `disk` can be traced on this machine.

    Args:
        log_directory: where the change log is kept, which must not be on the disk itself.
    """
    if refusal := _refusal(disk, log_directory):
        return Choice(Method.NONE, refusal)
    return choose_method()


def choose_method() -> Choice:
    """The same of the machine alone."""
    if not bpf.supported():
        refused = "eBPF is not prepared for this processor"
    else:
        try:
            BpfEvents(ring_bytes=_PROBE_RING_BYTES, discard_ranges=True).close()
            return Choice(
                Method.BPF, "the kernel takes eBPF programs on its block events, at about a microsecond a write"
            )
        except (OSError, PermanentError) as error:
            refused = f"eBPF is refused ({_words(error)})"
    try:
        TracefsEvents(buffer_bytes=_PROBE_RING_BYTES, discard_ranges=True).close()
    except (OSError, PermanentError) as error:
        return Choice(
            Method.NONE,
            f"{refused}, and so is the tracing file system ({_words(error)}): run the agent as root,"
            " or use inline capture",
        )
    return Choice(
        Method.TRACEFS,
        f"{refused}; the tracing file system works, and costs writers up to a third at 100,000 writes/s",
    )


def open_source(method: Method, *, discard_ranges: bool = False) -> EventSource:
    """Begin to record events by `method`.

    Raises:
        PermanentError: it does not work any more.
    """
    try:
        if method is Method.BPF:
            return BpfEvents(discard_ranges=discard_ranges)
        if method is Method.TRACEFS:
            return TracefsEvents(discard_ranges=discard_ranges)
    except OSError as error:
        raise PermanentError(f"trace capture by {method} can't begin: {error.strerror}") from None
    raise PermanentError("this machine has no trace capture", hint="the agent's log says why")


def _refusal(disk: Path, log_directory: Path | None) -> str:
    try:
        device = BlockDevice(disk)
        Counters(device.whole).read()
    except PermanentError as error:
        return str(error)
    if not (device.whole / "mq").is_dir():
        below = sorted(path.name for path in device.whole.glob("slaves/*"))
        beneath = f": protect what is beneath it ({', '.join(below)})" if below else ": use inline capture"
        return f"{disk} makes no requests of its own (device mapper, RAID and the like){beneath}"
    if device.setting("zoned", "none") != "none":
        return f"{disk} is a zoned disk, whose resets and appends are not followed: use inline capture"
    if device.setting("iostats", "1") != "1":
        return (
            f"the kernel does not count what is written to {disk}, so that nothing could be proven complete:"
            f" echo 1 > /sys/block/{device.whole.name}/queue/iostats"
        )
    if log_directory is not None and _device_of(log_directory) in device.family():
        return (
            f"the agent's directory {log_directory} lies on {disk} itself, so every copy would be a change to copy:"
            " put it on a disk that is not traced"
        )
    return ""


def _device_of(path: Path) -> str:
    existing: Iterable[Path] = (path, *path.absolute().parents)
    number = next(candidate.stat().st_dev for candidate in existing if candidate.exists())
    return f"{os.major(number)}:{os.minor(number)}"


def _words(error: Exception) -> str:
    return error.message if isinstance(error, PermanentError) else str(getattr(error, "strerror", None) or error)
