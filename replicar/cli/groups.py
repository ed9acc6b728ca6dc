"""`replicar tag ... --with ...`: one point over several machines."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

from replicar.cli.console import Telling
from replicar.cli.settings import load_settings
from replicar.control.client import ControlClient
from replicar.control.messages import GroupMember, GroupPoint, GroupRequest
from replicar.errors import PermanentError, TransientError

_LOOK_SECONDS: Final = 0.5
MAX_MACHINES: Final = 64


def request(machines: Sequence[str], name: str, hold_seconds: float) -> GroupRequest:
    """What to ask of the config server.

    Raises:
        PermanentError: these can't be a group.
    """
    if len(set(machines)) < len(machines) or len(machines) > MAX_MACHINES:
        raise PermanentError(
            f"a group is of different machines, {MAX_MACHINES} at most",
            hint="name each of them once",
            machines=machines,
        )
    return GroupRequest(group=str(uuid.uuid4()), name=name, machines=tuple(machines), hold_seconds=hold_seconds)


async def tag(
    telling: Telling, wanted: GroupRequest, settings: Path | None, stored_within_seconds: float | None
) -> None:
    """Have the point made, and say what became of it."""
    async with load_settings(settings).control() as control:
        point = await control.group(wanted)
        if stored_within_seconds is not None:
            await _stored(control, point, stored_within_seconds)
    telling.result(point.model_dump(mode="json"), lambda console: _show(console, point))


async def _stored(control: ControlClient, point: GroupPoint, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for member in point.members:
        while not await _is_stored(control, member, point.name):
            if time.monotonic() > deadline:
                raise TransientError(
                    f"the group point {point.name!r} is made, but storage does not hold {member.machine}'s part yet",
                    hint="it will, when agent and process server are up: `replicar points`",
                    machine=member.machine,
                )
            await asyncio.sleep(_LOOK_SECONDS)


async def _is_stored(control: ControlClient, member: GroupMember, name: str) -> bool:
    points = (await control.points(member.machine)).points
    return any(point.name == name and point.stored for point in points)


def _show(console: Console, point: GroupPoint) -> None:
    for member in point.members:
        held = f"writers held for {member.held_seconds * 1000:.0f} ms"
        console.print(f"{escape(point.name)} of {escape(member.machine)}: sequence {member.sequence}, {held}")
