"""`replicar-simulate`: run seeds, on all cores; replay one; shrink one that fails.

    replicar-simulate --seeds 1000 --first-seed 5000     a thousand stories, on every core
    replicar-simulate --seed 5017 --trace                one of them again, line by line, exactly as it was
    replicar-simulate --seed 5017 --shrink               the shortest story that fails in the same way
    replicar-simulate --story story.json                 one that was kept in a file (`stories`)

The exit status is 0 only if no promise was broken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from simulator import stories
from simulator.faults.catalogue import CATALOGUE
from simulator.planted import PLANTED, planted
from simulator.shrinking import shrink
from simulator.simulation import Outcome, simulate
from simulator.story import story_of

#: Seeds that a worker gets at once: enough that handing them out costs nothing, few enough to end together.
BATCH: Final = 5


@dataclass(slots=True)
class Summary:
    """What many stories came to; `failed` by seed."""

    seeds: int = 0
    virtual_seconds: float = 0.0
    seconds: float = 0.0
    faults: int = 0
    changes: int = 0
    points: int = 0
    failed: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.virtual_seconds += outcome.virtual_seconds
        self.faults += outcome.faults
        self.changes += outcome.changes
        self.points += outcome.points
        if outcome.violations:
            self.failed[outcome.seed] = outcome.violations

    def as_dict(self) -> dict[str, Any]:
        return {
            "seeds": self.seeds,
            "failed": sorted(self.failed),
            "seconds": round(self.seconds, 1),
            "seeds_per_second": round(self.seeds / self.seconds, 2) if self.seconds else None,
            "virtual_seconds_per_second": round(self.virtual_seconds / self.seconds, 1) if self.seconds else None,
            "virtual_seconds_per_seed": round(self.virtual_seconds / self.seeds, 1) if self.seeds else None,
            "faults_per_seed": round(self.faults / self.seeds, 1) if self.seeds else None,
            "changes": self.changes,
            "points_recovered": self.points,
        }


def tell(seed: int, *, bug: str | None = None) -> Outcome:
    """One seed's story; with `bug`, of a product that has it planted."""
    with planted(bug):
        return simulate(story_of(seed) if bug is None else PLANTED[bug].story(seed))


def run(seeds: Sequence[int], *, workers: int = 1, bug: str | None = None) -> Iterator[Outcome]:
    """The outcomes of many seeds, without their traces, in their order."""
    if workers <= 1:
        for seed in seeds:
            yield tell(seed, bug=bug)
        return
    batches = [list(seeds[start : start + BATCH]) for start in range(0, len(seeds), BATCH)]
    context = multiprocessing.get_context("spawn")  # a fork would share what the world replaces
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for outcomes in pool.map(_tell_all, batches, [bug] * len(batches)):
            yield from outcomes


def _tell_all(seeds: list[int], bug: str | None) -> list[Outcome]:
    return [tell(seed, bug=bug).without_trace() for seed in seeds]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    if options.seed is not None or options.story is not None:
        return _one(options)
    summary, began = Summary(), time.monotonic()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for outcome in run(seeds, workers=options.workers, bug=options.plant):
        summary.add(outcome)
        summary.seconds = time.monotonic() - began
        if outcome.violations:
            print(f"seed {outcome.seed} breaks a promise: {outcome.violations[0]}", flush=True)
            print(f"  again: replicar-simulate --seed {outcome.seed} --trace", flush=True)
        if not options.json and summary.seeds % 500 == 0:
            print(f"{summary.seeds} seeds, {len(summary.failed)} failed, {summary.seconds:.0f} s", flush=True)
    summary.seconds = time.monotonic() - began
    if options.json:
        print(json.dumps(summary.as_dict(), indent=2))
    else:
        facts = summary.as_dict()
        print(
            f"{facts['seeds']} seeds, {len(summary.failed)} failed: {facts['seconds']} s, "
            f"{facts['seeds_per_second']} seeds a second of {facts['virtual_seconds_per_seed']} virtual seconds and "
            f"{facts['faults_per_seed']} faults each"
        )
        for kind, count in Counter(violations[0][:80] for violations in summary.failed.values()).most_common():
            print(f"  {count} x {kind}")
    return 1 if summary.failed else 0


def _one(options: argparse.Namespace) -> int:
    if options.story is not None:
        story = stories.load(options.story).story
    else:
        story = story_of(options.seed) if options.plant is None else PLANTED[options.plant].story(options.seed)
    with planted(options.plant):
        outcome = simulate(story)
        if options.shrink and outcome.violations:
            story, outcome = shrink(story, outcome)
    if options.save is not None:
        stories.save(stories.Kept(story, "; ".join(outcome.violations[:1]), options.plant or ""), options.save)
    print(story)
    if options.trace:
        print(*outcome.trace, sep="\n")
    for violation in outcome.violations:
        print(f"breaks a promise: {violation}")
    print(
        f"{outcome.changes} changes, {outcome.segments} segments, {outcome.points} points recovered; {outcome.digest}"
    )
    return 1 if outcome.violations else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="replicar-simulate",
        description="Run the real parts under virtual time, with faults drawn from seeds, and check every promise.",
        epilog="Faults: " + ", ".join(CATALOGUE) + ".",
    )
    parser.add_argument("--seeds", type=int, default=200, help="how many stories (default 200)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, help="tell this story only")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happened")
    parser.add_argument("--shrink", action="store_true", help="with --seed: cut it short as long as it fails")
    parser.add_argument("--story", type=Path, help="tell the story in this file")
    parser.add_argument("--save", type=Path, help="with --seed: write the story, as it was cut short, to this file")
    parser.add_argument("--plant", choices=sorted(PLANTED), help="put a known bug into the product, to see it found")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
