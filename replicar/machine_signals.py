"""A protected machine's health in signals, from what its parts last said of it: pure, as `signals` is for servers.

    heartbeat            its agent is silent                              78174
    process server       its agent is heard of, and reaches no server     78186
    RPO                  above its policy's threshold
    application points   there is none where there should be              78144
    change log           fills up: more changes than goes out             78188

What a machine's process server and its storage have is told where it is, by the server's own signals (806, 78028). A
threshold is the policy's where it has one; else it is what the event meant where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from replicar.signals import SILENT_CRITICAL_SECONDS, Level, Signal, of_silence

#: Application-consistent points are late after so many of their intervals; and gravely so.
LATE_INTERVALS, VERY_LATE_INTERVALS = 2, 4
#: Until the change log is full, after which order is lost.
FULL_WARNING_SECONDS, FULL_CRITICAL_SECONDS = 1800.0, 600.0
#: An RPO is gravely above its threshold at so many times of it.
FAR_ABOVE: Final = 4


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What is known of a machine that is protected.

    Attributes:
        silent_seconds: since its agent was heard of; 0 while it is, or when it said goodbye.
        unsent: why its agent sends nothing, in words; empty while it does.
        rpo_seconds: as the agent measured it, grown by its silence.
        application_every_seconds: how often there should be an application-consistent point; 0: never.
        application_age_seconds: of the newest that is in storage, or since the machine is protected.
        log_full_seconds: until its change log is full, if it goes on so; None: it does not fill.
    """

    name: str
    silent_seconds: float = 0.0
    unsent: str = ""
    rpo_seconds: float = 0.0
    rpo_threshold_seconds: float = 3600.0
    application_every_seconds: float = 0.0
    application_age_seconds: float = 0.0
    log_full_seconds: float | None = None


def of_machine(facts: MachineFacts) -> tuple[Signal, ...]:
    """The machine's signals."""
    return _heartbeat(facts), _process_server(facts), _rpo(facts), _application(facts), _log(facts)


def _heartbeat(facts: MachineFacts) -> Signal:
    if not facts.silent_seconds:
        return Signal("heartbeat", Level.HEALTHY, 0.0, "seconds")
    part = f"the agent of machine {facts.name}"
    return of_silence(part, facts.silent_seconds, "`mobility-agent run`", "78174")


def _process_server(facts: MachineFacts) -> Signal:
    if not facts.unsent or facts.silent_seconds:  # what was said before a silence is over, or covered by that
        return Signal("process server", Level.HEALTHY, 0.0, "seconds")
    return Signal(
        "process server",
        Level.CRITICAL if facts.rpo_seconds >= SILENT_CRITICAL_SECONDS else Level.WARNING,
        round(facts.rpo_seconds, 1),
        "seconds",
        f"machine {facts.name} sends nothing to its process server: {facts.unsent}",
        "see `process-server status` there and the way to its port 9443; if that server is gone: `replicar move`",
        "78186",
    )


def _rpo(facts: MachineFacts) -> Signal:
    rpo, threshold = facts.rpo_seconds, facts.rpo_threshold_seconds
    if rpo <= threshold:
        return Signal("RPO", Level.HEALTHY, round(rpo, 1), "seconds")
    return Signal(
        "RPO",
        Level.CRITICAL if rpo > FAR_ABOVE * threshold else Level.WARNING,
        round(rpo, 1),
        "seconds",
        f"changes of {rpo / 60:.0f} min ago are not in storage; the policy of machine {facts.name} allows "
        f"{threshold / 60:.0f} min",
        "see what is in its way, and the signals of its process server: `replicar status`",
    )


def _application(facts: MachineFacts) -> Signal:
    every, age = facts.application_every_seconds, facts.application_age_seconds
    if not every or age <= LATE_INTERVALS * every:
        return Signal("application points", Level.HEALTHY, round(age, 1) if every else 0.0, "seconds")
    return Signal(
        "application points",
        Level.CRITICAL if age > VERY_LATE_INTERVALS * every else Level.WARNING,
        round(age, 1),
        "seconds",
        f"machine {facts.name} has had no application-consistent point for {age / 60:.0f} min; its policy wants one "
        f"every {every / 60:.0f} min",
        "see what its hooks say: `mobility-agent status` there, and `replicar tag --application`",
        "78144",
    )


def _log(facts: MachineFacts) -> Signal:
    left = facts.log_full_seconds
    if left is None or left >= FULL_WARNING_SECONDS:
        return Signal("change log", Level.HEALTHY, None if left is None else round(left, 1), "seconds")
    return Signal(
        "change log",
        Level.CRITICAL if left < FULL_CRITICAL_SECONDS else Level.WARNING,
        round(left, 1),
        "seconds",
        f"more changes on machine {facts.name} than goes out: its change log is full in {left / 60:.0f} min, and then "
        "order is lost and its disks are compared",
        "mend what is in the way of sending, raise `journal_bytes`, or the rate at which it may send and be stored",
        "78188",
    )
