"""Keeps the disks of a point there for as long as a machine runs from them: one exporter process for each machine.

An exporter is nobody's child: it stays when the worker ends or is killed, and is found again by its directory. What it
serves is written down there (no key is: it asks the config server for that), so it can be started again after the
host was:

    export.json     which machine, which point, which disks; whether they are still read from the log
    <disk>.overlay  what the machine wrote; kept
    <disk>.raw      the point's disk itself, once it was made whole (`complete`)
    nbd             the Unix socket
    pid             locked by the exporter as long as it lives
    log             what it had to say
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import uuid
from asyncio.subprocess import DEVNULL
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from recovery.compute.machine import DiskSource
from recovery.export.overlay import Overlay
from recovery.failback.spans import Spans
from recovery.output import write_raw_file
from recovery.view import Progress, View
from recovery.worker.made import shifted
from replicar.control.files import write_file
from replicar.errors import ConflictError, PermanentError, TransientError

READY_SECONDS: Final = 120.0
#: Closing the overlays makes what is in them durable first.
END_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
NOTE: Final = "export.json"
SOCKET: Final = "nbd"
PROCESS: Final = "pid"
LOG: Final = "log"
_LOG_BYTES: Final = 1000


@dataclass(frozen=True, slots=True)
class Exported:
    """What an exporter serves. `whole`: from files beside it instead of from the log."""

    machine: str
    machine_id: str
    sequence: int
    time_ns: int
    disks: tuple[tuple[str, int, int], ...]  # name, index, size in bytes; the first one boots
    settings: str | None
    whole: bool = False

    @classmethod
    def of(cls, view: View, machine: str, machine_id: uuid.UUID, settings: Path | None) -> Exported:
        disks = tuple((disk.name, disk.index, disk.size_bytes) for disk in view.disks)
        where = str(settings.absolute()) if settings is not None else None
        place = view.state.place
        return cls(machine, str(machine_id), place.sequence, place.time_ns, disks, where)

    @classmethod
    def load(cls, directory: Path) -> Exported:
        """Raises PermanentError: there is no export there, or its note can't be read."""
        try:
            data = json.loads((directory / NOTE).read_text())
            return cls(
                **{**data, "disks": tuple((str(name), int(index), int(size)) for name, index, size in data["disks"])}
            )
        except FileNotFoundError:
            raise PermanentError(f"there is no export in {directory}", hint="was it cleaned up already?") from None
        except (ValueError, TypeError, KeyError) as error:
            raise PermanentError(f"{directory / NOTE} can't be read: {error}", hint="restore that file") from None

    def save(self, directory: Path) -> None:
        write_file(directory / NOTE, json.dumps(asdict(self)).encode())


class Keeper:
    """Exporters below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()

    def at(self, name: str) -> Path:
        return self._directory / name

    def sources(self, name: str) -> tuple[DiskSource, ...]:
        """Where the machine finds its disks."""
        where = self.at(name)
        return tuple(
            DiskSource(disk, f"nbd+unix:///{disk}?socket={where / SOCKET}", size)
            for disk, _, size in Exported.load(where).disks
        )

    async def serve(self, name: str, wanted: Exported) -> None:
        """Have the disks served; an exporter that serves them already is left as it is.

        Raises:
            ConflictError: there is an export of that name, of something else.
            PermanentError: the exporter can't serve them; with its last words.
        """
        where = self.at(name)
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (where / NOTE).exists():
            there = Exported.load(where)
            if replace(there, whole=False, settings=wanted.settings) != replace(wanted, whole=False):
                raise ConflictError(
                    f"{where} holds the disks of another point or machine",
                    hint="clean that up first",
                    ours=asdict(wanted),
                    theirs=asdict(there),
                )
        else:
            wanted.save(where)
        await self._start(where)

    async def changed(self, name: str) -> dict[str, Spans]:
        """By disk, what was written since the point. The exporter is ended for it, and `serve` starts it again."""
        where = self.at(name)
        await self.end(name)
        found = {}
        for disk, _, size in Exported.load(where).disks:
            path = where / overlay_name(disk)
            if not path.exists():
                found[disk] = Spans.of(())
                continue
            overlay = Overlay.to_read(path)
            try:
                found[disk] = Spans.of(overlay.changed()).clipped(0, size)
            finally:
                overlay.close()
        return found

    async def again(self, name: str) -> None:
        """Start the exporter of an export that is there."""
        Exported.load(self.at(name))
        await self._start(self.at(name))

    async def complete(self, name: str, view: View, progress: Progress) -> None:
        """Have the disks whole beside their overlays, so that the log is needed no more; the machine runs on.

        Its disks stop for the moment in which the exporter is replaced.
        """
        where, note = self.at(name), Exported.load(self.at(name))
        if note.whole:
            return
        sizes = {disk.name: await view.data_bytes(disk) for disk in view.disks}
        total, done = sum(sizes.values()), 0
        for disk in view.disks:
            if not (where / raw_name(disk.name)).exists():  # it gets its name when it is complete
                counted = shifted(progress, done, total)
                await write_raw_file(view, disk, where / raw_name(disk.name), progress=counted)
            done += sizes[disk.name]
        replace(note, whole=True).save(where)
        await self.end(name)
        await self._start(where)

    async def end(self, name: str) -> None:
        """End the exporter, its overlays durable; one that is gone is fine.

        Raises:
            PermanentError: it does not end.
        """
        where = self.at(name)
        for number in (signal.SIGTERM, signal.SIGKILL):
            process = running(where)
            if process is None:
                return
            with suppress(ProcessLookupError):
                os.kill(process, number)
            deadline = time.monotonic() + END_SECONDS
            while running(where) is not None and time.monotonic() < deadline:  # noqa: ASYNC110 - another process
                await asyncio.sleep(_POLL_SECONDS)
        if running(where) is not None:
            raise PermanentError(f"the exporter in {where} does not end", hint="look at that process")

    async def remove(self, name: str) -> None:
        """End the exporter and remove its directory: what the machine wrote is gone. One that is not there is fine."""
        where = self.at(name)
        if not where.exists():
            return
        await self.end(name)
        await asyncio.to_thread(shutil.rmtree, where)

    async def _start(self, where: Path) -> None:
        if running(where) is None:
            with (where / LOG).open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *("setsid", "--fork", sys.executable, "-m", "recovery.worker.exporter", str(where)),
                    stdin=DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                )
            await process.wait()
        deadline, was_there = time.monotonic() + READY_SECONDS, False
        while not await _answers(where / SOCKET):
            is_there = running(where) is not None
            if was_there and not is_there:
                raise PermanentError(f"the exporter in {where} ended", hint=_last_words(where))
            was_there |= is_there
            if time.monotonic() > deadline:
                raise TransientError(f"the exporter in {where} does not serve yet", hint=_last_words(where))
            await asyncio.sleep(_POLL_SECONDS)


def overlay_name(disk: str) -> str:
    """The overlay's file; a disk's name may hold what a file's may not."""
    return f"{disk.replace('/', '_')}.overlay"


def raw_name(disk: str) -> str:
    """The whole disk's file."""
    return f"{disk.replace('/', '_')}.raw"


def running(where: Path) -> int | None:
    """The process that holds a directory's pid file locked; None if there is none."""
    try:
        with (where / PROCESS).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        text = (where / PROCESS).read_text().strip()
        return int(text) if text.isdigit() else None


async def _answers(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    return True


def _last_words(where: Path) -> str:
    try:
        return (where / LOG).read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
