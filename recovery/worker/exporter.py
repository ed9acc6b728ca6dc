"""The process that serves a point's disks to a machine: `python -m recovery.worker.exporter DIRECTORY`; see `keeper`.

It reads what to serve from the directory's note. While the disks are read from the log it needs the config server once,
for the key, and storage all the time; it goes on trying for both, since the machine that waits for its disks is better
off than one whose disks have errors. On SIGTERM it makes the overlays durable and ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from recovery.export.disk import Point, ServedDisk
from recovery.export.overlay import Overlay
from recovery.export.server import ExportServer
from recovery.holes import held
from recovery.points import AtSequence
from recovery.view import View
from recovery.worker.keeper import PROCESS, SOCKET, Exported, overlay_name, raw_name
from recovery.worker.logs import open_view
from recovery.worker.settings import load_settings
from replicar.clock import SystemClock
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.errors import PermanentError, ReplicarError, TransientError
from replicar.formats.overlay import Base
from replicar.formats.record import Disk
from replicar.observe import logs
from replicar.observe.logs import LogFormat
from replicar.storage.target import open_store

RETRY_SECONDS: Final = 2.0
PART: Final = "exporter"

_log = logging.getLogger(__name__)


class WholeFiles:
    """Disks of a point as raw files, read as a view is."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = {name: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for name, path in files.items()}

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    async def read(self, disk: Disk, offset: int, length: int) -> bytes:
        """Raises PermanentError: the file was cut short, or its disk is faulty."""
        try:
            data = await asyncio.to_thread(os.pread, self._files[disk.name], length, offset)
        except OSError as error:
            raise PermanentError(
                f"disk {disk.name} can't be read: {error.strerror}", hint="look at its file"
            ) from error
        if len(data) < length:
            raise PermanentError(f"disk {disk.name} ends before byte {offset + length}", hint="its file was cut short")
        return data

    async def stretches(self, disk: Disk, offset: int, length: int) -> list[tuple[int, int]]:
        """Where there is data, as (start, end), ascending."""
        return list(held(self._files[disk.name], offset, length))

    async def warm(self, disk: Disk, offset: int, length: int) -> None:
        """The kernel reads files ahead by itself."""


async def serve(directory: Path) -> None:
    """Serve until SIGTERM."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    note = Exported.load(directory)
    if note.settings is not None:
        logs.set_up(PART, load_settings(Path(note.settings)).log_format)
    logs.always(machine=note.machine, machine_id=note.machine_id)
    disks = [Disk(index=index, name=name, size_bytes=size) for name, index, size in note.disks]
    async with AsyncExitStack() as stack:
        point: Point
        if note.whole:
            files = WholeFiles({disk.name: directory / raw_name(disk.name) for disk in disks})
            stack.callback(files.close)
            point = files
            pinning = asyncio.create_task(_keep_point(note))
            stack.push_async_callback(_ended, pinning)
        else:
            point = await _from_log(note, stack)
        now_ns = SystemClock().now_ns()
        served = []
        for disk in disks:
            machine_id, at = uuid.UUID(note.machine_id), (note.sequence, note.time_ns)
            base = Base(machine_id, *at, disk.index, disk.name, disk.size_bytes)
            overlay = Overlay.kept(directory / overlay_name(disk.name), base, created_ns=now_ns)
            served.append(ServedDisk(point, disk, overlay))
        async with ExportServer(served, directory / SOCKET):
            _log.info("serving %d disk(s) as of sequence %d", len(served), note.sequence)
            await stop.wait()


async def _from_log(note: Exported, stack: AsyncExitStack) -> View:
    """A view of the point, as soon as config server and storage have what it takes.

    Raises:
        ReplicarError: it can't be had, and waiting won't help.
    """
    settings = load_settings(Path(note.settings) if note.settings is not None else None)
    store = await stack.enter_async_context(open_store(settings.storage))
    identity = Identity.load(settings.identity)
    control = await stack.enter_async_context(ControlClient(identity, address=settings.config_server))
    while True:
        try:
            return await open_view(control, store, note.machine, AtSequence(note.sequence), pinned=stack)
        except TransientError as error:
            _log.warning("%s; trying again", error)
            await asyncio.sleep(RETRY_SECONDS)


async def _keep_point(note: Exported) -> None:
    """Pin the point as long as the machine runs, though its disks need the log no more: the way home does."""
    async with AsyncExitStack() as stack:
        try:
            await _from_log(note, stack)
        except ReplicarError as error:
            _log.warning("the point can't be kept; a failback will have to compare bytes: %s", error)
            return
        await asyncio.Event().wait()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def main() -> None:
    """Hold the directory's lock, serve, and say what went wrong."""
    directory = Path(sys.argv[1])
    logs.set_up(PART, LogFormat.TEXT)
    with (directory / PROCESS).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another serves it already
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            asyncio.run(serve(directory))
        except ReplicarError as error:
            _log.error("%s", error)
            sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
