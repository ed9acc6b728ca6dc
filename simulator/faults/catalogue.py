"""The catalogue of faults: each kind by its name, and `Fault`, one of a kind at one moment of a story.

An injector is a coroutine that does its harm, waits as long as it lasts and mends it, if it mends. Its docstring is its
contract. `stage.heal` mends whatever a story left broken.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulator.faults import control, deaths, disks, links, neighbours, storage, upkeep, versions

if TYPE_CHECKING:
    from simulator.stage import Stage

Injector = Callable[["Stage", random.Random, float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind is injected, between which seconds it lasts, and which stories may have it: `of`."""

    inject: Injector
    shortest: float = 0.0
    longest: float = 0.0
    of: str = ""

    def seconds(self, draw: random.Random) -> float:
        return round(draw.uniform(self.shortest, self.longest), 3)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `number` tells it from others of its story, and is what it draws from."""

    kind: str
    at: float
    seconds: float
    number: int

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"at {self.at:6.2f} s  {self.kind}{lasting}"


CATALOGUE: Final[Mapping[str, Kind]] = {
    "link_reset": Kind(links.reset),
    "link_cut": Kind(links.cut, 0.5, 20.0),
    "link_one_way": Kind(links.one_way, 0.5, 20.0),
    "link_half_open": Kind(links.half_open, 1.0, 15.0),
    "link_slow": Kind(links.slow, 2.0, 20.0),
    "agent_killed": Kind(deaths.agent_killed),
    "agent_stopped": Kind(deaths.agent_stopped),
    "server_killed": Kind(deaths.server_killed),
    "server_stopped": Kind(deaths.server_stopped),
    "application_killed": Kind(deaths.application_killed),
    "machine_power": Kind(deaths.machine_power, 1.0, 6.0),
    "server_power": Kind(deaths.server_power, 1.0, 10.0),
    "server_disk_lost": Kind(deaths.server_disk_lost),
    "agent_disk_full": Kind(disks.agent_disk_full, 1.0, 15.0),
    "server_disk_full": Kind(disks.server_disk_full, 1.0, 15.0),
    "slow_disks": Kind(disks.slow_disks, 2.0, 15.0),
    "write_errors": Kind(disks.write_errors, 0.5, 4.0),
    "sync_errors": Kind(disks.sync_errors, 0.2, 3.0),
    "cache_damaged": Kind(disks.cache_damaged),
    "cache_misdirected": Kind(disks.cache_misdirected, 1.0, 8.0),
    "log_damaged": Kind(disks.log_damaged),
    "storage_away": Kind(storage.away, 1.0, 20.0),
    "storage_refuses": Kind(storage.refuses, 1.0, 15.0),
    "storage_fails": Kind(storage.fails, 1.0, 15.0),
    "storage_throttles": Kind(storage.throttles, 2.0, 20.0),
    "late_writes": Kind(storage.late_writes, 2.0, 20.0),
    "leases_lost": Kind(storage.leases_lost),
    "container_deleted": Kind(storage.container_deleted, 1.0, 15.0),
    "config_away": Kind(control.config_away, 2.0, 25.0),
    "config_killed": Kind(control.config_killed),
    "takeover": Kind(control.takeover),
    "clock_jumps": Kind(control.clock_jumps),
    "folder_killed": Kind(upkeep.folder_killed, of="upkeep"),
    "folder_cut_off": Kind(upkeep.folder_cut_off, 2.0, 20.0, of="upkeep"),
    "reader_killed": Kind(upkeep.reader_killed, of="upkeep"),
    "folder_former": Kind(versions.folder_former, 3.0, 20.0, of="upkeep"),
    "folder_newer": Kind(versions.folder_newer, 8.0, 25.0, of="upkeep"),
    "neighbour_killed": Kind(neighbours.neighbour_killed, of="group"),
    "group_slow": Kind(neighbours.group_slow, 5.0, 20.0, of="group"),
    "group_cut_off": Kind(neighbours.group_cut_off, 0.2, 8.0, of="group"),
    "agent_newer": Kind(versions.agent_newer, 2.0, 20.0, of="versions"),
    "agent_foreign": Kind(versions.agent_foreign, 2.0, 15.0, of="versions"),
    "server_newer": Kind(versions.server_newer, 2.0, 20.0, of="versions"),
    "server_foreign": Kind(versions.server_foreign, 2.0, 15.0, of="versions"),
}


def kinds_of(part: str = "") -> tuple[str, ...]:
    """The kinds that every story may have, or those of a part that only some have: upkeep, group, versions."""
    return tuple(name for name, kind in CATALOGUE.items() if kind.of == part)
