"""Group points: one point over several machines, as of one instant. The config server's part; see the agent's `groups`.

    asked      every machine is told to hold its writers
    held       all have said so: the verdict is `complete`; one can't, or is late: `abandoned`
    settled    every machine has answered the verdict; the group is a point if all of them kept it

It lives in memory, since it is over within seconds: should this process die meanwhile, machines let their writers go by
themselves, and the group is none. Only that it *is* one is written down, so marks of any other group show as the
crash-consistent points that they are.

Weak: a machine that is told once a minute makes no group point with the others unless its agent's poll is being held
just then, which it always is but for moments.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import uuid
from dataclasses import dataclass, field
from typing import Final

from replicar.control.messages import (
    AgentInstructions,
    Command,
    GroupMember,
    GroupPoint,
    GroupRequest,
    GroupVerdict,
    HoldReport,
)
from replicar.errors import ConflictError, LimitError, TransientError
from replicar.formats.record import Consistency

HOLD: Final = "hold"
#: Beyond what writers may be held, for answers to come in.
ANSWER_SECONDS: Final = 5.0
#: Groups under way at once.
MAX_GROUPS: Final = 16
#: Groups written down; the marks of older ones show as crash-consistent points.
MAX_REMEMBERED: Final = 10_000


@dataclass(slots=True)
class Group:
    """One group under way. `reports` has what each machine said last."""

    request: GroupRequest
    members: dict[uuid.UUID, str]
    verdict: GroupVerdict | None = None
    reports: dict[uuid.UUID, HoldReport] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def all_in(self, *states: str) -> bool:
        return all(member in self.reports and self.reports[member].state in states for member in self.members)

    def lost(self) -> str:
        """Which machine is why there is no group, in words; empty: none is."""
        for member, name in self.members.items():
            report = self.reports.get(member)
            if report is not None and report.state == "lost":
                return f"{name}: {report.reason}"
        return ""


class Groups:
    """The groups under way."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def begin(self, request: GroupRequest, members: dict[uuid.UUID, str]) -> Group:
        """Raises:
        ConflictError: one of the machines is being held for another group.
        LimitError: too many groups are under way.
        """
        for other in self._groups.values():
            both = [name for member, name in members.items() if member in other.members]
            if both:
                raise ConflictError(
                    f"machine {both[0]} is being held for the group {other.request.name!r}",
                    hint="ask again in a few seconds",
                )
        if len(self._groups) >= MAX_GROUPS:
            raise LimitError(f"{MAX_GROUPS} groups are under way", hint="ask again in a few seconds")
        group = self._groups[request.group] = Group(request, members)
        return group

    def end(self, group: Group) -> None:
        del self._groups[group.request.group]

    def report(self, machine_id: uuid.UUID, report: HoldReport | None) -> None:
        """Take in what a machine says of its hold."""
        group = self._groups.get(report.group) if report is not None else None
        if report is not None and group is not None and machine_id in group.members:
            group.reports[machine_id] = report
            group.news.set()

    def added(self, machine_id: uuid.UUID, instructions: AgentInstructions) -> AgentInstructions:
        """A machine's instructions with what its group asks of it."""
        group = next((group for group in self._groups.values() if machine_id in group.members), None)
        if group is None:
            return instructions
        request, commands, verdicts = group.request, instructions.commands, instructions.verdicts
        if group.verdict is not None:
            verdicts = (*verdicts, group.verdict)
        else:
            hold = Command(
                id=request.group,
                kind=HOLD,
                name=request.name,
                consistency=Consistency.GROUP,
                hold_seconds=request.hold_seconds,
            )
            commands = (*commands, hold)
        said = [instructions.version, request.group, group.verdict.complete if group.verdict is not None else None]
        version = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
        return instructions.model_copy(update={"commands": commands, "verdicts": verdicts, "version": version})


async def held(group: Group) -> None:
    """Wait until all machines are held, and give the verdict."""
    try:
        async with asyncio.timeout(group.request.hold_seconds):
            while not (group.all_in("held") or group.lost()):
                group.news.clear()
                await group.news.wait()
    except TimeoutError:
        pass
    group.verdict = GroupVerdict(group=group.request.group, complete=group.all_in("held"))


async def settled(group: Group) -> GroupPoint:
    """Wait for the machines' answers to the verdict; the point.

    Raises:
        TransientError: it is none; with the machine that is why.
    """
    late = [name for member, name in group.members.items() if member not in group.reports]
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while not group.all_in("kept", "lost"):
                group.news.clear()
                await group.news.wait()
    except TimeoutError:
        pass
    if group.all_in("kept"):
        members = tuple(
            GroupMember(
                machine=name,
                sequence=group.reports[member].sequence or 0,
                held_seconds=group.reports[member].held_seconds or 0.0,
            )
            for member, name in group.members.items()
        )
        return GroupPoint(group=group.request.group, name=group.request.name, members=members)
    silent = [name for member, name in group.members.items() if member not in group.reports]
    why = f"{late[0]} did not say in time that its writers are held" if late else group.lost()
    if not why or (late and not silent):
        why = why or "a machine did not answer"
    raise TransientError(
        f"no group point {group.request.name!r}: {why}",
        hint="ask again under another name; `replicar status` shows which machines answer, and --hold-seconds gives"
        " slow ones more time",
        status=409,
        group=group.request.group,
    )


def record(connection: sqlite3.Connection, point: GroupPoint, now_ns: int) -> None:
    """Write down that a group is a point."""
    connection.execute(
        "INSERT INTO group_points VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (point.group, point.to_json().decode(), now_ns),
    )
    connection.execute(
        "DELETE FROM group_points WHERE id NOT IN (SELECT id FROM group_points ORDER BY created_ns DESC LIMIT ?)",
        (MAX_REMEMBERED,),
    )


def known(connection: sqlite3.Connection, group: str) -> GroupPoint | None:
    """A group point that was made."""
    row = connection.execute("SELECT point FROM group_points WHERE id = ?", (group,)).fetchone()
    return GroupPoint.from_json(row["point"].encode()) if row is not None else None
