"""What the config server does by the clock: thresholds looked at, jobs of its own advanced, drills begun when due.

Everything is found in the registry each time, so a round that was missed while the server was down is made up by the
next. A drill is due so many days after the machine's last one began, whatever became of that, so one that fails is not
tried over and over; and only while the machine is protected and nothing else goes on with it.
"""

from __future__ import annotations

import logging
import sqlite3
import uuid
from collections.abc import Callable
from functools import partial
from typing import Final

from config_server import alerts, lives, parties, policies, setbacks, upkeep
from config_server.bells import EVERYBODY, Bells, Topic
from config_server.jobs import book, opening, own
from config_server.registry import RegistryThread
from config_server.vault import Vault
from replicar.clock import Clock
from replicar.control.identity import Role
from replicar.control.messages import Job, JobKind, JobRequest, LifeState
from replicar.errors import CorruptionError, ReplicarError

ROUND_SECONDS: Final = 30.0
#: Who asked for what nobody asked for.
BY_THE_CLOCK: Final = "schedule"
_DAY_NS: Final = 86_400 * 10**9

_log = logging.getLogger(__name__)


class Rounds:
    """The rounds of one config server.

    Args:
        identity: the config server's own id, for the audit.
    """

    def __init__(self, registry: RegistryThread, vault: Vault, bells: Bells, clock: Clock, identity: uuid.UUID) -> None:
        self._registry, self._vault, self._bells, self._clock = registry, vault, bells, clock
        self._identity = identity
        self._latest_ns = 0  # what the clock said in the last round

    async def go(self) -> list[Job]:
        """One round; returns the drills that were begun.

        Each thing is a transaction of its own, and one machine's trouble keeps no other from its turn.

        Raises:
            ReplicarError: the first of what failed, when all else is done.
        """
        now_ns, failed = self._clock.now_ns(), list[ReplicarError]()

        async def done(work: Callable[[sqlite3.Connection], object]) -> bool:
            try:
                await self._registry.run(work)
            except CorruptionError:
                raise
            except ReplicarError as error:
                failed.append(error)
                return False
            return True

        if await done(partial(setbacks.follow, now_ns=now_ns, latest_ns=self._latest_ns)):
            self._latest_ns = now_ns
        await done(lambda connection: alerts.look_at_rpo(connection, now_ns))
        await done(lambda connection: upkeep.look(connection, now_ns))
        for machine_id in await self._registry.run(_with_jobs):
            await done(partial(own.advance, machine_id=machine_id, now_ns=now_ns))
        begun = await self._registry.run(self._begin_drills)
        if begun:
            self._bells.ring(Topic.JOBS, EVERYBODY)
        if failed:
            raise failed[0]
        return begun

    def _begin_drills(self, connection: sqlite3.Connection) -> list[Job]:
        now_ns, begun = self._clock.now_ns(), []
        for machine_id in due_drills(connection, now_ns):
            name = connection.execute("SELECT name FROM parties WHERE id = ?", (str(machine_id),)).fetchone()["name"]
            machine = parties.by_name(connection, Role.MACHINE, name)
            assert machine is not None, "it was just looked up"
            request = JobRequest(id=str(uuid.uuid4()), kind=JobKind.TEST_FAILOVER)
            try:
                begun.append(opening.make(connection, self._vault, machine, request, BY_THE_CLOCK, now_ns))
            except ReplicarError as error:  # it stays due; the next round asks again
                _log.warning("the drill of machine %s is due, but can't be begun: %s", machine.name, error)
                continue
            parties.audit(connection, self._identity, JobKind.TEST_FAILOVER, f"machine {name}, by schedule", now_ns)
        return begun


def _with_jobs(connection: sqlite3.Connection) -> list[uuid.UUID]:
    """Machines with jobs that have not ended."""
    rows = connection.execute("SELECT DISTINCT machine_id FROM jobs WHERE ended_ns IS NULL").fetchall()
    return [uuid.UUID(row["machine_id"]) for row in rows]


def due_drills(connection: sqlite3.Connection, now_ns: int) -> list[uuid.UUID]:
    """Machines whose policy wants a drill by now."""
    due = []
    for policy in policies.listed(connection):
        if not policy.drill_days:
            continue
        for machine_id in policies.machines_under(connection, policy.name):
            if lives.state_of(connection, machine_id) is not LifeState.PROTECTED or book.going(connection, machine_id):
                continue
            last = connection.execute(
                "SELECT max(json_extract(job, '$.created_ns')) FROM jobs WHERE machine_id = ? AND kind = ?",
                (str(machine_id), JobKind.TEST_FAILOVER),
            ).fetchone()[0]
            since_ns = last if last is not None else lives.stored(connection, machine_id).since_ns
            if now_ns - since_ns >= policy.drill_days * _DAY_NS:
                due.append(machine_id)
    return due
