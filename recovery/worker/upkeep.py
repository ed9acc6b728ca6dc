"""Upkeep: what a worker does by the clock beside its jobs, one machine at a time.

The config server says which machine is due. The worker has it for as long as it says so (`renew_upkeep`), works, and
tells how it went; when it failed, the machine is due again soon, and operators hear of it. All of it may be cut off
anywhere: by SIGTERM at once, without an end of its own, or by SIGKILL. What is done is safe to do again, and fenced in
storage where it has to be, so the lease here spares double work and nothing else.

Keys are asked for once an hour, since every asking stays in the vault's audit; and at once if they don't fit any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, TypeAlias

from recovery.chunks import MachineLog
from recovery.replica.removal import remove_replica
from recovery.replica.warm import WarmReplica
from recovery.upkeep import keep_up, retention_policy
from replicar.clock import Clock
from replicar.control.client import ControlClient
from replicar.control.keys import data_keys
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    UPKEEP_LEASE_SECONDS,
    ClaimedMachine,
    Policy,
    Retention,
    UpkeepClaim,
    UpkeepKind,
    UpkeepRenewal,
    UpkeepReport,
)
from replicar.errors import FencedError, PermanentError, ReplicarError
from replicar.log.tail import Stored
from replicar.storage.store import PageBlobStore

#: How often a worker asks whether anything is due.
LOOK_SECONDS: Final = 10.0
#: After a failure, and when somebody else is at it.
RETRY_SECONDS: Final = 60.0
KEYS_SECONDS: Final = 3600.0
#: How often a report is said again that was not heard; what is lost by then is told by the next one.
REPORT_TRIES: Final = 5

#: What is done to a machine's log: it says what is left of the machine's past, if that is what it is about.
Chore: TypeAlias = Callable[[MachineLog, ClaimedMachine, Policy], Awaitable[Retention | None]]

_log = logging.getLogger(__name__)


async def fold(log: MachineLog, machine: ClaimedMachine, policy: Policy, *, clock: Clock) -> Retention | None:
    """Index a machine's log and thin its past. Raises as `keep_up`."""
    stored = Stored(machine.stored_segment or 0, 0, bytes.fromhex(machine.stored_digest))
    kept = await keep_up(log, retention_policy(policy), clock=clock, random=os.urandom, stored=stored)
    return kept.retention


async def bring_on(log: MachineLog, machine: ClaimedMachine, policy: Policy, *, clock: Clock) -> None:
    """Bring a machine's warm replica on to its latest point, and keep that one, if one is due by the policy.

    Raises as `WarmReplica.advance`.
    """
    digest = bytes.fromhex(machine.stored_digest) or None
    async with WarmReplica(log, log.store, clock=clock, random=os.urandom) as replica:
        await replica.advance(stored_number=machine.stored_segment or 0, stored_digest=digest)
        await replica.keep_points(retention_policy(policy), policy.replica_point_seconds)


async def remove_unwanted(log: MachineLog, machine: ClaimedMachine, policy: Policy, *, clock: Clock) -> None:
    """Remove a machine's warm replica, which nobody wants any more. Raises as `remove_replica`."""
    await remove_replica(log, clock=clock)


class Upkeep:
    """One kind of upkeep of one worker: what is done (`chore`), and how often for each machine."""

    def __init__(
        self,
        kind: UpkeepKind,
        chore: Chore,
        control: ControlClient,
        store: PageBlobStore,
        *,
        clock: Clock,
        instance: str,
        every_seconds: float,
    ) -> None:
        self._kind, self._chore, self._every_seconds = kind, chore, every_seconds
        self._control, self._store, self._clock, self._instance = control, store, clock, instance
        self._keys: dict[uuid.UUID, tuple[float, Mapping[int, bytes]]] = {}

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            if not await self.once():
                await self._clock.sleep(LOOK_SECONDS)

    async def once(self) -> bool:
        """See to a machine; False if nothing is due, or nobody can say."""
        try:
            task = await self._control.upkeep(UpkeepClaim(kind=self._kind, instance=self._instance))
        except ReplicarError as error:
            _log.warning("what is due can't be asked for now: %s", error)
            return False
        if task.machine is None or task.policy is None:
            return False
        await self._see_to(task.machine, task.policy)
        return True

    async def _see_to(self, machine: ClaimedMachine, policy: Policy) -> None:
        work = asyncio.create_task(self._work(machine, policy))
        renewing = asyncio.create_task(self._renew(machine))
        try:
            await asyncio.wait((work, renewing), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                _log.warning("%s of %s is left to another worker", self._kind, machine.name)
                return
            await self._tell(work.result())
        finally:
            for task in (work, renewing):
                task.cancel()
            await asyncio.gather(work, renewing, return_exceptions=True)

    async def _work(self, machine: ClaimedMachine, policy: Policy) -> UpkeepReport:
        report = UpkeepReport(
            kind=self._kind, instance=self._instance, machine_id=machine.id, again_seconds=self._every_seconds
        )
        soon = min(RETRY_SECONDS, self._every_seconds)
        try:
            retention = await self._with_keys(machine, policy)
        except FencedError as error:
            _log.info("%s of %s: %s", self._kind, machine.name, error)
            return report.model_copy(update={"again_seconds": soon, "elsewhere": True})
        except (ReplicarError, OSError) as error:
            _log.warning("%s of %s failed: %s", self._kind, machine.name, error)
            known = error if isinstance(error, ReplicarError) else PermanentError(str(error), hint="look at this host")
            said = ErrorReport.of("recovery worker", known.as_dict())
            return report.model_copy(update={"again_seconds": soon, "error": said})
        return report.model_copy(update={"retention": retention})

    async def _with_keys(self, machine: ClaimedMachine, policy: Policy) -> Retention | None:
        fetched, keys = self._keys.get(machine.id, (0.0, {}))
        if keys and self._clock.monotonic() - fetched < KEYS_SECONDS:
            try:
                return await self._chore(MachineLog(self._store, machine.id, keys), machine, policy)
            except PermanentError as error:
                if "key_id" not in error.fields:
                    raise
        keys = data_keys(await self._control.key(machine.name))
        self._keys[machine.id] = (self._clock.monotonic(), keys)
        return await self._chore(MachineLog(self._store, machine.id, keys), machine, policy)

    async def _renew(self, machine: ClaimedMachine) -> None:
        """Keep the machine; ends when it is another's."""
        renewal = UpkeepRenewal(kind=self._kind, instance=self._instance, machine_id=machine.id)
        while True:
            await self._clock.sleep(UPKEEP_LEASE_SECONDS / 3)
            try:
                await self._control.renew_upkeep(renewal)
            except FencedError:
                return
            except ReplicarError as error:
                _log.warning("the config server does not answer: %s", error)

    async def _tell(self, report: UpkeepReport) -> None:
        for attempt in range(REPORT_TRIES):
            with suppress(ReplicarError):
                await self._control.report_upkeep(report)
                return
            await self._clock.sleep(2.0**attempt)
        _log.warning("how %s of %s went could not be told; it is due again", self._kind, report.machine_id)
