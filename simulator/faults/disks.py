"""Faults of disks: full, slow, failing, and lying.

A fault is a `Device` for a machine, whose calls then fail or go elsewhere, for as long as it stands.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from replicar.errors import CorruptionError
from replicar.formats import changelog
from simulator.world.calls import Device
from simulator.world.files import REAL

if TYPE_CHECKING:
    from simulator.stage import Stage


class _Full(Device):
    """Nothing can be allocated, and what was promised by preallocation can't be had."""

    def __init__(self, *, writes: bool) -> None:
        self._writes = writes

    def before(self, call: str, path: str, offset: int, length: int) -> None:
        if (call == "open" and length) or call in ("allocate", "mkdir") or (call == "write" and self._writes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


class _Failing(Device):
    """Some calls of some kinds on some files fail with EIO."""

    def __init__(self, draw: random.Random, calls: tuple[str, ...], share: float, *, only: str = "") -> None:
        self._draw, self._calls, self._share, self._only = draw, calls, share, only

    def before(self, call: str, path: str, offset: int, length: int) -> None:
        if call in self._calls and path.endswith(self._only) and self._draw.random() < self._share:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)


class _Misdirected(Device):
    """Some writes to the cache land a few pages off."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def moved(self, path: str, offset: int) -> int:
        if path.endswith("/cache") and self._draw.random() < 0.3:
            return max(offset + self._draw.choice((-8192, -4096, 4096, 8192, 1 << 20)), 0)
        return offset


async def _stand(stage: Stage, machine: str, device: Device, seconds: float) -> None:
    devices = stage.world.calls.devices
    devices[machine] = device
    await asyncio.sleep(seconds)
    if devices[machine] is device:
        devices[machine] = Device()


async def agent_disk_full(stage: Stage, draw: random.Random, seconds: float) -> None:
    """No space for new files on the protected machine.

    The change log gets no further file: the ladder says GAP and climbs back; applications are not refused.
    """
    await _stand(stage, stage.machine, _Full(writes=False), seconds)


async def server_disk_full(stage: Stage, draw: random.Random, seconds: float) -> None:
    """No space on a process server, not even where it was preallocated (thin volumes).

    Nothing more is received by being durable; what is in memory is stored all the same.
    """
    await _stand(stage, draw.choice(stage.servers_by_name), _Full(writes=True), seconds)


async def slow_disks(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Whatever threads do, here and there, takes up to a second. Late, and nothing else."""
    loop = stage.world.loop
    delays, loop.delays = loop.delays, lambda: draw.expovariate(1 / 0.2)
    await asyncio.sleep(seconds)
    loop.delays = delays


async def write_errors(stage: Stage, draw: random.Random, seconds: float) -> None:
    """The protected disk fails writes.

    The application is told, and a gap has begun before it is: what is there now is read and sent again.
    """
    device = _Failing(draw, ("write",), draw.choice((0.1, 0.5)), only=".img")
    await _stand(stage, stage.machine, device, seconds)


async def sync_errors(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Syncs fail on the protected machine, and what they were to write is never written.

    A flush is answered with an error; nothing that was told to be durable is missing after a power cut.
    """
    await _stand(stage, stage.machine, _Failing(draw, ("sync",), draw.choice((0.2, 0.8))), seconds)


async def cache_damaged(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A bit of a process server's cache flips.

    It is found before it is sealed, or was not needed any more; the agent sends it again.
    """
    name = draw.choice(stage.servers_by_name)
    _flip(stage.world.machines[name].directory / "state" / "cache", draw, stage.world.note)


async def cache_misdirected(stage: Stage, draw: random.Random, seconds: float) -> None:
    """Writes to a process server's cache land in a wrong place, and say nothing.

    What they should have written is found missing, what they overwrote is found damaged, when it is read back.
    """
    await _stand(stage, draw.choice(stage.servers_by_name), _Misdirected(draw), seconds)


async def log_damaged(stage: Stage, draw: random.Random, seconds: float) -> None:
    """A bit of the agent's change log flips, in what was sealed there.

    It is never stored as if it were sound. What can't be sent any more is compared and sent anew, in a gap, when the
    agent starts again. (The frame that is still open has no checksum yet; a bit that flips there is in memory, as one
    in the application's is, and audits are what finds it.)
    """
    logs = sorted((stage.world.machines[stage.machine].directory / "state" / "log").glob("changes-*.hrl"))
    if logs:
        _flip(chosen := draw.choice(logs), draw, stage.world.note, _is_sealed(chosen))
        stage.damaged_log = True


def _is_sealed(path: Path) -> Callable[[int], bool]:
    """Whether a byte of a change-log file is under a checksum."""
    try:
        end = changelog.scan(memoryview(path.read_bytes()), trust_staging=False).end_offset
    except CorruptionError:  # its header was hit before, so nothing of it is believed
        return lambda place: True
    return lambda place: place < changelog.STAGING_OFFSET or changelog.FRAMES_OFFSET <= place < end


def _flip(
    path: os.PathLike[str], draw: random.Random, note: object, may_be_hit: Callable[[int], bool] = lambda place: True
) -> None:
    if not os.path.exists(path):
        return
    descriptor = REAL.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = REAL.fstat(descriptor).st_size
        used = []
        at = 0
        while at < size:
            try:
                start = REAL.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                break
            at = REAL.lseek(descriptor, start, os.SEEK_HOLE)
            used.append((start, at))
        if used:
            start, end = draw.choice(used)
            place = draw.randrange(start, min(end, size))
            if not may_be_hit(place):
                return
            (byte,) = REAL.pread(descriptor, 1, place)
            REAL.pwrite(descriptor, bytes([byte ^ 1 << draw.randrange(8)]), place)
            assert callable(note)
            note(f"a bit of {os.path.basename(path)} flips at {place}")
    finally:
        REAL.close(descriptor)
