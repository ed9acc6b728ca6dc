"""Somebody who reads a point for a while, as an export or a recovery does, while the log is folded beside them.

They choose among what recovery offers just then, pin it, and read its disks a piece at a time. Once the pin holds, what
they read is the disk as it may have been at that sequence, to the last piece, whatever is given up meanwhile; before,
they may be told that the state was given up.
"""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from recovery.chunks import MachineLog
from recovery.pins import pin
from recovery.points import Latest, Named, Request, locate, survey
from recovery.view import View
from replicar.errors import CorruptionError, ReplicarError
from simulator import registered
from simulator.world import cast
from simulator.world.folder import storage
from simulator.world.processes import Process

if TYPE_CHECKING:
    from simulator.stage import Stage

PLACE: Final = "reader"
#: Virtual seconds before a point is chosen, and between two pieces of a disk, of which there are so
#: many, and how many read at once.
PAUSE_SECONDS: Final = (1.0, 8.0)
PIECE_SECONDS: Final = (8.0, 40.0)
PIECES: Final = 2
AT_ONCE: Final = 4


async def read_for_ever(stage: Stage, process: Process, draw: random.Random) -> None:
    """Choose points and read them, a few at a time, again and again."""
    process.identity = cast.who(cast.WORKER)
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(_go_on(stage, process, random.Random(draw.getrandbits(32))))


async def _go_on(stage: Stage, process: Process, draw: random.Random) -> None:
    world = stage.world
    while True:
        await asyncio.sleep(draw.uniform(*PAUSE_SECONDS))
        keys = registered.machine_keys(world, stage.machine)
        if keys is None:
            continue
        store = storage(process, world.clocks[cast.WORKER], world.blobs, draw.getrandbits(32))
        with suppress(ReplicarError):  # storage is away, or there is nothing yet, or it was given up just now
            await _read(stage, MachineLog(store, stage.machine_id, keys), draw)


async def _read(stage: Stage, log: MachineLog, draw: random.Random) -> None:
    state = await locate(log, await _chosen(log, draw))
    held = await pin(log, state, clock=stage.world.clocks[cast.WORKER], random=os.urandom)
    sequence = state.place.sequence
    try:
        view = View(log, state, memory_bytes=1 << 20)
        for disk in view.disks:
            image, piece = bytearray(), -(-disk.size_bytes // PIECES // 4096) * 4096
            for at in range(0, disk.size_bytes, piece):
                if at:
                    await asyncio.sleep(draw.uniform(*PIECE_SECONDS))
                image += await view.read(disk, at, min(piece, disk.size_bytes - at))
            for wrong in stage.truths[disk.name].differences(bytes(image), sequence, is_replica=True):
                stage.violated(f"a reader of sequence {sequence} got of disk {disk.name}: {wrong}")
        stage.world.note(f"a reader has read sequence {sequence}")
    except CorruptionError as error:
        if "version" not in error.fields:
            stage.violated(f"a reader who had pinned sequence {sequence} met {error}")
    finally:
        await held.release()


async def _chosen(log: MachineLog, draw: random.Random) -> Request:
    """The latest state, or any point that is offered."""
    names = [mark.name for mark in (await survey(log)).marks if not mark.in_gap]
    return Named(draw.choice(names)) if names and draw.random() < 0.7 else Latest()
