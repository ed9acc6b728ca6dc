"""The steps of failback and of protecting again.

Both sides agreed at the point that was failed over to. Since then the machine at home may have gone on for a while, and
the failed-over one went on elsewhere; what either wrote has to be carried home, and nothing else can differ:

    home    the stream is given back, so that the agent stores what it still has; then the log's newest state and the
            point's differ in just what was written at home (`settled`, `differing`)
    there   the overlay's sectors; of a managed disk the pages that Azure says were written

With the option `compare=bytes` the histories are not asked: both disks are read in full, and what differs is written.
That is for a machine at home that is new, or whose agent is gone.

The way home usually goes through the agent (an NBD destination): what is written is captured like any other write, so
the replica follows, and protecting again has nothing to copy.

What was found is kept in files (`spans`, `done`) below the worker's directory, for whoever goes on after a death.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import numpy as np

from recovery.failback.carry import carry, check_fits, verify
from recovery.failback.destinations import named, open_destination
from recovery.failback.histories import PointDisk, written_between
from recovery.failback.spans import Spans
from recovery.points import AtSequence
from recovery.view import View
from recovery.worker.desk import Desk
from recovery.worker.hands import SHUT_DOWN_SECONDS, Hands
from recovery.worker.logs import open_view
from recovery.worker.made import check_options, made_name, makers
from recovery.worker.outward import check_host, last_made, settled
from recovery.worker.rounds import Work
from recovery.worker.settings import load_settings
from replicar.control.files import make_directory, write_file
from replicar.errors import PermanentError
from replicar.formats.record import Disk
from replicar.storage.store import PageBlobStore
from replicar.storage.target import open_store

FAILBACK_OPTIONS: Final = frozenset({"compare", "verify", "storage_settings", "shut_down_seconds"})
#: What the agent at home may take to store what it still has, before the job is put aside for a while.
SETTLE_SECONDS: Final = 120.0
MARK_SECONDS: Final = 60.0
#: Of the notes: the point's disks.
_DISKS: Final = "disks.json"


class Homeward:
    """One job's steps."""

    def __init__(self, desk: Desk, hands: Hands, store: PageBlobStore, directory: Path) -> None:
        self._desk, self._hands, self._store = desk, hands, store
        self._job = desk.job
        self._options = desk.job.parameters.options
        self._notes = directory / "failback" / desk.job.id

    def works(self) -> Mapping[str, Work]:
        """By step; failback's and re-protection's `prerequisites` are told apart by the job."""
        is_failback = bool(self._job.parameters.destination)
        return {
            "prerequisites": self.prerequisites if is_failback else self.agent_is_there,
            "shut-down": self.shut_down,
            "compare": self.compare,
            "copy": self.copy,
            "verify": self.verify,
            "switch": self.switch,
            "release": self.release,
            "catch-up": self.catch_up,
        }

    # --- failback ---

    async def prerequisites(self) -> str:
        check_host(self._desk)
        check_options(self._options, FAILBACK_OPTIONS)
        if self._options.get("compare", "histories") not in ("histories", "bytes"):
            raise PermanentError("the option compare is histories or bytes", hint="leave it out for histories")
        if self._options.get("verify", "changed") not in ("changed", "all"):
            raise PermanentError("the option verify is changed or all", hint="leave it out for changed")
        if not self._options.get("shut_down_seconds", "1").isdigit():
            raise PermanentError("the option shut_down_seconds is a whole number", hint="leave it out for two minutes")
        view = await self._at_point()
        await self._hands.check_way_home(made_name(last_made(self._desk.before)), view.disks)
        async with AsyncExitStack() as stack:
            store = await self._account(stack)
            for disk in view.disks:
                place = named(self._job.parameters.destination, disk.name, len(view.disks))
                check_fits(PointDisk(view, disk), await open_destination(place, stack, store), disk.name)
        return f"{len(view.disks)} disk(s) fit"

    async def shut_down(self) -> str:
        check_host(self._desk)
        seconds = float(self._options.get("shut_down_seconds", SHUT_DOWN_SECONDS))
        ended = await self._hands.shut_down(made_name(last_made(self._desk.before)), seconds)
        return "it ended by itself" if ended else f"it did not end within {seconds:.0f} s, and was switched off"

    async def compare(self) -> str:
        check_host(self._desk)
        view = await self._at_point()
        if self._options.get("compare", "histories") == "bytes":
            spans = {disk.name: Spans.whole(disk.size_bytes) for disk in view.disks}
        else:
            spans = await self._hands.diverged(made_name(last_made(self._desk.before)), view, self._desk.progress)
            await self._desk.release()
            now = await settled(self._desk, self._store, SETTLE_SECONDS)
            for disk in view.disks:
                home = await written_between(view, now, disk)
                spans[disk.name] = spans[disk.name].union(home).clipped(0, disk.size_bytes)
        make_directory(self._notes)
        write_file(self._notes / _DISKS, _said(view.disks))
        for name, found in spans.items():
            _save(self._notes / f"{_file(name)}.spans", found)
        total = sum(found.total_bytes for found in spans.values())
        await self._desk.note(diverged_bytes=total, host=self._desk.host)  # whose files the rest of the job needs
        return f"{total:,} bytes may differ"

    async def copy(self) -> str:
        check_host(self._desk)
        looked_at = written = 0
        async with AsyncExitStack() as stack:
            origins = await self._hands.origins(made_name(last_made(self._desk.before)), self._disks(), stack)
            store, spans = await self._account(stack), {name: self._spans(name) for name in origins}
            total, before = sum(found.total_bytes for found in spans.values()), 0
            for name, origin in origins.items():
                place = named(self._job.parameters.destination, name, len(origins))
                destination = await open_destination(place, stack, store)
                check_fits(origin, destination, name)
                done = self._notes / f"{_file(name)}.done"

                async def checkpoint(offset: int, done: Path = done) -> None:
                    write_file(done, str(offset).encode())

                moved = await carry(
                    spans[name],
                    origin,
                    destination,
                    compare=self._options.get("compare") == "bytes",
                    start_at=int(done.read_text()) if done.exists() else 0,
                    checkpoint=checkpoint,
                    progress=lambda count, _, before=before: self._desk.progress(before + count, total),  # type: ignore[misc]
                )
                before += spans[name].total_bytes
                looked_at, written = looked_at + moved.looked_at, written + moved.written + moved.zeroed
        await self._desk.note(moved_bytes=written)
        return f"{written:,} bytes written, of {looked_at:,} looked at"

    async def verify(self) -> str:
        check_host(self._desk)
        async with AsyncExitStack() as stack:
            origins = await self._hands.origins(made_name(last_made(self._desk.before)), self._disks(), stack)
            store = await self._account(stack)
            for name, origin in origins.items():
                place = named(self._job.parameters.destination, name, len(origins))
                is_all = self._options.get("verify") == "all"
                spans = Spans.whole(origin.size_bytes) if is_all else self._spans(name)
                destination = await open_destination(place, stack, store)
                await verify(spans, origin, destination, disk=name, progress=self._desk.progress)
        return "both sides are equal"

    async def switch(self) -> str:
        if await self._hands.is_running(made := made_name(last_made(self._desk.before))):
            raise PermanentError(
                f"the machine {made} runs: somebody has started it since its disks were read",
                hint="what it wrote since is not at home: ask for the failback again",
            )
        return "the machine may be started at home"

    # --- protecting again ---

    async def agent_is_there(self) -> str:
        check_options(self._options, frozenset())
        summary = await self._desk.control.machine(self._job.machine)
        if not summary.online:
            raise PermanentError(
                f"the agent of machine {self._job.machine} is not there",
                hint="start it at home, then ask for this again: `replicar reprotect`",
            )
        return ""

    async def release(self) -> str:
        return f"epoch {await self._desk.release()}"

    async def catch_up(self) -> str:
        check_host(self._desk)
        await settled(self._desk, self._store, SETTLE_SECONDS)
        name = f"home-{self._job.id[:8]}"
        await self._desk.control.mark(
            self._job.machine, name, wait_stored=True, wait_seconds=MARK_SECONDS, command_id=self._job.id
        )
        for job in makers(self._desk.before):
            await self._hands.remove_machine(made_name(job))
            await self._hands.remove_disks(made_name(job))
        return f"the point {name} is in storage"

    async def _at_point(self) -> View:
        failover = last_made(self._desk.before)
        request = AtSequence(int(failover.result["sequence"]))
        return await open_view(self._desk.control, self._store, self._job.machine, request)

    async def _account(self, stack: AsyncExitStack) -> PageBlobStore | None:
        file = self._options.get("storage_settings")
        if file is None:
            return None
        return await stack.enter_async_context(open_store(load_settings(Path(file)).storage))

    def _disks(self) -> list[Disk]:
        rows = json.loads(self._found(_DISKS))
        return [Disk(index=index, name=name, size_bytes=size) for index, name, size in rows]

    def _spans(self, disk: str) -> Spans:
        rows = np.frombuffer(self._found(f"{_file(disk)}.spans"), dtype=np.int64).reshape(-1, 2)
        return Spans.of((int(start), int(end - start)) for start, end in rows)

    def _found(self, name: str) -> bytes:
        try:
            return (self._notes / name).read_bytes()
        except FileNotFoundError:
            raise PermanentError(
                "what differs between both sides is not in this worker's directory (any more)",
                hint="cancel the failback and ask for it again",
                path=str(self._notes / name),
            ) from None


def _save(path: Path, spans: Spans) -> None:
    write_file(path, np.column_stack((spans.start, spans.end)).astype(np.int64).tobytes())


def _said(disks: Sequence[Disk]) -> bytes:
    return json.dumps([[disk.index, disk.name, disk.size_bytes] for disk in disks]).encode()


def _file(disk: str) -> str:
    return disk.replace("/", "_")
