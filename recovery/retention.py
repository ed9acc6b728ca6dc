"""Which points are kept, and which are given up: a pure function of a policy, the time, and what there is.

Within the *window* every instant is kept. Before it points are thinned: of every stretch of time one is kept, and
stretches grow with age until points are given up altogether. Of a stretch the best point is kept: one that is
consistent for an application rather than another named one, a named one rather than one that is only the end of a
segment, and of equals the latest. Stretches begin at multiples of their length and each rule's is a multiple of the
one before, so a point that is kept in the end was kept all the time: thinning never misses what it gave up.

Ages are counted from the last change that the index knows, or from the clock where that is behind it. So a machine that
went silent keeps its past, and a folder whose clock is far ahead gives nothing up.

Kept whatever the policy says: the state before a gap that has not ended (there is none after it), and what is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from recovery.history import History, Place
from replicar.errors import PermanentError
from replicar.formats.indexblob import IndexName
from replicar.formats.record import Consistency
from replicar.log.index import Fold

_NS: Final = 1_000_000_000
_HOUR_NS: Final = 3600 * _NS
_DAY_NS: Final = 24 * _HOUR_NS


@dataclass(frozen=True, slots=True)
class Rule:
    """Up to an age of `until_ns`, one point is kept of every `every_ns`."""

    until_ns: int
    every_ns: int


@dataclass(frozen=True, slots=True)
class Policy:
    """How long what is kept; the defaults are what operators know: all for two hours, one an hour for a day, one per
    two hours for a week, one per four hours for 15 days.

    Raises:
        PermanentError: rules that contradict each other.
    """

    window_ns: int = 2 * _HOUR_NS
    rules: tuple[Rule, ...] = (
        Rule(_DAY_NS, _HOUR_NS),
        Rule(7 * _DAY_NS, 2 * _HOUR_NS),
        Rule(15 * _DAY_NS, 4 * _HOUR_NS),
    )

    def __post_init__(self) -> None:
        until, every = self.window_ns, 1
        for rule in self.rules:
            if rule.until_ns <= until or rule.every_ns < every or rule.every_ns % every:
                raise PermanentError(
                    f"a retention rule of one point per {rule.every_ns // _NS} s up to {rule.until_ns // _NS} s does "
                    "not follow the one before it",
                    hint="each rule reaches further than the one before, and its stretch is a multiple of that one's",
                )
            until, every = rule.until_ns, rule.every_ns

    def rule(self, time_ns: int, now_ns: int) -> Rule | None:
        """The rule for points of that time; None beyond the last one.

        All points of the longest stretch grow old together, when the last of them does: so a stretch is never judged by
        two rules at once.
        """
        longest = self.rules[-1].every_ns if self.rules else 1
        age_ns = now_ns - (time_ns // longest + 1) * longest
        return next((rule for rule in self.rules if age_ns < rule.until_ns), None)


@dataclass(frozen=True, slots=True)
class Keep:
    """A state to be kept, and why; `checkpoint` where there is one of it already."""

    place: Place
    reason: str
    checkpoint: IndexName | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """A state that somebody reads from, up to a time, and the checkpoint that it was opened from."""

    sequence: int
    until_ns: int
    checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What the next fold says: where the log goes on, and what is kept of what was before."""

    floor: IndexName
    keep: tuple[Keep, ...]


@dataclass(frozen=True, slots=True, order=True)
class _Candidate:
    rank: int
    place: Place
    reason: str
    checkpoint: IndexName | None = None


def plan_fold(
    policy: Policy, now_ns: int, fold: Fold, whole: Sequence[IndexName], history: History, pins: Iterable[Pin] = ()
) -> FoldPlan | None:
    """The next fold; None where nothing is to be given up, or nothing can be yet.

    Args:
        whole: the checkpoints that end a segment, from the floor on.
        history: of the newest of them; `trim`med at most to the fold that is in force.
    """
    as_of_ns = aged_from(now_ns, history)
    floor = max((name for name in whole if name.last <= as_of_ns - policy.window_ns), default=None, key=_sequence)
    if fold.floor is not None and (floor is None or floor.first < fold.floor.first):
        floor = fold.floor
    if floor is None:
        return None
    chosen: dict[int, Keep] = {}
    for item in _thinned(policy, as_of_ns, _candidates(fold, floor, whole, history)):
        chosen[item.place.sequence] = Keep(item.place, item.reason, item.checkpoint)
    gap = history.gap_at(floor.first)
    if gap is not None and gap.before is not None and gap.before.sequence < floor.first:
        chosen.setdefault(gap.before.sequence, Keep(gap.before, "before a gap"))
    there = {name.first: name for name in whole} | {item.checkpoint.first: item.checkpoint for item in fold.kept}
    for pin in pins:
        # One that came too late for the fold before is no state any more that could be kept; it holds up the sweep.
        is_left = pin.sequence >= fold.floor_sequence or pin.sequence in there
        if pin.until_ns > now_ns and pin.sequence < floor.first and is_left:
            chosen.setdefault(pin.sequence, Keep(Place(pin.sequence, 0), "pinned"))
    keep = tuple(
        Keep(item.place, item.reason, item.checkpoint or there.get(sequence))
        for sequence, item in sorted(chosen.items())
    )
    same = fold.floor == floor and {item.checkpoint for item in fold.kept} == {item.checkpoint for item in keep}
    return None if same else FoldPlan(floor, keep)


def aged_from(now_ns: int, history: History) -> int:
    """The time from which ages are counted; see the module."""
    return min(now_ns, history.latest_ns) if history.latest_ns else now_ns


def _sequence(name: IndexName) -> int:
    return name.first


def _candidates(fold: Fold, floor: IndexName, whole: Sequence[IndexName], history: History) -> list[_Candidate]:
    """Everything in front of the floor that may be kept."""
    marks = {mark.place.sequence: mark for mark in history.marks if not mark.in_gap}
    found = [
        _Candidate(_rank(mark.consistency), mark.place, mark.name)
        for sequence, mark in marks.items()
        if fold.floor_sequence <= sequence < floor.first
    ]
    found += [
        _Candidate(0, Place(name.first, name.last), "the end of a segment", name)
        for name in whole
        if fold.floor_sequence <= name.first < floor.first and history.gap_at(name.first) is None
    ]
    for item in fold.kept:
        name, mark = item.checkpoint, marks.get(item.checkpoint.first)
        if item.reason == "pinned" and mark is None:
            continue  # it was kept for whoever pinned it, and is planned again while that lasts
        rank = _rank(mark.consistency) if mark is not None else 0
        place = mark.place if mark is not None else Place(name.first, name.last)
        found.append(_Candidate(rank, place, item.reason, name))
    return found


def _rank(consistency: Consistency) -> int:
    return 2 if consistency is Consistency.APPLICATION else 1


def _thinned(policy: Policy, now_ns: int, candidates: list[_Candidate]) -> list[_Candidate]:
    best: dict[tuple[int, int], _Candidate] = {}
    for item in candidates:
        rule = policy.rule(item.place.time_ns, now_ns)
        if rule is None:
            continue
        stretch = (rule.every_ns, item.place.time_ns // rule.every_ns)
        if stretch not in best or _key(best[stretch]) < _key(item):
            best[stretch] = item
    return list(best.values())


def _key(item: _Candidate) -> tuple[int, int]:
    return item.rank, item.place.sequence
