"""What a recovery worker counts, and shows to Prometheus: its jobs by kind and end, and what it is at; pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from replicar.control.messages import JobKind, JobState
from replicar.observe.exposition import Page
from replicar.observe.process import page_of

PART: Final = "recovery-worker"
_PREFIX: Final = "replicar_recovery_worker"
#: How a job can leave this worker's hands.
_ENDS: Final = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.SUSPENDED)


@dataclass(slots=True)
class Tally:
    """Since the worker started. `going`: the job in hand; `is_heard`: whether the config server answered last."""

    jobs: Counter[tuple[JobKind, JobState]] = field(default_factory=Counter)
    lost: Counter[JobKind] = field(default_factory=Counter)
    going: JobKind | None = None
    is_heard: bool = False


def page(tally: Tally, kinds: tuple[JobKind, ...]) -> Page:
    """The page of one scrape.

    Args:
        kinds: what this worker carries out.
    """
    page = page_of(PART)
    text = "Jobs that left its hands, by kind and how; one that is suspended is claimed again."
    for kind in kinds:
        for state in _ENDS:
            page.counter(f"{_PREFIX}_jobs_total", text, tally.jobs[kind, state], kind=kind, state=state)
        lost = "Jobs that somebody else took over meanwhile."
        page.counter(f"{_PREFIX}_jobs_lost_total", lost, tally.lost[kind], kind=kind)
        going = "1 for the kind of the job that it is at."
        page.gauge(f"{_PREFIX}_job_going", going, int(tally.going is kind), kind=kind)
    page.gauge(f"{_PREFIX}_config_server_heard", "1 while the config server answers.", int(tally.is_heard))
    return page
