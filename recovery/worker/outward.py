"""The steps of drills and failovers, and of what ends them: clean-up, another point, cancelling, committing.

Each is a few lines over the hands; docs/jobs.md says what it must have reached. A job that goes on finds its point in
what it noted, never chooses again: `latest` of a second try would be another moment than that of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from recovery.fence import fence
from recovery.points import AtSequence, Latest, Request
from recovery.view import View
from recovery.worker.desk import Desk
from recovery.worker.hands import Hands
from recovery.worker.logs import as_request, open_view
from recovery.worker.made import check_options, made_name, makers
from recovery.worker.rounds import Work
from recovery.worker.source import shut_down_source
from replicar.control.messages import Job, JobKind, PointKind
from replicar.errors import PermanentError, TransientError
from replicar.moments import format_moment
from replicar.storage.store import PageBlobStore

#: What a source that is still there may take to store what it has captured, before it is fenced.
DRAIN_SECONDS: Final = 30.0
#: What a failover asks besides what the hands read: a program that shuts the source down, and how long it may take.
SOURCE_OPTIONS: Final = frozenset({"shut_down_program", "shut_down_seconds"})


class Outward:
    """One job's steps."""

    def __init__(self, desk: Desk, hands: Hands, store: PageBlobStore) -> None:
        self._desk, self._hands, self._store = desk, hands, store
        self._job = desk.job
        self._isolated = desk.job.kind is JobKind.TEST_FAILOVER
        self._opened: View | None = None

    def works(self) -> Mapping[str, Work]:
        """By step."""
        return {
            "prerequisites": self.prerequisites,
            "shut-down-source": self.shut_down_source,
            "fence": self.fence,
            "point": self.point,
            "network": self.network,
            "disks": self.disks,
            "machine": self.machine,
            "check": self.check,
            "remove-machine": self.remove_machine,
            "remove-disks": self.remove_disks,
            "remove-network": self.remove_network,
            "release": self.release,
            "complete": self.complete,
        }

    async def prerequisites(self) -> str:
        check_options(self._job.parameters.options, self._hands.reads | SOURCE_OPTIONS)
        view = await self._view(await as_request(self._desk.control, self._job.machine, self._job.parameters.point))
        findings = await self._hands.findings(made_name(self._job), self._job, view, isolated=self._isolated)
        blocking = [found for found in findings if found.blocking]
        if blocking:
            raise PermanentError(blocking[0].what, hint=blocking[0].hint)
        return "; ".join(found.what for found in findings)

    async def shut_down_source(self) -> str:
        if not self._job.parameters.shut_down_source:
            return "not asked for"
        return await shut_down_source(self._job)

    async def fence(self) -> str:
        if "epoch" not in self._desk.result and self._is_latest():
            await self._drained()
        epoch = await self._desk.hold()
        await fence(self._store, self._desk.machine.id, epoch)
        await self._desk.note(epoch=epoch)
        return f"epoch {epoch}"

    async def point(self) -> str:
        if "sequence" not in self._desk.result:
            request = await as_request(self._desk.control, self._job.machine, self._job.parameters.point)
            place = (await self._view(request)).state.place
            await self._desk.note(sequence=place.sequence, time_ns=place.time_ns)
        sequence, time_ns = self._desk.result["sequence"], int(self._desk.result["time_ns"])
        return f"sequence {sequence}, {format_moment(time_ns)}"

    async def network(self) -> str:
        return await self._hands.network(self._job)

    async def disks(self) -> str:
        made = made_name(self._job)
        check_host(self._desk)
        where = {"host": self._desk.host} if self._hands.is_local else {}
        await self._desk.note(machine=made, compute=self._hands.name, **where, **self._hands.notes)
        return await self._hands.give_disks(made, self._job, await self._at_point(), self._desk.progress)

    async def machine(self) -> str:
        await self._hands.start(made_name(self._job), self._job, isolated=self._isolated)
        return made_name(self._job)

    async def check(self) -> str:
        proof = await self._hands.prove(made_name(self._job), self._job, isolated=self._isolated)
        said = f"; the check: {proof.check_said}" if proof.check_said else ""
        return f"{proof.banner or 'it runs'} after {proof.seconds:.1f} s{said}"

    async def remove_machine(self) -> str:
        check_host(self._desk)
        for job in makers(self._desk.before):
            await self._hands.remove_machine(made_name(job))
        return ""

    async def remove_disks(self) -> str:
        check_host(self._desk)
        for job in makers(self._desk.before):
            await self._hands.remove_disks(made_name(job))
        return ""

    async def remove_network(self) -> str:
        return "it went with the machine"

    async def release(self) -> str:
        return f"epoch {await self._desk.release()}"

    async def complete(self) -> str:
        check_host(self._desk)
        failover = last_made(self._desk.before)
        view = await self._view(AtSequence(int(failover.result["sequence"])))
        await self._hands.complete(made_name(failover), view, self._desk.progress)
        return ""

    def _is_latest(self) -> bool:
        choice = self._job.parameters.point
        return choice is None or choice.kind is PointKind.LATEST

    async def _drained(self) -> None:
        """Let a machine that is still there store what it has captured: nothing of it is lost then. For a while only:
        one that is gone, or goes on writing, must not hold up a failover."""
        deadline = self._desk.clock.monotonic() + DRAIN_SECONDS
        while self._desk.clock.monotonic() < deadline:
            summary = await self._desk.control.machine(self._job.machine)
            if not summary.online or summary.stored_sequence == summary.captured_sequence:
                return
            await self._desk.clock.sleep(0.5)

    async def _at_point(self) -> View:
        return await self._view(AtSequence(int(self._desk.result["sequence"])))

    async def _view(self, request: Request) -> View:
        opened = self._opened
        if isinstance(request, AtSequence) and opened is not None and opened.state.place.sequence == request.sequence:
            return opened
        self._opened = await open_view(self._desk.control, self._store, self._job.machine, request)
        return self._opened


