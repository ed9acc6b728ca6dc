"""Faults of upgrades: one part is of another version for a while; see `simulator.world.versions` for what that is."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from simulator.world.versions import FOREIGN, FORMER, NEWER, OURS, Version

if TYPE_CHECKING:
    from simulator.stage import Stage


def _upgrade_agent(stage: Stage, version: Version) -> None:
    stage.world.versions.of[f"{stage.machine}/agent"] = version
    stage.stop_agent()


def _upgrade_server(stage: Stage, name: str, version: Version) -> None:
    stage.world.versions.of[f"{name}/process-server"] = version
    stage.stop_server(name)


async def agent_newer(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The agent is upgraded before its process server, and put back later, or not.

    It offers a newer stream version besides ours, and says more than anybody knows: the server chooses ours, passes
    over the rest, and nothing else is different.
    """
    _upgrade_agent(stage, NEWER)
    await asyncio.sleep(seconds)
    if draw.random() < 0.5:
        _upgrade_agent(stage, OURS)


async def agent_foreign(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The agent speaks no stream version of the server's, until it is put back.

    It is refused, with both versions named; what it captures stays in its log, and goes out afterwards.
    """
    _upgrade_agent(stage, FOREIGN)
    await asyncio.sleep(seconds)
    _upgrade_agent(stage, OURS)


async def server_newer(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A process server is upgraded before its agents, and put back later, or not; it says more than they know, and they
    pass over it."""
    name = draw.choice(stage.servers_by_name)
    _upgrade_server(stage, name, NEWER)
    await asyncio.sleep(seconds)
    if draw.random() < 0.5:
        _upgrade_server(stage, name, OURS)


async def server_foreign(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A process server chooses a stream version that no agent offered, until it is put back.

    Agents hang up and say so, and send it nothing; their logs hold on.
    """
    name = draw.choice(stage.servers_by_name)
    _upgrade_server(stage, name, FOREIGN)
    await asyncio.sleep(seconds)
    _upgrade_server(stage, name, OURS)


async def folder_former(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A worker of the former version folds for a while: it writes index blobs of version 1.

    Ours read them beside their own, tiers of both under one checkpoint, and nothing tells the two apart.
    """
    await _folded_by(stage, FORMER, seconds)


async def folder_newer(stage: Stage, draw: random.Random, seconds: float) -> None:
    """One worker is upgraded before everybody else: what it writes the others do not know.

    They say so, and neither fold nor begin a log by an older fold that they do know: that would give up what the newer
    one keeps. Once all are upgraded everything goes on.
    """
    versions = stage.world.versions
    version = versions.newer()
    await _folded_by(stage, version, seconds)
    stage.world.note("everybody is upgraded")
    versions.upgrade(version)


async def _folded_by(stage: Stage, version: Version, seconds: float) -> None:
    if stage.upkeep is None:
        return
    stage.world.versions.of[stage.upkeep.worker] = version
    stage.upkeep.restart_worker()
    await asyncio.sleep(seconds)
    stage.world.versions.of[stage.upkeep.worker] = OURS
    stage.upkeep.restart_worker()
