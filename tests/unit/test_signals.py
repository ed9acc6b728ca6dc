"""Health as pure functions over samples: thresholds, means, the worst one, and words for what is not well."""

from __future__ import annotations

import pytest

from replicar.signals import Level, Sample, Signal, of_server, of_silence, upload_seconds, worst

MIB = 1 << 20


def samples(*, processor: float = 0.1, pending: int = 0, rate: int = MIB, n: int = 91) -> list[Sample]:
    """Fifteen minutes, a sample in ten seconds, `rate` bytes a second stored."""
    return [Sample(10.0 * i, processor, 0.1, pending, 10 * i * rate) for i in range(n)]


def found(name: str, signals: tuple[Signal, ...]) -> Signal:
    return next(signal for signal in signals if signal.name == name)


@pytest.mark.parametrize("name", ["processor", "memory"])
@pytest.mark.parametrize(
    ("share", "level"),
    [(0.80, Level.HEALTHY), (0.81, Level.WARNING), (0.95, Level.WARNING), (0.96, Level.CRITICAL)],
)
def test_processor_and_memory_are_judged_by_their_mean(name: str, share: float, level: Level) -> None:
    swings = [share + swing for swing in (0.03, -0.03) * 45]
    taken = [Sample(10.0 * i, each, each, 0, 0) for i, each in enumerate(swings)]
    signal = found(name, of_server(taken, 1, 1))
    assert signal.level is level
    assert bool(signal.cause) == bool(signal.hint) == (level is not Level.HEALTHY)


def test_a_busy_start_means_nothing_yet() -> None:
    assert found("processor", of_server(samples(processor=1.0, n=6), 1, 1)).level is Level.HEALTHY
    assert found("processor", of_server(samples(processor=1.0, n=7), 1, 1)).level is Level.CRITICAL


@pytest.mark.parametrize(
    ("free", "level"),
    [(300, Level.HEALTHY), (299, Level.WARNING), (250, Level.WARNING), (249, Level.CRITICAL), (199, Level.CRITICAL)],
)
def test_the_cache_is_judged_as_it_is(free: int, level: Level) -> None:
    signal = found("cache free", of_server((), free, 1000))
    assert signal.level is level
    assert ("throttled" in signal.cause) == (free < 200)


@pytest.mark.parametrize(
    ("minutes", "level"),
    [(30, Level.HEALTHY), (31, Level.WARNING), (45, Level.WARNING), (46, Level.CRITICAL)],
)
def test_what_is_pending_is_judged_by_the_time_it_will_take(minutes: int, level: Level) -> None:
    signal = found("time to upload", of_server(samples(pending=minutes * 60 * MIB), 1, 1))
    assert (signal.level, signal.value) == (level, minutes * 60)


def test_an_idle_quarter_of_an_hour_does_not_make_a_burst_look_hopeless() -> None:
    idle = [Sample(10.0 * i, 0, 0, 0, 0) for i in range(80)]
    burst = [Sample(800.0 + 10 * i, 0, 0, 100 * MIB, 10 * i * MIB) for i in range(11)]
    assert upload_seconds([*idle, *burst]) == pytest.approx(100)


def test_storage_that_takes_nothing_is_critical_after_a_minute() -> None:
    stuck = samples(pending=MIB, rate=0)
    assert found("time to upload", of_server(stuck, 1, 1)).level is Level.CRITICAL
    assert found("time to upload", of_server(stuck, 1, 1)).code == "78028"
    assert found("time to upload", of_server(stuck[:6], 1, 1)).level is Level.HEALTHY


def test_a_silent_part_is_critical_after_fifteen_minutes() -> None:
    levels = [of_silence("process server ps1", seconds, "`x`", "806").level for seconds in (91, 899, 900)]
    assert levels == [Level.WARNING, Level.WARNING, Level.CRITICAL]


def test_the_worst_signal_wins() -> None:
    assert worst([]) is Level.HEALTHY
    assert worst([Level.WARNING, Level.HEALTHY]) is Level.WARNING
    assert worst([Level.WARNING, Level.CRITICAL, Level.HEALTHY]) is Level.CRITICAL
