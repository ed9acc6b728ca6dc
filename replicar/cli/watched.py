"""A job as it changes: looked at whenever the config server tells of it, and every second where it can't be heard.

What is told is that there is something to see; what there is, the job says itself. So a lost event costs a few seconds
and nothing else: every sign of life of the line is a reason to look, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final

from replicar.control.client import ControlClient
from replicar.control.messages import Event, EventKind, Job
from replicar.errors import PermanentError, TransientError

#: How often a job is looked at while nobody tells of it.
LOOK_SECONDS: Final = 1.0
#: Such looks before it is tried again to listen.
LOOKS: Final = 15
#: How long a config server that is away is waited for.
AWAY_SECONDS: Final = 300.0


async def watched(control: ControlClient, job: Job) -> AsyncIterator[Job]:
    """The job as it stands, again and again, until it has ended.

    Raises:
        TransientError: the config server has been away for five minutes.
    """
    yield job
    if job.state.has_ended:
        return
    async with aclosing(_looks(control, job)) as looks:
        async for job in looks:
            yield job
            if job.state.has_ended:
                return


async def _looks(control: ControlClient, job: Job) -> AsyncGenerator[Job]:
    heard = time.monotonic()
    while True:
        try:
            async with control.events(job.machine) as events:
                yield await control.job(job.id)
                heard = time.monotonic()
                async for event in events:
                    if _concerns(job, event):
                        yield await control.job(job.id)
                        heard = time.monotonic()
        except TransientError:
            if time.monotonic() - heard > AWAY_SECONDS:
                raise
        except PermanentError as error:
            if error.fields.get("status") != 404:  # a server that tells no events yet
                raise
        for _ in range(LOOKS):
            await asyncio.sleep(LOOK_SECONDS)
            try:
                found = await control.job(job.id)
            except TransientError:
                if time.monotonic() - heard > AWAY_SECONDS:
                    raise
                continue
            heard = time.monotonic()
            yield found


def _concerns(job: Job, event: Event | None) -> bool:
    if event is None or event.kind is EventKind.MISSED:
        return True
    return event.job is not None and event.job.id == job.id
