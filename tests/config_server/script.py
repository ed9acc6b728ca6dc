"""A recovery worker that is a script: it does nothing to disks, and says the protocol's sentences as a story needs."""

from __future__ import annotations

from config_server.jobs.plan import PLANS
from replicar.control.client import ControlClient
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    Claim,
    ClaimRequest,
    Job,
    JobEnd,
    JobKind,
    JobParameters,
    JobReport,
    JobState,
    LifeState,
    StepReport,
)
from tests.config_server.support import Cast

ALL = tuple(kind for kind in JobKind if PLANS[kind].by_worker)
FAULT = ErrorReport(error="PermanentError", message="the hypervisor is away", hint="start it")


class Script:
    """A recovery worker that says what it is told to say."""

    def __init__(self, client: ControlClient, instance: str = "one") -> None:
        self.client = client
        self.instance = instance
        self.claimed = Claim()

    async def claim(self, *kinds: JobKind, wait_seconds: float = 0.0, job: str | None = None) -> Job | None:
        request = ClaimRequest(instance=self.instance, kinds=kinds or ALL, wait_seconds=wait_seconds, job=job)
        self.claimed = await self.client.claim(request)
        return self.claimed.job

    async def must_claim(self, *kinds: JobKind) -> Job:
        job = await self.claim(*kinds, wait_seconds=20)
        assert job is not None
        return job

    async def say(self, step: str, state: JobState, **fields: int | str) -> bool:
        assert self.claimed.job is not None
        report = StepReport.model_validate({"name": step, "state": state, **fields})
        said = JobReport(fence=self.claimed.fence, steps=(report,))
        return (await self.client.report(self.claimed.job.id, said)).cancel_requested

    async def do_steps(self) -> None:
        assert self.claimed.job is not None
        for step in self.claimed.job.steps:
            if step.state is not JobState.SUCCEEDED:
                await self.say(step.name, JobState.SUCCEEDED)

    async def end(self, state: JobState = JobState.SUCCEEDED, **fields: object) -> Job:
        assert self.claimed.job is not None
        said = JobEnd.model_validate({"fence": self.claimed.fence, "state": state, **fields})
        return await self.client.finish(self.claimed.job.id, said)

    async def carry_out(self, kind: JobKind) -> Job:
        await self.must_claim(kind)
        await self.do_steps()
        return await self.end()


async def life(cast: Cast) -> LifeState:
    return (await cast.operator.machine("db1")).life


async def drill(cast: Cast, **fields: object) -> Job:
    return await cast.operator.make_job("db1", JobKind.TEST_FAILOVER, JobParameters.model_validate(fields))
