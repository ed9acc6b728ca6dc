"""A worker's upkeep: real folding of a log in memory, and what the config server is told of it, whatever happens.

The config server here is a stand-in that keeps what it is told; the real one is met in
tests/config_server/test_upkeep.py and tests/recovery/test_folding_kills.py.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, cast

from recovery.chunks import MachineLog
from recovery.lock import FoldLock
from recovery.replica.warm import points_kept
from recovery.retention import Policy as Rules, Rule
from recovery.upkeep import retention_policy, what_is_left
from recovery.worker import upkeep
from recovery.worker.upkeep import Upkeep
from replicar.clock import SystemClock
from replicar.control.client import ControlClient
from replicar.control.messages import (
    DAY,
    ClaimedMachine,
    MachineKey,
    Policy,
    Retention,
    RetentionTier,
    UpkeepClaim,
    UpkeepKind,
    UpkeepReceipt,
    UpkeepRenewal,
    UpkeepReport,
    UpkeepTask,
)
from replicar.errors import FencedError, PermanentError, TransientError
from tests.recovery.scene import MINUTE, NS, Scene

HOUR = 3600
#: An hour whole, then one point of every half an hour up to half a day.
POLICY = Policy(name="p", every_point_seconds=HOUR, tiers=(RetentionTier(until_seconds=12 * HOUR, every_seconds=1800),))


class Told:
    """A config server that always has the machine due; it can be away, or say that the machine is another's."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.reports: list[UpkeepReport] = []
        self.keys_given = 0
        self.away = 0
        self.is_anothers = False

    async def upkeep(self, request: UpkeepClaim) -> UpkeepTask:
        self._answer()
        builder = self._scene.builder
        machine = ClaimedMachine(
            id=builder.machine_id,
            name="shop",
            incarnation=0,
            epoch=1,
            stored_sequence=builder.sequence - 1,
            stored_segment=builder.number - 1,
            stored_digest=builder.previous.hex(),
        )
        return UpkeepTask(machine=machine, policy=POLICY)

    async def renew_upkeep(self, renewal: UpkeepRenewal) -> UpkeepReceipt:
        self._answer()
        if self.is_anothers:
            raise FencedError("another worker has it")
        return UpkeepReceipt(lease_seconds=180)

    async def report_upkeep(self, report: UpkeepReport) -> UpkeepReceipt:
        self._answer()
        self.reports.append(report)
        return UpkeepReceipt(lease_seconds=0)

    async def key(self, name: str) -> MachineKey:
        self._answer()
        self.keys_given += 1
        builder = self._scene.builder
        fields: dict[str, Any] = {
            "machine_id": builder.machine_id,
            "key_id": str(builder.key_id),
            "data_key": _text(builder.key),
            "stored_sequence": 0,
            "stored_segment": None,
            "stored_digest": "",
        }
        return MachineKey.model_validate(fields)

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise TransientError("nobody answers")


