"""Keeping a machine's log up: its index brought up to date, its past thinned by its policy, and what is left, told.

This is what recovery workers do by the clock, and `replicar fold` by hand. Any number of them may be at it, and each
may die anywhere: making the index twice costs space until the next fold, and folding is fenced by itself (`folding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from recovery.chunks import MachineLog
from recovery.folding import GRACE_SECONDS, Folded, Folder
from recovery.indexing import CHECKPOINT_SEGMENTS, Indexed, make_index
from recovery.retention import Policy, Rule
from replicar.clock import Clock
from replicar.control import messages
from replicar.control.messages import MAX_KEPT, KeptState, Retention
from replicar.log.index import Fold, open_index
from replicar.log.tail import Stored

_NS: Final = 1_000_000_000
#: Of a point's name that is told.
_REASON: Final = 255


@dataclass(frozen=True, slots=True)
class KeptUp:
    """What came of it; `retention` is None while nothing was ever given up."""

    indexed: Indexed
    folded: Folded | None
    retention: Retention | None


async def keep_up(
    log: MachineLog,
    policy: Policy | None,
    *,
    clock: Clock,
    random: Callable[[int], bytes],
    stored: Stored = Stored(),  # noqa: B008 - a value that nobody can change
    every: int = CHECKPOINT_SEGMENTS,
    grace_seconds: float = GRACE_SECONDS,
    made: Callable[[int, int], None] | None = None,
) -> KeptUp:
    """Index, then fold; without a policy index alone.

    Raises:
        FencedError: somebody else folds it just now, or did while it was indexed.
        PermanentError: there is no log of this machine.
        CorruptionError: log or index are damaged; nothing was given up.
    """
    indexed = await make_index(log, clock=clock, random=random, stored=stored, every=every, made=made)
    folded = None
    if policy is not None:
        folded = await Folder(log, policy, clock=clock, random=random, grace_seconds=grace_seconds).run()
    fold = (await open_index(log.store, log.machine_id, log.keys)).fold
    return KeptUp(indexed, folded, what_is_left(fold))


def retention_policy(policy: messages.Policy) -> Policy:
    """A machine's stored policy as retention reads it.

    Where a tier's stretch is no multiple of the one before it, the next smaller one that is counts: it keeps more.
    """
    rules: list[Rule] = []
    before = 1
    for tier in policy.tiers:
        before = tier.every_seconds // before * before
        rules.append(Rule(tier.until_seconds * _NS, before * _NS))
    return Policy(policy.every_point_seconds * _NS, tuple(rules))


def what_is_left(fold: Fold) -> Retention | None:
    """What a fold says, for those who only offer points; None where nothing was given up."""
    if fold.floor is None:
        return None
    items = sorted(fold.kept, key=lambda item: item.checkpoint.first)
    told = items[-MAX_KEPT:]
    return Retention(
        generation=fold.generation,
        floor_sequence=fold.floor.first,
        floor_time_ns=fold.floor.last,
        kept=tuple(
            KeptState(sequence=item.checkpoint.first, time_ns=item.checkpoint.last, reason=item.reason[:_REASON])
            for item in told
        ),
        kept_from=told[0].checkpoint.first if len(told) < len(items) else 0,
    )