def check_host(desk: Desk) -> None:
    """Leave what was made on another worker's host to that one.

    Raises:
        TransientError: this job's, or an earlier one's, machine is there.
    """
    for job in (desk.job, *makers(desk.before)):
        host = job.result.get("host", desk.host)
        if host != desk.host:
            raise TransientError(
                f"the machine of {job.kind} {job.id} is on another worker's host",
                hint="have that worker run: only it can go on with this job",
                host=host,
            )


def last_made(before: tuple[Job, ...]) -> Job:
    """The failover, or change of point, whose machine lives.

    Raises:
        PermanentError: there is none in the job's past.
    """
    for job in makers(before):
        if "sequence" in job.result and job.kind is not JobKind.TEST_FAILOVER:
            return job
    raise PermanentError(
        "the failover that this job builds on is not known any more",
        hint="look at `replicar jobs list`; bring the disk home by hand",
    )


async def settled(desk: Desk, store: PageBlobStore, seconds: float) -> View:
    """The machine at home as it is now: everything that it captured is in storage, and its order is known.

    Raises:
        TransientError: that did not come about in time.
    """
    deadline = desk.clock.monotonic() + seconds
    while True:
        summary = await desk.control.machine(desk.job.machine)
        if (
            summary.online
            and summary.process_server is not None
            and summary.stored_sequence == summary.captured_sequence
        ):
            points = await desk.control.points(desk.job.machine)
            if points.ordered_from is not None and points.ordered_from[0] <= summary.stored_sequence:
                return await open_view(desk.control, store, desk.job.machine, Latest())
        if desk.clock.monotonic() > deadline:
            raise TransientError(
                f"machine {desk.job.machine} has not stored everything that it captured",
                hint="is its agent up, and its process server? `replicar machines` shows how far it is",
            )
        await desk.clock.sleep(0.5)
