"""Bugs on purpose: what a simulation that is worth its name has to find.

Each is a variant of a few of the product's functions, put in their place from outside while a story is told. The
product has no switch for any of them, so none can ever be on by accident.

    with planted("trims_on_received"):
        outcome = simulate(story_of(3))
    assert outcome.violations
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from simulator.planted import agent, recovery, server
from simulator.world.replaced import replaced

Names = tuple[tuple[Any, str, Any], ...]


@dataclass(frozen=True, slots=True)
class Bug:
    """What is wrong with the product, the names that make it so, and the faults under which it shows."""

    what: str
    names: Callable[[], Names]
    faults: tuple[str, ...]


def _bug(names: Callable[[], Names], *faults: str) -> Bug:
    return Bug((names.__doc__ or "").strip().splitlines()[0], names, faults)


PLANTED: Final[Mapping[str, Bug]] = {
    "trims_on_received": _bug(agent.trims_on_received, "server_killed", "storage_away"),
    "flush_leaves_the_disk": _bug(agent.flush_leaves_the_disk, "machine_power"),
    "touched_is_not_recorded": _bug(agent.touched_is_not_recorded, "machine_power"),
    "dirty_is_not_noted": _bug(agent.dirty_is_not_noted, "agent_disk_full", "agent_killed"),
    "clean_before_it_is_copied": _bug(agent.clean_before_it_is_copied, "write_errors", "machine_power"),
    "gap_is_not_said": _bug(agent.gap_is_not_said, "write_errors", "machine_power", "agent_disk_full"),
    "gap_ends_early": _bug(agent.gap_ends_early, "write_errors", "machine_power"),
    "last_write_is_not_redone": _bug(agent.last_write_is_not_redone, "agent_killed"),
    "numbers_come_twice": _bug(agent.numbers_come_twice, "machine_power"),
    "digests_are_kept": _bug(agent.digests_are_kept, "machine_power", "write_errors"),
    "copies_race_with_writes": _bug(agent.copies_race_with_writes, "write_errors", "machine_power", "slow_disks"),
    "frames_are_not_checked": _bug(server.frames_are_not_checked, "log_damaged", "link_cut"),
    "cache_is_believed": _bug(
        server.cache_is_believed, "cache_damaged", "cache_misdirected", "server_killed", "storage_away"
    ),
    "stored_out_of_order": _bug(server.stored_out_of_order, "late_writes", "storage_fails", "storage_throttles"),
    "lease_is_forgotten": _bug(server.lease_is_forgotten, "takeover", "storage_away", "late_writes"),
    "frames_lost_at_takeover": _bug(server.frames_lost_at_takeover, "takeover", "storage_away"),
    "salt_is_used_again": _bug(server.salt_is_used_again, "server_killed"),
    "place_is_used_again": _bug(server.place_is_used_again, "server_killed"),
    "points_in_gaps": _bug(recovery.points_in_gaps, "machine_power", "write_errors"),
    "newest_write_loses": _bug(recovery.newest_write_loses, "link_reset"),
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have that bug in the product, or none, while the block runs."""
    with replaced(*(PLANTED[name].names() if name is not None else ())):
        yield
