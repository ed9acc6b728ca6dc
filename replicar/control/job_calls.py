"""Jobs over the config server's API: what operators ask, and what recovery workers say; parts of `ControlClient`."""

from __future__ import annotations

import uuid

from replicar.control.caller import Caller, machine_path
from replicar.control.messages import (
    Claim,
    ClaimRequest,
    Drill,
    DrillList,
    HoldRequest,
    Job,
    JobCancel,
    JobDirective,
    JobEnd,
    JobKind,
    JobList,
    JobParameters,
    JobReport,
    JobRequest,
    MachineHold,
)


class JobCalls(Caller):
    """What an operator asks of jobs."""

    async def make_job(
        self, machine: str, kind: JobKind, parameters: JobParameters | None = None, *, job_id: str | None = None
    ) -> Job:
        """Make a job for a machine. Ask again with the same `job_id` when the answer was lost: it is made once.

        Raises:
            ConflictError: another job of the machine is in its way, or the machine is in no state for it.
            PermanentError: something of what is asked for is not there, or not read by this kind of job.
        """
        request = JobRequest(
            id=job_id or str(uuid.uuid4()), kind=kind, parameters=parameters if parameters else JobParameters()
        )
        return await self._post(f"{machine_path(machine)}/jobs", request, Job)

    async def jobs(self, machine: str | None = None, *, going_only: bool = False) -> JobList:
        """Jobs, newest first."""
        query = {"going": "yes"} if going_only else {}
        return await self._get(f"{machine_path(machine)}/jobs" if machine else "/jobs", JobList, query=query)

    async def job(self, job_id: str) -> Job:
        return await self._get(f"/jobs/{job_id}", Job)

    async def cancel_job(self, job_id: str) -> Job:
        """Ask a job to stop; what it leaves its machine in, docs/jobs.md tells.

        Raises:
            ConflictError: it has ended otherwise, or ends as it ends.
        """
        return await self._post(f"/jobs/{job_id}/cancel", JobCancel(), Job)

    async def drills(self, machine: str) -> tuple[Drill, ...]:
        """The machine's drills that count, newest first."""
        return (await self._get(f"{machine_path(machine)}/drills", DrillList)).drills


class WorkerCalls(Caller):
    """What a recovery worker says; docs/jobs.md is the protocol."""

    async def claim(self, request: ClaimRequest) -> Claim:
        """Claim the oldest job of these kinds, waiting for one up to `request.wait_seconds`."""
        return await self._post("/worker/claim", request, Claim, wait_seconds=request.wait_seconds)

    async def report(self, job_id: str, report: JobReport) -> JobDirective:
        """Say how far a job is, and go on having it.

        Raises:
            FencedError: somebody else has it by now: stop at once.
        """
        return await self._post(f"/worker/jobs/{job_id}/report", report, JobDirective)

    async def finish(self, job_id: str, end: JobEnd) -> Job:
        """Say how a job ended, or that it has to wait. Say it again when the answer was lost.

        Raises:
            FencedError: somebody else has it by now.
        """
        return await self._post(f"/worker/jobs/{job_id}/finish", end, Job)

    async def hold(self, job_id: str, fence: int) -> MachineHold:
        """Take the job's machine from its process server, under a new epoch; again: changes nothing.

        Raises:
            FencedError: the job is somebody else's by now.
        """
        return await self._post(f"/worker/jobs/{job_id}/hold", HoldRequest(fence=fence), MachineHold)

    async def release(self, job_id: str, fence: int) -> MachineHold:
        """Give the job's machine back to a process server, under a new epoch; again: changes nothing.

        Raises:
            FencedError: the job is somebody else's by now.
            PermanentError: no process server is alive.
        """
        return await self._post(f"/worker/jobs/{job_id}/release", HoldRequest(fence=fence), MachineHold)
