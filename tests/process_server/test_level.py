"""How hard to compress: harder on a narrow link with idle processors, told or measured; never below the settings."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from process_server.level import PATIENCE, RUNGS, Drive, level_for
from process_server.load import Load, Meter
from process_server.vitals import Host
from tests.process_server.stores import GatedStore
from tests.process_server.support import Site, running, stored_frames

MB = 1e6
#: A link of about 10 MB/s that holds everything up, with two processors that have little to do.
NARROW = Load(held_up=0.95, idle_cores=1.9, bytes_per_second=16 * MB)
WIDE = Load(held_up=0.0, idle_cores=1.0, bytes_per_second=200 * MB)
BUSY = Load(held_up=0.6, idle_cores=0.1, bytes_per_second=16 * MB)
BETWEEN = Load(held_up=0.3, idle_cores=1.0, bytes_per_second=16 * MB)


@pytest.mark.parametrize(
    ("configured", "rate", "level"),
    [
        (1, None, 1),
        (1, 100 << 20, 1),
        (1, 10 << 20, 3),
        (1, 1 << 20, 6),
        (9, 1 << 20, 9),
        (-3, 10 << 20, 3),
        (0, 1 << 20, 0),
    ],
)
def test_a_narrow_link_gets_a_higher_level_and_never_a_lower_one(configured: int, rate: int | None, level: int) -> None:
    assert level_for(configured, rate) == level
    assert Drive().level(configured, rate) == level


@pytest.mark.parametrize(
    ("rung", "streak", "load", "rung_after", "streak_after"),
    [
        (0, 0, NARROW, 0, 1),  # once is no reason
        (0, PATIENCE - 1, NARROW, 1, 0),
        (2, PATIENCE - 1, NARROW, 3, 0),
        (len(RUNGS), 0, NARROW, len(RUNGS), 0),  # there is no higher one
        (0, 1, WIDE, 0, 0),  # what had begun is forgotten
        (0, 1, BETWEEN, 0, 0),
        (2, 1, WIDE, 2, -1),
        (2, 1 - PATIENCE, WIDE, 1, 0),
        (2, -1, NARROW, 2, 1),
        (2, 0, BETWEEN, 2, 0),
        (2, 1, BUSY, 1, 0),  # others need the processors: at once
        (0, 0, BUSY, 0, 0),
        # the next rung would take more than there is to spare: 0.7 of a core, of 0.4
        (0, 1, Load(held_up=0.9, idle_cores=0.4, bytes_per_second=400 * MB), 0, 0),
        (1, 1, Load(held_up=0.9, idle_cores=1.9, bytes_per_second=500 * MB), 1, 0),
    ],
)
def test_one_look_moves_the_level_as_the_table_says(
    rung: int, streak: int, load: Load, rung_after: int, streak_after: int
) -> None:
    assert Drive(rung, streak).after(load) == Drive(rung_after, streak_after)


def test_a_link_that_stays_narrow_ends_at_the_highest_rung_and_one_that_opens_at_the_settings() -> None:
    drive, levels = Drive(), []
    for _ in range(PATIENCE * len(RUNGS)):
        drive = drive.after(NARROW)
        levels.append(drive.level(1, None))
    assert levels == sorted(levels)
    assert levels[-1] == RUNGS[-1][0]
    for _ in range(PATIENCE * len(RUNGS)):
        drive = drive.after(WIDE)
    assert drive.level(1, None) == 1


@pytest.mark.parametrize(("configured", "level"), [(0, 0), (1, 3), (5, 5)])
def test_a_rung_raises_what_is_configured_and_leaves_uncompressed_what_is_to_be(configured: int, level: int) -> None:
    assert Drive(rung=1).level(configured, None) == level


def test_the_meter_counts_what_waits_while_nothing_is_sealed() -> None:
    now = 0.0
    meter = Meter(lambda: now, cores=2)
    assert meter.look(Host(100, 50)) is None  # nothing to compare with yet
    with meter.waiting():
        now = 1.0
        with meter.sealing(3_000_000):  # whoever waits now waits for a processor
            now = 3.0
        now = 3.5
    now = 4.0
    assert meter.look(Host(200, 75)) == Load(held_up=1.5 / 4, idle_cores=1.5, bytes_per_second=750_000)
    now = 5.0
    assert meter.look(Host(300, 175)) == Load(held_up=0.0, idle_cores=0.0, bytes_per_second=0)


def test_the_meter_says_nothing_where_the_kernel_counts_nothing() -> None:
    now = 0.0
    meter = Meter(lambda: now, cores=2)
    meter.look(Host())
    now = 1.0
    assert meter.look(Host()) is None


async def test_a_server_whose_uploads_hang_compresses_harder_and_what_it_stores_is_what_came(tmp_path: Path) -> None:
    site, store = Site.make(tmp_path), GatedStore()
    async with asyncio.timeout(60), running(site, store) as server, asyncio.TaskGroup() as group:
        agent, sealer, hosts = site.agent(server.port), server.workshop.sealer, itertools.count(100, 100)
        assert sealer.level == 1
        last = agent.begin()
        await agent.run(until_stored=last)
        store.gate.clear()
        last = agent.fill(40, size=1 << 20)  # more than may be under way
        sending = group.create_task(agent.run(until_stored=last))
        while sealer.level == 1:
            sealer.look(Host(next(hosts), 0))  # all processors are idle
            await asyncio.sleep(0.05)
        assert sealer.level == RUNGS[0][0]
        store.gate.set()
        await sending
        assert await stored_frames(store, site.machine.id, site.data_key) == agent.everything
