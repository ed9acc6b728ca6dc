"""From Azure home, as jobs: what the machine wrote there and what was written at home is carried, and no more.

All is real but Azure: Resource Manager, and what serves links to managed disks, are stand-ins over a real Azurite."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from recovery.worker.desk import Desk
from replicar.control.messages import (
    Job,
    JobKind,
    JobParameters,
    JobState,
    LifeState,
    MachineProgress,
    MarkReport,
)
from replicar.formats import vhd
from tests.config_server.script import life
from tests.recovery.compute.managed_disks import ManagedDisks
from tests.recovery.worker.azure_stage import Stage

PAGE = 512
OVER = JobParameters(options={"banner": "login:"})


@dataclass
class Story:
    """A machine that was failed over to Azure and committed, and its disks at home, as files."""

    stage: Stage
    failover: Job
    directory: Path

    @property
    def there(self) -> ManagedDisks:
        assert self.stage.azure.content is not None
        return self.stage.azure.content

    @property
    def managed(self) -> list[str]:
        return [path.rpartition("/")[2] for path in self.stage.azure.paths("disks")]

    def home(self, number: int) -> Path:
        return self.directory / f"disk{number}.img"

    def lay_down(self) -> None:
        """The disks at home hold what was last written at home."""
        for index, data in self.stage.stored.builder.disks.items():
            self.home(index).write_bytes(data)

    async def writes_there(self) -> int:
        """The machine in Azure writes: data, zeros over data, the same bytes as before; returns what differs by it."""
        draw, (first, second) = random.Random(11), self.managed
        for page in (3, 4, 5, 40, 199, 299):
            await self.there.write(first, page * PAGE, draw.randbytes(PAGE))
        await self.there.write(first, 100 * PAGE, bytes(2 * PAGE))
        await self.there.write(first, 120 * PAGE, (await self.there.content(first))[120 * PAGE : 121 * PAGE])
        await self.there.write(second, 0, draw.randbytes(PAGE))
        return 9 * PAGE

    async def writes_at_home(self) -> int:
        """The machine at home had gone on for a while."""
        builder = self.stage.stored.builder
        await builder.begin_run(epoch=int(self.failover.result["epoch"]) + 1)
        builder.write(0, 40 * PAGE, random.Random(12).randbytes(PAGE))  # the machine in Azure wrote here, too
        builder.write(1, 8 * PAGE, random.Random(13).randbytes(2 * PAGE))
        await builder.seal()
        return 3 * PAGE

    async def go_home(self, **options: str) -> Job:
        destination = str(self.directory / "{disk}.img")
        async with self.agent():
            return await self.stage.job(JobKind.FAILBACK, JobParameters(destination=destination, options=options))

    async def is_home(self) -> bool:
        """Whether both sides are equal; and nobody may read the disks in Azure any more."""
        pairs = [
            (self.home(index).read_bytes(), await self.there.content(name)) for index, name in enumerate(self.managed)
        ]
        return not self.there.links and all(here == there[: len(here)] for here, there in pairs)

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        """The agent at home, and a process server: they report what there is, and make the marks they are asked for."""
        going = asyncio.create_task(self._report())
        try:
            yield
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)

    async def _report(self) -> None:
        cast, builder = self.stage.stored.cast, self.stage.stored.builder
        marks: list[MarkReport] = []
        while True:
            commands = await cast.machine.agent_heartbeat(
                cast.house.machine_heartbeat(
                    captured_sequence=builder.sequence - 1, ordered_from=(1, 1), marks=marks, wait_seconds=0.2
                )
            )
            for command in commands.commands:
                if command.id not in {mark.command_id for mark in marks}:
                    at = builder.mark(command.name)
                    await builder.seal()
                    marks.append(MarkReport(name=command.name, sequence=at, time_ns=at, command_id=command.id))
            assigned = await cast.server.process_server_heartbeat(cast.house.server_heartbeat())
            if assigned.assignments:
                progress = MachineProgress(
                    machine_id=cast.machine_id,
                    stored_sequence=builder.sequence - 1,
                    stored_segment=builder.number - 1,
                    stored_digest=builder.previous.hex(),
                )
                await cast.server.process_server_heartbeat(cast.house.server_heartbeat(progress))


@pytest.fixture
async def story(stage: Stage, tmp_path: Path) -> Story:
    failover = await stage.job(JobKind.FAILOVER, OVER)
    assert failover.state is JobState.SUCCEEDED, failover.error
    assert (await stage.job(JobKind.COMMIT)).state is JobState.SUCCEEDED
    made = Story(stage, failover, tmp_path)
    made.lay_down()
    return made


async def test_a_machine_comes_home_from_azure_with_what_was_written_on_either_side(story: Story) -> None:
    there, here = await story.writes_there(), await story.writes_at_home()
    story.lay_down()
    story.there.troubles += [503, 500, 429]
    failback = await story.go_home()
    assert failback.state is JobState.SUCCEEDED, failback.error
    assert await story.is_home()
    assert int(failback.result["moved_bytes"]) <= (there + here) * 1.05
    assert story.there.bytes_read < 8 * int(failback.result["diverged_bytes"]) + 16 * PAGE, "only what differs is read"
    assert story.stage.azure.power == "PowerState/deallocated"

    async with story.agent():
        again = await story.stage.job(JobKind.REPROTECT)
    assert again.state is JobState.SUCCEEDED, again.error
    kinds = ("virtualMachines", "networkInterfaces", "disks", "snapshots")
    assert [story.stage.azure.paths(kind) for kind in kinds] == [[], [], [], []]
    assert await life(story.stage.stored.cast) is LifeState.PROTECTED


async def test_where_azure_can_not_say_what_was_written_the_disks_are_compared(story: Story) -> None:
    there, here = await story.writes_there(), await story.writes_at_home()
    story.lay_down()
    story.there.knows_diffs = False
    base = story.stage.azure.paths("snapshots")[0]  # and of one disk there is none
    await story.there.delete(base.rpartition("/")[2])
    del story.stage.azure.resources[base]
    failback = await story.go_home()
    assert failback.state is JobState.SUCCEEDED, failback.error
    assert await story.is_home()
    assert int(failback.result["moved_bytes"]) <= (there + here) * 1.05


async def test_a_failover_does_not_fail_over_snapshots_that_are_not_to_be_had(stage: Stage, tmp_path: Path) -> None:
    stage.azure.troubles["PUT", "snapshots"] = [(403, "AuthorizationFailed")] * 2
    failover = await stage.job(JobKind.FAILOVER, OVER)
    assert failover.state is JobState.SUCCEEDED, failover.error
    assert stage.azure.paths("snapshots") == []
    assert (await stage.job(JobKind.COMMIT)).state is JobState.SUCCEEDED
    story = Story(stage, failover, tmp_path)
    story.lay_down()
    written = await story.writes_there()
    stage.azure.troubles["PUT", "snapshots"] = [(403, "AuthorizationFailed")]
    refused = await story.go_home()
    assert refused.state is JobState.FAILED
    assert refused.error is not None
    assert "AuthorizationFailed" in refused.error.message
    failback = await story.go_home()
    assert failback.state is JobState.SUCCEEDED, failback.error
    assert await story.is_home()
    assert int(failback.result["moved_bytes"]) <= written * 1.05


async def test_disks_of_a_machine_at_home_that_is_new_are_compared_with_those_in_azure(story: Story) -> None:
    await story.writes_there()
    story.home(0).write_bytes(bytes(len(story.home(0).read_bytes())))
    failback = await story.go_home(compare="bytes", verify="all")
    assert failback.state is JobState.SUCCEEDED, failback.error
    assert await story.is_home()


async def test_data_behind_the_end_of_the_machines_disk_is_not_left_behind_in_silence(story: Story) -> None:
    disk, size = story.managed[1], len(story.home(1).read_bytes())
    before = story.home(0).read_bytes()
    await story.there.write(disk, vhd.virtual_bytes(size) - PAGE, b"x" * PAGE)
    failback = await story.go_home()
    assert failback.state is JobState.FAILED
    assert failback.error is not None
    assert "made larger over there" in failback.error.message
    assert failback.error.hint
    assert story.home(0).read_bytes() == before, "nothing was written"
    assert await life(story.stage.stored.cast) is LifeState.COMMITTED
    await story.there.write(disk, vhd.virtual_bytes(size) - PAGE, bytes(PAGE))
    assert (await story.go_home()).state is JobState.SUCCEEDED
    assert await story.is_home()


async def test_a_machine_that_somebody_starts_on_the_way_is_not_home_until_its_disks_were_read_anew(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    await story.writes_there()
    done = Desk.done

    async def is_started(desk: Desk, message: str = "") -> None:
        if desk.job.steps[-2].name == "verify" and "both sides are equal" in message:
            story.stage.azure.power = "PowerState/running"
            await story.there.write(story.managed[0], 250 * PAGE, b"later" * 100 + bytes(12))
        await done(desk, message)

    with monkeypatch.context() as patched:
        patched.setattr(Desk, "done", is_started)
        failed = await story.go_home()
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert "somebody has started it" in failed.error.message
    assert not await story.is_home()
    assert (await story.go_home()).state is JobState.SUCCEEDED
    assert await story.is_home()


async def test_a_disk_that_is_gone_is_said_before_the_machine_is_shut_down(story: Story) -> None:
    path = story.stage.azure.paths("disks")[1]
    del story.stage.azure.resources[path]
    failback = await story.go_home()
    assert failback.state is JobState.FAILED
    assert failback.error is not None
    assert "Azure has 1 of them" in failback.error.message
    assert story.stage.azure.power == "PowerState/running"


@pytest.mark.parametrize(
    "step", ["copy", pytest.param("compare", marks=pytest.mark.soak), pytest.param("verify", marks=pytest.mark.soak)]
)
async def test_a_worker_that_dies_on_the_way_is_followed_by_itself_and_nothing_is_lost(
    story: Story, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await story.writes_there()
    await story.writes_at_home()
    story.lay_down()
    reached, done = asyncio.Event(), Desk.done

    async def dies(desk: Desk, message: str = "") -> None:
        if desk._step == step and not reached.is_set():
            reached.set()
            await asyncio.Event().wait()
        await done(desk, message)

    monkeypatch.setattr(Desk, "done", dies)
    operator = story.stage.stored.cast.operator
    asked = JobParameters(destination=str(story.directory / "{disk}.img"))
    async with story.agent():
        made = await operator.make_job("db1", JobKind.FAILBACK, asked)
        dying = asyncio.create_task(story.stage.worker().run(asyncio.Event(), once=True))
        async with asyncio.timeout(60):
            await reached.wait()
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        await story.stage.worker().run(asyncio.Event(), once=True)
    job = await operator.job(made.id)
    assert job.state is JobState.SUCCEEDED, job.error
    assert await story.is_home()


@pytest.mark.parametrize("ahead", [3, *(pytest.param(number, marks=pytest.mark.soak) for number in range(5, 90, 3))])
async def test_a_worker_that_dies_behind_any_request_to_azure_is_followed_by_one_that_comes_home(
    story: Story, ahead: int
) -> None:
    """The request was carried out, and nobody knows: a snapshot, a link, a shut-down may be there."""
    await story.writes_there()
    await story.writes_at_home()
    story.lay_down()
    azure, operator = story.stage.azure, story.stage.stored.cast.operator
    asked = JobParameters(destination=str(story.directory / "{disk}.img"))
    azure.hold_at = len(azure.requests) + ahead
    async with story.agent():
        made = await operator.make_job("db1", JobKind.FAILBACK, asked)
        dying = asyncio.create_task(story.stage.worker().run(asyncio.Event(), once=True))
        holding = asyncio.create_task(azure.held.wait())
        async with asyncio.timeout(120):
            await asyncio.wait((dying, holding), return_when=asyncio.FIRST_COMPLETED)  # it may have fewer requests
        for task in (dying, holding):
            task.cancel()
        await asyncio.gather(dying, holding, return_exceptions=True)
        await story.stage.worker().run(asyncio.Event(), once=True)
    job = await operator.job(made.id)
    assert job.state is JobState.SUCCEEDED, job.error
    assert await story.is_home()
