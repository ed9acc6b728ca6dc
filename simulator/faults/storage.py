"""Faults of the blob service; see `simulator.world.blobs` for what becomes of a request."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from simulator.world.blobs import STORAGE, Weather

if TYPE_CHECKING:
    from simulator.stage import Stage


async def _weather(stage: Stage, seconds: float, **shares: Any) -> None:
    service = stage.world.blobs
    mine = service.weather = Weather(**shares)
    await asyncio.sleep(seconds)
    if service.weather is mine:
        service.weather = Weather()


async def away(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A process server can't reach storage, or neither can.

    Its cache fills, then the agent's log, then the ladder; all of it goes up again by itself.
    """
    names = draw.choice(([draw.choice(stage.servers_by_name)], stage.servers_by_name))
    for name in names:
        stage.world.shut(name, STORAGE)
    await asyncio.sleep(seconds)
    for name in names:
        stage.world.reopen(name, STORAGE)


async def refuses(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Requests are answered with the service's documented refusals: busy, too many, time-out, container being deleted,
    no authority. None of them was carried out.

    They are repeated, or the machine waits and its log is opened again.
    """
    await _weather(stage, seconds, refused=draw.choice((0.1, 0.5, 1.0)))


async def fails(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Requests fail with 500, 502, 504 or no answer; half of them were carried out.

    What is repeated is the same, so it does not matter which.
    """
    await _weather(stage, seconds, failed=draw.choice((0.05, 0.3, 0.8)))


async def throttles(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Requests are slow, and many are refused with 503 and a time to wait."""
    await _weather(stage, seconds, throttled=draw.choice((0.2, 0.6)), latency_seconds=draw.choice((0.05, 1.0)))


async def late_writes(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Writes time out, and are carried out up to a minute later, perhaps after their writer was replaced.

    A place in the log is written once and with the same bytes, so a late twin changes nothing; under a lease that was
    broken it is refused.
    """
    await _weather(stage, seconds, late=draw.choice((0.1, 0.4)), late_seconds=draw.choice((5.0, 60.0)))


async def leases_lost(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Somebody breaks all leases, as an operator may.

    A writer without its lease stops; the log goes on with the next run, whole.
    """
    stage.world.note(f"{stage.world.blobs.break_leases()} leases are broken")
    stage.broke_leases = True


async def container_deleted(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The container is deleted by mistake, and brought back.

    Nobody makes an empty one in its place; afterwards everything goes on as if it had been away.
    """
    stage.world.note("the container is deleted")
    stage.world.blobs.delete_container()
    await asyncio.sleep(seconds)
    stage.world.note("the container is restored")
    stage.world.blobs.restore_container()
