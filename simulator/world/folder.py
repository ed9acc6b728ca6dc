"""Whoever folds the machine's log, as processes of the world: a recovery worker by the clock, and an operator by hand.

The worker's part is the real `Upkeep`, which asks the config server what is due and tells it what is left; by hand it
is done as `replicar fold` does it. Both come to the real `keep_up` over storage as it is far away, and die before or
behind any of their requests (`MortalClient`). A story is a minute long, so spans are seconds where the product has
minutes and days: the policy's, the grace before a sweep, how long the dead hold the lock (`SPANS`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from recovery import lock
from recovery.chunks import MachineLog
from recovery.retention import Policy, Rule
from recovery.upkeep import KeptUp, keep_up
from recovery.worker import upkeep
from recovery.worker.upkeep import Upkeep
from replicar.clock import Clock
from replicar.control import messages
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.control.keys import data_keys
from replicar.control.messages import ClaimedMachine, Retention, UpkeepKind, UpkeepReport
from replicar.log.tail import Stored
from replicar.storage.limits import LimitedStore
from replicar.storage.retry import RetryingStore
from simulator.world import cast
from simulator.world.blobs import BlobClient, BlobService
from simulator.world.parts import RETRIES
from simulator.world.processes import Process

#: How often the worker asks what is due, after how long it tries again, and when whoever has the lock counts as dead;
#: the product's: 10, 60 and 300 seconds.
SPANS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (upkeep, "LOOK_SECONDS", 1.5),
    (upkeep, "RETRY_SECONDS", 4.0),
    (lock, "STALE_SECONDS", 8),
)
#: As a worker's own directory would say; one that starts again has its machine back at once.
_INSTANCE: Final = "hands"
_BY_HAND: Final = "by hand"
_NS: Final = 1_000_000_000
_T = TypeVar("_T")
#: What a story has folding done by: it does the real work, and takes note of it.
Fold = Callable[[MachineLog, Stored], Awaitable[KeptUp]]


@dataclass(frozen=True, slots=True)
class UpkeepPlan:
    """How a story's log is kept up. Ages are those of the stream, in seconds: all of `window_seconds` is kept, then one
    point of every `stretch_seconds` up to `until_seconds`.

    Args:
        by_hand: whether an operator folds it besides, whenever they like, and so perhaps both at once.
        reader: whether somebody reads points meanwhile.
    """

    every_seconds: float = 4.0
    checkpoint_segments: int = 2
    window_seconds: float = 8.0
    stretch_seconds: float = 6.0
    until_seconds: float = 60.0
    grace_seconds: float = 3.0
    by_hand: bool = False
    reader: bool = False

    @property
    def policy(self) -> Policy:
        rule = Rule(int(self.until_seconds * _NS), int(self.stretch_seconds * _NS))
        return Policy(int(self.window_seconds * _NS), (rule,))


class MortalClient(BlobClient):
    """A connection to storage whose process may die before or behind any request."""

    def __init__(self, service: BlobService, process: Process) -> None:
        super().__init__(service)
        self._process = process

    async def _ask(self, doing: str, name: str | None, act: Callable[[], Awaitable[_T]], **options: Any) -> _T:
        self._process.call()
        found = await super()._ask(doing, name, act, **options)
        self._process.called()
        return found


async def run_worker(
    process: Process, plan: UpkeepPlan, clock: Clock, blobs: BlobService, seed: int, fold: Fold
) -> None:
    """What a recovery worker does beside its jobs."""
    identity = _as(process, cast.WORKER)

    async def chore(log: MachineLog, machine: ClaimedMachine, policy: messages.Policy) -> Retention | None:
        del policy  # the shortest one that the config server takes is longer than a story
        stored = Stored(machine.stored_segment or 0, 0, bytes.fromhex(machine.stored_digest))
        return (await fold(log, stored)).retention

    async with ControlClient(identity, clock=clock) as control:
        await Upkeep(
            UpkeepKind.FOLD,
            chore,
            control,
            storage(process, clock, blobs, seed),
            clock=clock,
            instance=_INSTANCE,
            every_seconds=plan.every_seconds,
        ).run()


async def run_by_hand(process: Process, clock: Clock, blobs: BlobService, seed: int, fold: Fold) -> None:
    """What `replicar fold` does, once; ends with its error."""
    identity = _as(process, cast.OPERATOR)
    async with ControlClient(identity, clock=clock) as control:
        key = await control.key(cast.MACHINES[0])
        log = MachineLog(storage(process, clock, blobs, seed), key.machine_id, data_keys(key))
        kept = await fold(log, Stored(key.stored_segment or 0, 0, bytes.fromhex(key.stored_digest)))
        if kept.retention is not None:
            await control.report_upkeep(
                UpkeepReport(
                    kind=UpkeepKind.FOLD,
                    instance=_BY_HAND,
                    machine_id=key.machine_id,
                    again_seconds=1,
                    retention=kept.retention,
                )
            )


async def fold_once(log: MachineLog, stored: Stored, plan: UpkeepPlan, clock: Clock) -> KeptUp:
    """The work itself, with a story's numbers. Raises as `keep_up`."""
    return await keep_up(
        log,
        plan.policy,
        clock=clock,
        random=os.urandom,
        stored=stored,
        every=plan.checkpoint_segments,
        grace_seconds=plan.grace_seconds,
    )


def _as(process: Process, who: str) -> Identity:
    process.identity = cast.who(who)
    return Identity.load(cast.template() / who)


def storage(process: Process, clock: Clock, blobs: BlobService, seed: int) -> RetryingStore:
    """How such a process reaches storage."""
    limited = LimitedStore(MortalClient(blobs, process), clock=clock)
    return RetryingStore(limited, clock=clock, random=random.Random(seed), policy=RETRIES)
