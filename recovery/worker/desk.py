"""A job in hand: what the config server is told of it, and what it says to that.

Everything that was found is said before it is acted on (`note`), so that whoever takes the job over knows of it. The
config server may be away for as long as it likes: what has to be said is said again, and the work waits at that place.
When it answers that the job is somebody else's (`lost`), nothing more may be done for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from replicar.clock import Clock
from replicar.control.client import ControlClient
from replicar.control.message import ErrorReport
from replicar.control.messages import Claim, ClaimedMachine, Job, JobEnd, JobReport, JobState, StepReport
from replicar.errors import FencedError, ReplicarError, TransientError

#: A lease is good for three times as long.
RENEW_SECONDS: Final = 15.0
#: How often progress is told while there is some.
PROGRESS_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 10.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Desk:
    """One claimed job. `result`: what was found so far, by this worker or an earlier one; `host`: where it works."""

    def __init__(self, control: ControlClient, claim: Claim, clock: Clock, *, host: str = "") -> None:
        assert claim.job is not None
        assert claim.machine is not None
        self.control = control
        self.clock = clock
        self.job: Job = claim.job
        self.machine: ClaimedMachine = claim.machine
        self.before = claim.before
        self.target = claim.target
        self.host = host
        self.fence = claim.fence
        self.result = dict(claim.job.result)
        self.cancel_requested = claim.job.cancel_requested
        self.lost = False
        self.ended: JobState | None = None  # as the config server was told
        self._step = ""
        self._counted = (0, 0)
        self._news = asyncio.Event()
        self._speaking = asyncio.Lock()

    async def begin(self, step: str) -> None:
        """A step begins."""
        self._step, self._counted = step, (0, 0)
        _log.info("job %s (%s of %s): %s", self.job.id, self.job.kind, self.job.machine, step)
        await self._report(StepReport(name=step, state=JobState.IN_PROGRESS))

    async def done(self, message: str = "") -> None:
        """The step that was begun has reached what it must have reached."""
        done, total = self._counted
        report = StepReport(
            name=self._step, state=JobState.SUCCEEDED, done=total or done, total=total, message=message[:500]
        )
        self._step = ""
        await self._report(report)

    def progress(self, done: int, total: int) -> None:
        """How far the step is; told to the config server in a while."""
        self._counted = (done, total)
        self._news.set()

    async def note(self, **found: str | int) -> None:
        """Keep what was found for whoever goes on."""
        news = {name: str(value)[:512] for name, value in found.items()}
        self.result |= news
        await self._say(lambda: self.control.report(self.job.id, JobReport(fence=self.fence, result=news)))

    async def finish(self, state: JobState, error: ReplicarError | None = None, *, retry_seconds: float = 30.0) -> None:
        """The job has ended, or has to wait."""
        report = ErrorReport.of("recovery worker", error.as_dict()) if error is not None else None
        end = JobEnd(fence=self.fence, state=state, error=report, retry_seconds=retry_seconds)
        _log.info(
            "job %s (%s of %s): %s%s",
            self.job.id,
            self.job.kind,
            self.job.machine,
            state,
            f": {error}" if error else "",
        )
        await self._say(lambda: self.control.finish(self.job.id, end))
        self.ended = state

    async def hold(self) -> int:
        """Take the machine from its process server; its epoch from here on."""
        return (await self._say(lambda: self.control.hold(self.job.id, self.fence))).epoch

    async def release(self) -> int:
        """Give the machine back to a process server; its epoch from here on."""
        return (await self._say(lambda: self.control.release(self.job.id, self.fence))).epoch

    async def renew(self) -> None:
        """Keep the job, and tell of progress, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                pass
            else:
                await self.clock.sleep(PROGRESS_SECONDS)
            self._news.clear()
            step = self._step
            steps = (
                (StepReport(name=step, state=JobState.IN_PROGRESS, done=self._counted[0], total=self._counted[1]),)
                if step
                else ()
            )
            await self._report(*steps)

    async def _report(self, *steps: StepReport) -> None:
        report = JobReport(fence=self.fence, steps=steps)
        directive = await self._say(lambda: self.control.report(self.job.id, report))
        self.cancel_requested = directive.cancel_requested

    async def _say(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Say it until it is heard; in the order in which things were said."""
        pause = 0.5
        async with self._speaking:
            while True:
                try:
                    return await call()
                except TransientError as error:
                    _log.warning("the config server does not answer: %s", error)
                    await self.clock.sleep(max(pause, error.retry_after_seconds or 0.0))
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                except FencedError:
                    self.lost = True
                    raise
