"""Health in signals: what is measured, how bad it is, why that may be and what to do next; pure functions.

A whole is as healthy as its worst signal. The thresholds are those that operators of such servers know: processor and
memory above 80 and 95 %, cache with less than 30, 25 (and, throttled, 20) % free, 30 and 45 minutes of uploads
pending, 15 minutes without a heartbeat. What swings is judged by its mean over 15 minutes; a cache that is full and a
part that is silent are judged as they are.

`code` is the number under which the event was known in Azure Site Recovery, for whoever has alerts on that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final

WINDOW_SECONDS: Final = 900.0
#: Before a mean says anything; a start is busy and means nothing.
LEAST_SECONDS: Final = 60.0
BUSY_WARNING, BUSY_CRITICAL = 0.80, 0.95
CACHE_WARNING, CACHE_CRITICAL, CACHE_THROTTLED = 0.30, 0.25, 0.20
UPLOAD_WARNING_SECONDS, UPLOAD_CRITICAL_SECONDS = 30 * 60.0, 45 * 60.0
SILENT_CRITICAL_SECONDS: Final = 900.0


class Level(StrEnum):
    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"


_ORDER: Final = tuple(Level)


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing measured. `value` in `unit`; None where it has no bound (nothing is uploaded at all)."""

    name: str
    level: Level
    value: float | None
    unit: str
    cause: str = ""
    hint: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A process server at one moment. Shares are 0 to 1; `stored_bytes` counts up."""

    at_seconds: float
    processor_share: float
    memory_share: float
    pending_bytes: int
    stored_bytes: int


def rank(level: Level) -> int:
    """0 for healthy, and more the worse it is."""
    return _ORDER.index(level)


def worst(levels: Iterable[Level]) -> Level:
    """The worst of them; healthy when there is none."""
    return max(levels, key=_ORDER.index, default=Level.HEALTHY)


def of_server(samples: Sequence[Sample], cache_free: int, cache_total: int) -> tuple[Signal, ...]:
    """A process server's signals. `samples`: of the last 15 minutes, oldest first."""
    return (
        _busy("processor", _mean(samples, "processor_share"), "compressing and encrypting takes all of it"),
        _busy(
            "memory",
            _mean(samples, "memory_share"),
            "something else on this host uses it, or buffers_bytes is too high",
        ),
        _cache(cache_free / cache_total if cache_total else 1.0),
        _upload(samples),
    )


def of_silence(part: str, seconds: float, command: str, code: str) -> Signal:
    """Whether a part is heard of; critical after 15 minutes, a warning from the start, since it should never be."""
    level = Level.CRITICAL if seconds >= SILENT_CRITICAL_SECONDS else Level.WARNING
    return Signal(
        "heartbeat",
        level,
        round(seconds, 1),
        "seconds",
        f"{part} was not heard of for {seconds / 60:.0f} min: it does not run, or can't reach the config server",
        f"see whether {command} is up there, and reaches this config server",
        code,
    )


def upload_seconds(samples: Sequence[Sample]) -> float | None:
    """How long what is pending now will take, at the rate at which things were stored while any was pending.

    None if nothing was stored in all that time.
    """
    if not samples or not samples[-1].pending_bytes:
        return 0.0
    busy = stored = 0.0
    for before, after in pairwise(samples):
        if before.pending_bytes:
            busy += after.at_seconds - before.at_seconds
            stored += max(after.stored_bytes - before.stored_bytes, 0)
    if busy < LEAST_SECONDS:
        return 0.0  # too early to say
    return samples[-1].pending_bytes * busy / stored if stored else None


def _mean(samples: Sequence[Sample], name: str) -> float | None:
    if not samples or samples[-1].at_seconds - samples[0].at_seconds < LEAST_SECONDS:
        return None
    values = [float(getattr(sample, name)) for sample in samples]
    return round(sum(values) / len(values), 6)


def _busy(name: str, share: float | None, why: str) -> Signal:
    percent = None if share is None else round(100 * share, 1)
    if share is None or share <= BUSY_WARNING:
        return Signal(name, Level.HEALTHY, percent if percent is not None else 0.0, "percent")
    return Signal(
        name,
        Level.CRITICAL if share > BUSY_CRITICAL else Level.WARNING,
        percent,
        "percent",
        f"{percent} % of the {name} was in use over the last 15 minutes: {why}",
        "give the host more of it, or move machines to another process server: `replicar move`",
    )


def _cache(share: float) -> Signal:
    percent = math.floor(1000 * share) / 10
    if share >= CACHE_WARNING:
        return Signal("cache free", Level.HEALTHY, percent, "percent")
    throttled = "; receiving is throttled" if share < CACHE_THROTTLED else ""
    return Signal(
        "cache free",
        Level.CRITICAL if share < CACHE_CRITICAL else Level.WARNING,
        percent,
        "percent",
        f"{percent} % of the cache is free{throttled}: storage takes less than machines send, or is away",
        "look at the errors of storage first; then at `[bandwidth]`, `cache_bytes`, and `replicar move`",
    )


def _upload(samples: Sequence[Sample]) -> Signal:
    seconds = upload_seconds(samples)
    if seconds is not None and seconds <= UPLOAD_WARNING_SECONDS:
        return Signal("time to upload", Level.HEALTHY, round(seconds, 1), "seconds")
    how_long = "at no rate at all, for nothing was stored lately" if seconds is None else f"in {seconds / 60:.0f} min"
    critical = seconds is None or seconds > UPLOAD_CRITICAL_SECONDS
    return Signal(
        "time to upload",
        Level.CRITICAL if critical else Level.WARNING,
        None if seconds is None else round(seconds, 1),
        "seconds",
        f"what is pending will be in storage {how_long}",
        "look at the errors of storage, at the line to it, and at `[bandwidth]`",
        "78028",
    )
