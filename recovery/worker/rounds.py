"""Carrying a job out: its steps in order, beginning at the first that has not succeeded, while the lease is renewed.

What a step raises decides how the job goes on:

    TransientError        suspended: it is claimed again in a while, and goes on at that step
    any other of ours     failed, with that error
    an OSError            failed: this host can't do it (no space, no right)
    the job is lost       nothing more is said or done

A step must be able to run again after it was cut off anywhere. It is asked between steps whether to go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from recovery.worker.desk import Desk
from replicar.control.messages import JobState
from replicar.errors import FencedError, PermanentError, ReplicarError, TransientError

#: A step: what it says when it is done.
Work = Callable[[], Awaitable[str]]
RETRY_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


async def carry_out(desk: Desk, works: Mapping[str, Work], stop: asyncio.Event | None = None) -> None:
    """Carry out the job on the desk, to its end or as far as it goes; when `stop` is set, to the end of the step."""
    told = stop or asyncio.Event()
    steps, renewing = asyncio.create_task(_steps(desk, works, told)), asyncio.create_task(desk.renew())
    try:
        await asyncio.wait((steps, renewing), return_when=asyncio.FIRST_COMPLETED)
        if not steps.done():  # only an error ends renewing
            steps.cancel()
            await asyncio.wait((steps,))
        for task in (steps, renewing):
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
    except FencedError as error:
        if not desk.lost:
            raise
        _log.warning("job %s is somebody else's by now: %s", desk.job.id, error)
    finally:
        for task in (steps, renewing):
            task.cancel()
        await asyncio.gather(steps, renewing, return_exceptions=True)


async def _steps(desk: Desk, works: Mapping[str, Work], stop: asyncio.Event) -> None:
    for step in desk.job.steps:
        if step.state is JobState.SUCCEEDED:
            continue
        if desk.cancel_requested:
            await desk.finish(JobState.CANCELLED)
            return
        if stop.is_set():
            error = TransientError("its worker was stopped", hint="it goes on when a worker runs again")
            await desk.finish(JobState.SUSPENDED, error, retry_seconds=0.0)
            return
        try:
            if step.name not in works:
                raise PermanentError(
                    f"this worker does not know the step {step.name!r} of a {desk.job.kind}",
                    hint="config server and worker are of different versions: compare `--version` on both",
                )
            await desk.begin(step.name)
            said = await works[step.name]()
            await desk.done(said)
        except TransientError as error:
            wait = max(RETRY_SECONDS, error.retry_after_seconds or 0.0)
            await desk.finish(JobState.SUSPENDED, error, retry_seconds=wait)
            return
        except ReplicarError as error:
            if desk.lost:
                raise
            await desk.finish(JobState.FAILED, error)
            return
        except OSError as error:
            hint = "look at this worker's host: space, rights, what is installed"
            await desk.finish(JobState.FAILED, PermanentError(f"the step {step.name} failed here: {error}", hint=hint))
            return
    await desk.finish(JobState.SUCCEEDED)
