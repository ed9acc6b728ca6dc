"""Bugs of folding."""

from __future__ import annotations

from typing import Any

from config_server import setbacks
from recovery import folding, retention
from recovery.history import History
from recovery.index import State
from recovery.live import Live

Names = tuple[tuple[Any, str, Any], ...]


def needed_segment_is_freed() -> Names:
    """A sweep asks what the floor reads, and not what the kept states before it do."""
    add = Live.add

    async def careless(self: Live, state: State) -> None:
        if not self.places:
            await add(self, state)

    return ((Live, "add", careless),)


def past_ages_by_the_clock() -> Names:
    """Ages are counted from the folder's clock alone, so a clock that is ahead gives up what nobody may."""

    def aged_from(now_ns: int, history: History) -> int:
        return now_ns

    return ((folding, "aged_from", aged_from), (retention, "aged_from", aged_from))


def clock_set_back_puts_off() -> Names:
    """What is due at a time by a clock that was ahead waits for that time, when the clock is right again."""

    def follow(connection: Any, *, now_ns: int, latest_ns: int) -> None:
        return None

    return ((setbacks, "follow", follow),)


def pins_are_not_looked_at() -> Names:
    """A fold and its sweep do not ask who reads from what."""

    async def list_pins(store: Any, machine_id: Any) -> dict[str, Any]:
        return {}

    return ((folding, "list_pins", list_pins),)
