"""What a process server measures of its host and of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from process_server.vitals import MAX_SAMPLES, SAMPLE_SECONDS, Host, Vitals, read_host
from replicar.signals import Level

STAT = "cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3\n"
MEMORY = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    250 kB\n"


def test_the_host_is_read_from_the_kernels_own_counts(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT.format(busy=300, idle=700))
    (tmp_path / "meminfo").write_text(MEMORY)
    assert read_host(tmp_path) == Host(1000, 300, 0.75)
    assert read_host(tmp_path / "missing") == Host()
    real = read_host()
    assert 0 < real.busy_ticks < real.ticks
    assert 0 < real.memory_share < 1


def test_processor_time_is_what_passed_between_two_samples_and_samples_are_bounded() -> None:
    hosts = iter(Host(1000 * n, 970 * n, 0.5) for n in range(1, 10**6))
    vitals = Vitals(lambda: next(hosts))
    for second in range(3 * MAX_SAMPLES * int(SAMPLE_SECONDS)):
        vitals.sample(float(second), 0, 0)
    processor, memory, *_ = vitals.signals(1, 1)
    assert processor.level is Level.CRITICAL
    assert processor.value == pytest.approx(97.0)
    assert memory.level is Level.HEALTHY
    assert len(vitals._samples) == MAX_SAMPLES
