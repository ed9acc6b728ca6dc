"""A machine's health as a pure function of what is known of it: levels, codes, and words for what is not well."""

from __future__ import annotations

import pytest

from replicar.machine_signals import MachineFacts, of_machine
from replicar.signals import Level, Signal, worst

WELL = {"name": "shop", "rpo_seconds": 1.0, "application_every_seconds": 3600.0, "application_age_seconds": 7200.0}


def found(name: str, **facts: object) -> Signal:
    signals = of_machine(MachineFacts(**{**WELL, **facts}))  # type: ignore[arg-type]
    return next(signal for signal in signals if signal.name == name)


def test_a_machine_with_which_all_is_well_has_nothing_to_say() -> None:
    signals = of_machine(MachineFacts(**WELL))  # type: ignore[arg-type]
    assert worst(signal.level for signal in signals) is Level.HEALTHY
    assert not any(signal.cause or signal.hint or signal.code for signal in signals)
    assert len({signal.name for signal in signals}) == len(signals) == 5


@pytest.mark.parametrize(
    ("name", "facts", "level", "code"),
    [
        ("heartbeat", {"silent_seconds": 120.0}, Level.WARNING, "78174"),
        ("heartbeat", {"silent_seconds": 900.0}, Level.CRITICAL, "78174"),
        ("process server", {"unsent": "refused", "rpo_seconds": 899.0}, Level.WARNING, "78186"),
        ("process server", {"unsent": "refused", "rpo_seconds": 900.0}, Level.CRITICAL, "78186"),
        ("RPO", {"rpo_seconds": 3601.0}, Level.WARNING, ""),
        ("RPO", {"rpo_seconds": 14401.0}, Level.CRITICAL, ""),
        ("RPO", {"rpo_seconds": 61.0, "rpo_threshold_seconds": 60}, Level.WARNING, ""),
        ("application points", {"application_age_seconds": 7201.0}, Level.WARNING, "78144"),
        ("application points", {"application_age_seconds": 14401.0}, Level.CRITICAL, "78144"),
        ("change log", {"log_full_seconds": 1799.0}, Level.WARNING, "78188"),
        ("change log", {"log_full_seconds": 599.0}, Level.CRITICAL, "78188"),
    ],
)
def test_what_is_not_well_has_a_level_a_cause_a_next_step_and_the_known_code(
    name: str, facts: dict[str, object], level: Level, code: str
) -> None:
    signal = found(name, **facts)
    assert (signal.level, signal.code) == (level, code)
    assert "shop" in signal.cause
    assert signal.hint


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("RPO", {"rpo_seconds": 3600.0}),
        ("application points", {"application_every_seconds": 0.0, "application_age_seconds": 1e9}),
        ("change log", {"log_full_seconds": 1800.0}),
        ("change log", {"log_full_seconds": None}),
        ("process server", {"unsent": "said before it fell silent", "silent_seconds": 100.0}),
    ],
)
def test_what_is_within_its_bounds_or_not_asked_for_is_healthy(name: str, facts: dict[str, object]) -> None:
    assert found(name, **facts).level is Level.HEALTHY
