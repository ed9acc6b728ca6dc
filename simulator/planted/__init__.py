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

from simulator.planted import agent, group, recovery, server, stream, upkeep
from simulator.story import Story, story_of
from simulator.workloads import Kind, Workload
from simulator.world.replaced import replaced

Names = tuple[tuple[Any, str, Any], ...]


@dataclass(frozen=True, slots=True)
class Bug:
    """What is wrong with the product, the names that make it so, and the faults under which it shows."""

    what: str
    names: Callable[[], Names]
    faults: tuple[str, ...]
    workload: Workload | None = None
    leaves_out: bool = False
    is_paced: bool = False

    def story(self, seed: int) -> Story:
        """A story in which it has occasion to show."""
        return story_of(
            seed, kinds=self.faults, workload=self.workload, leaves_out=self.leaves_out, is_paced=self.is_paced
        )


#: More than a change log holds, while nothing goes out.
_HEAVY: Final = Workload(Kind.SEQUENTIAL, rate=8.0)
#: Writes all the time.
_BUSY: Final = Workload(Kind.UNIFORM, rate=8.0)
#: The same places again and again, so that what a state needs is soon needed by no later one.
_AGAIN: Final = Workload(Kind.LOG_APPEND, rate=4.0)
#: Nothing is made durable but by the kernel, as it likes.
_LAZY: Final = Workload(Kind.UNIFORM, rate=3.0, flush_share=0.0)


#: The same, by sectors, so that pages are written in part.
_BY_SECTORS: Final = Workload(Kind.UNIFORM, rate=3.0, block_bytes=(512,))
_MANY_SECTORS: Final = Workload(Kind.UNIFORM, rate=20.0, block_bytes=(512,))


def _bug(
    names: Callable[[], Names],
    *faults: str,
    workload: Workload | None = None,
    leaves_out: bool = False,
    is_paced: bool = False,
) -> Bug:
    return Bug((names.__doc__ or "").strip().splitlines()[0], names, faults, workload, leaves_out, is_paced)


PLANTED: Final[Mapping[str, Bug]] = {
    "trims_on_received": _bug(agent.trims_on_received, "server_killed", "storage_away"),
    "flush_leaves_the_disk": _bug(agent.flush_leaves_the_disk, "machine_power"),
    "dirty_is_not_noted": _bug(agent.dirty_is_not_noted, "storage_away", "link_cut", workload=_HEAVY),
    "clean_before_it_is_copied": _bug(agent.clean_before_it_is_copied, "write_errors", "machine_power"),
    "gap_is_not_said": _bug(agent.gap_is_not_said, "storage_away", "link_cut", workload=_HEAVY),
    "gap_ends_early": _bug(agent.gap_ends_early, "write_errors", "machine_power"),
    "last_write_is_not_redone": _bug(agent.last_write_is_not_redone, "agent_killed"),
    "numbers_come_twice": _bug(agent.numbers_come_twice, "machine_power"),
    "digests_are_kept": _bug(agent.digests_are_kept, "machine_power", "write_errors"),
    "written_pages_stay_left_out": _bug(
        agent.written_pages_stay_left_out, "link_reset", "agent_killed", workload=_LAZY, leaves_out=True
    ),
    "rest_of_a_page_is_forgotten": _bug(
        agent.rest_of_a_page_is_forgotten, "link_reset", "agent_killed", workload=_BY_SECTORS, leaves_out=True
    ),
    "left_out_is_believed": _bug(
        agent.left_out_is_believed, "machine_power", "link_reset", workload=_LAZY, leaves_out=True
    ),
    "clean_when_its_turn_is_over": _bug(
        agent.clean_when_its_turn_is_over,
        "link_reset",
        "link_slow",
        workload=_MANY_SECTORS,
        leaves_out=True,
        is_paced=True,
    ),
    "audits_are_told_late": _bug(agent.audits_are_told_late, "link_reset", "agent_killed", workload=_BUSY),
    "stored_out_of_order": _bug(server.stored_out_of_order, "late_writes", "storage_fails", "storage_throttles"),
    "lease_is_forgotten": _bug(server.lease_is_forgotten, "takeover", "late_writes", "server_killed", workload=_LAZY),
    "frames_lost_at_takeover": _bug(server.frames_lost_at_takeover, "takeover", "storage_away"),
    "fenced_by_nobody": _bug(server.fenced_by_nobody, "leases_lost"),
    "salt_is_used_again": _bug(server.salt_is_used_again, "server_killed"),
    "place_is_used_again": _bug(server.place_is_used_again, "server_killed"),
    "points_in_gaps": _bug(recovery.points_in_gaps, "machine_power", "write_errors"),
    "needed_segment_is_freed": _bug(upkeep.needed_segment_is_freed, "folder_killed", "server_killed"),
    "pins_are_not_looked_at": _bug(upkeep.pins_are_not_looked_at, "folder_killed", "server_killed", workload=_AGAIN),
    "past_ages_by_the_clock": _bug(upkeep.past_ages_by_the_clock, "folder_killed", "clock_jumps"),
    "writers_are_not_held": _bug(group.writers_are_not_held, "group_slow", workload=_BUSY),
    "group_of_some": _bug(group.group_of_some, "group_cut_off", "neighbour_killed"),
    "news_are_refused": _bug(stream.news_are_refused, "agent_newer", "server_newer"),
    "newest_write_loses": _bug(recovery.newest_write_loses, "link_reset"),
}

#: Mistakes that were the product's, and show in few stories: of each, the one that found it is kept as a file.
ONCE: Final[Mapping[str, Bug]] = {
    "redone_over_newer": _bug(agent.redone_over_newer, "storage_throttles", "agent_killed", workload=_HEAVY),
    "dropped_pages_are_believed": _bug(agent.dropped_pages_are_believed, "sync_errors", "machine_power"),
    "failed_flush_is_forgotten": _bug(agent.failed_flush_is_forgotten, "sync_errors", "machine_power"),
    "extents_are_retired": _bug(agent.extents_are_retired, "storage_away", "machine_power", workload=_HEAVY),
    "who_left_is_heard": _bug(agent.who_left_is_heard, "group_slow", "group_cut_off", "application_killed"),
    "clock_set_back_puts_off": _bug(upkeep.clock_set_back_puts_off, "clock_jumps", "folder_killed"),
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have that bug in the product, or none, while the block runs."""
    with replaced(*((PLANTED.get(name) or ONCE[name]).names() if name is not None else ())):
        yield
