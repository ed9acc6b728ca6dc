"""Bugs of points over several machines."""

from __future__ import annotations

from typing import Any

from config_server.groups import Group
from mobility_agent.gate import Gate

Names = tuple[tuple[Any, str, Any], ...]


def writers_are_not_held() -> Names:
    """A machine says that its writers are held, and lets them write on until the verdict."""

    def close(self: Gate) -> None:
        """Nobody waits."""

    return ((Gate, "close", close),)


def group_of_some() -> Names:
    """A group is a point as soon as one of its machines kept it."""

    def all_in(self: Group, *states: str) -> bool:
        return any(report.state in states for report in self.reports.values())

    return ((Group, "all_in", all_in),)