class Waiting(SystemClock):
    """The scene's time; who waits, waits a moment."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def monotonic(self) -> float:
        return self._scene.clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0.01)


def _text(key: bytes) -> str:
    import base64

    return base64.b64encode(key).decode()


def keeper(scene: Scene, told: Told, chore: upkeep.Chore | None = None) -> Upkeep:
    async def fold(log: MachineLog, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        return await upkeep.fold(log, machine, policy, clock=scene.clock)

    return Upkeep(
        UpkeepKind.FOLD,
        chore or fold,
        cast("ControlClient", told),
        scene.store,
        clock=Waiting(scene),
        instance="one",
        every_seconds=900,
    )


async def test_a_log_is_folded_by_the_machines_policy_and_what_is_left_is_told() -> None:
    scene = await Scene(21).begin(60)
    told = Told(scene)
    assert await keeper(scene, told).once()
    (report,) = told.reports
    assert (report.error, report.elsewhere, report.again_seconds) == (None, False, 900)
    fold = await scene.current()
    assert fold.floor is not None
    assert scene.clock.ns - fold.floor.last >= HOUR * NS
    assert report.retention == what_is_left(fold)
    assert report.retention is not None
    kept = {item.sequence for item in report.retention.kept}
    for sequence in scene.story.offered:
        is_given_up = sequence < fold.floor.first and sequence not in kept
        assert report.retention.gave_up(sequence) == is_given_up
    await scene.check()


async def test_a_failure_is_told_and_tried_again_soon() -> None:
    scene = await Scene(22).begin(12)
    told = Told(scene)

    async def damaged(log: MachineLog, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        raise PermanentError("the container is gone", hint="make it again")

    async def full(log: MachineLog, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        raise OSError(28, "No space left on device")

    for chore, words in ((damaged, "the container is gone"), (full, "No space left")):
        await keeper(scene, told, chore).once()
        report = told.reports.pop()
        assert report.error is not None
        assert words in report.error.message
        assert report.again_seconds == upkeep.RETRY_SECONDS


async def test_a_log_that_somebody_else_folds_is_no_failure() -> None:
    scene = await Scene(23).begin(12)
    told, other = Told(scene), FoldLock(scene.store, scene.builder.machine_id, scene.clock, scene.bytes)
    await other.take()
    await keeper(scene, told).once()
    (report,) = told.reports
    assert (report.error, report.elsewhere) == (None, True)


async def test_work_stops_when_the_machine_is_another_workers() -> None:
    scene = await Scene(24).begin(12)
    told, was_stopped = Told(scene), False
    told.is_anothers = True

    async def endless(log: MachineLog, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        nonlocal was_stopped
        try:
            await asyncio.Event().wait()
        finally:
            was_stopped = True
        return None

    await keeper(scene, told, endless).once()
    assert was_stopped
    assert told.reports == []


async def test_a_config_server_that_is_away_costs_a_while_and_nothing_else() -> None:
    scene = await Scene(25).begin(12)
    told = Told(scene)
    told.away = 1
    assert not await keeper(scene, told).once()

    async def away(log: MachineLog, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        told.away = 3
        return None

    works = keeper(scene, told, away)
    assert await works.once()
    assert len(told.reports) == 1, "it was said until it was heard"


async def test_keys_are_asked_for_rarely_and_when_they_do_not_fit() -> None:
    scene = await Scene(26).begin(12)
    told, missing = Told(scene), [False]

    async def look(log: MachineLog, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        if missing[0]:
            missing[0] = False
            log.key(99)
        return None

    works = keeper(scene, told, look)
    for _ in range(3):
        await works.once()
    assert told.keys_given == 1
    missing[0] = True
    await works.once()
    assert told.keys_given == 2, "the key was rotated"
    assert told.reports[-1].error is None
    scene.clock.ns += int(upkeep.KEYS_SECONDS + 1) * NS
    await works.once()
    assert told.keys_given == 3


async def test_a_warm_replica_is_brought_on_and_its_points_kept_and_thinned() -> None:
    scene = await Scene(26).begin(4)
    machine = (await Told(scene).upkeep(UpkeepClaim(kind=UpkeepKind.REPLICA, instance="one"))).machine
    assert machine is not None

    async def round_(point_seconds: int) -> list[int]:
        log, policy = scene.builder.log, POLICY.model_copy(update={"replica_point_seconds": point_seconds})
        stored = {"stored_segment": scene.builder.number - 1, "stored_digest": scene.builder.previous.hex()}
        await upkeep.bring_on(log, machine.model_copy(update=stored), policy, clock=Waiting(scene))
        return [point.time_ns for point in await points_kept(log, log.store)]

    async def later(seconds: int) -> None:
        scene.builder.time_ns += seconds * NS
        scene.builder.write(0, 0, scene.bytes(512))
        await scene.builder.seal()

    (first,) = await round_(HOUR)
    await later(HOUR // 2)
    assert await round_(HOUR) == [first], "an hour has not passed"
    await later(HOUR)
    assert await round_(0) == [first], "none are wanted"
    first_again, second = await round_(HOUR)
    assert first_again == first
    await later(11 * HOUR)
    assert (await round_(HOUR))[:-1] == [second], "the first is older than the policy keeps any"


def test_a_stored_policy_is_kept_in_full_where_its_stretches_do_not_divide() -> None:
    stored = ((DAY, 3600), (9 * DAY, 9000))
    tiers = tuple(RetentionTier(until_seconds=until, every_seconds=every) for until, every in stored)
    assert retention_policy(Policy(name="p", tiers=tiers)) == Rules(
        2 * HOUR * NS, (Rule(DAY * NS, HOUR * NS), Rule(9 * DAY * NS, 2 * HOUR * NS))
    )
    assert retention_policy(Policy(name="p", tiers=())) == Rules(2 * HOUR * NS, ())
    assert retention_policy(Policy(name="default")).window_ns == 120 * MINUTE


def test_every_stored_policy_that_is_taken_can_be_carried_out() -> None:
    for every in ((60, 61, 119, 121), (3600, 3601, 7300), (90, 100, 250, 40_000)):
        tiers = tuple(
            RetentionTier(until_seconds=(number + 1) * DAY, every_seconds=seconds)
            for number, seconds in enumerate(every)
        )
        policy = Policy(name=str(uuid.uuid4()), tiers=tiers)
        assert policy.fault() == ""
        rules = retention_policy(policy).rules
        assert all(rule.every_ns <= tier.every_seconds * NS for rule, tier in zip(rules, tiers, strict=True))
