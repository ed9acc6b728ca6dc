"""What the demo does, in order: protect a disk under writes, hurt the path, bring the disk back, and judge what came.

While everything below happens the application writes through the protected disk, and the oracle notes what it was told:
initial replication; a named point; an instant between two writes; the process server killed and started again; more
writes. Then the disk is recovered at each of the points, as a fixed VHD in a page blob and as a raw file, by the
commands a user would type, and each is judged by `recovered`, which knows nothing of how it came about.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicar.control.client import ControlClient
from replicar.errors import PermanentError, ReplicarError
from simulator import disk_image, recovered
from simulator.application import Application, first_error
from simulator.cluster import Cluster
from simulator.demo.display import Display, Step
from simulator.demo.plan import MIB, Plan
from simulator.demo.report import Proof, Report
from simulator.disk_image import DiskImage
from simulator.oracle import LATEST_NS, Oracle
from simulator.recovered import Verdict
from simulator.workload import Operation, Space, paced
from simulator.workloads import Kind, Workload

DISK: Final = "root"
NAMED: Final = "before-the-crash"
FINISHED: Final = "all-is-written"
_POLL_SECONDS: Final = 0.2
#: From a socket's end, which others notice, to the end of the process that had it.
_DEATH_SECONDS: Final = 0.3


@dataclass(frozen=True, slots=True)
class Chosen:
    """A point to recover: its name for people, how `replicar recover` is told it, and the instant the oracle takes."""

    name: str
    arguments: tuple[str, ...]
    at_ns: int


class Story:
    """One run. `tell` does it all and returns the report; every process is gone when it ends, however it ends."""

    def __init__(self, plan: Plan, directory: Path, display: Display) -> None:
        self._plan = plan
        self._display = display
        self._directory = directory
        self._report = Report(disk=DISK, disk_bytes=plan.disk_bytes)
        self._cluster = Cluster(directory, disks={DISK: directory / "image" / "disk.img"})

    async def tell(self) -> Report:
        """Run the story.

        Raises:
            ReplicarError: something did not work at all; a check that failed is in the report instead.
        """
        began = time.monotonic()
        async with self._cluster as cluster:
            image = await self._prepare()
            oracle = await asyncio.to_thread(Oracle, image.path, self._directory / "oracle")
            try:
                async with asyncio.TaskGroup() as tasks:
                    watching = tasks.create_task(cluster.watch())
                    await self._run_parts(tasks, image, oracle)
                    watching.cancel()
            except* ReplicarError as group:
                raise await self._cause(group) from group
        self._report.seconds = time.monotonic() - began
        return self._report

    async def _run_parts(self, tasks: asyncio.TaskGroup, image: DiskImage, oracle: Oracle) -> None:
        """All that needs the parts: the writes, and then the recoveries."""
        await self._start_parts()
        operations = _workload(image, self._plan)
        address = self._cluster.nbd(DISK)
        application = Application(address, oracle, operations, export=DISK, depth=self._plan.depth)
        writing = tasks.create_task(application.run())
        started = time.monotonic()
        async with self._cluster.control() as control:
            points = await self._write(control, application)
            application.stop()
            await writing
            self._count(application, time.monotonic() - started)
            await self._measure(control)
        await self._recover(image, oracle, [*points, Chosen("latest", ("--latest",), LATEST_NS)])
        await self._verify()

    async def _cause(self, group: BaseExceptionGroup[ReplicarError]) -> ReplicarError:
        """The error to tell: a part that died explains whatever else failed, though its death may be seen later."""
        await asyncio.sleep(_DEATH_SECONDS)
        for child in self._cluster.children:
            if child.died:
                return child.failure(f"died with status {child.status}")
        return first_error(group)

    async def _prepare(self) -> DiskImage:
        plan, cluster = self._plan, self._cluster
        with self._display.step("make a disk of real files, storage and a vault") as step:
            async with asyncio.TaskGroup() as tasks:
                making = tasks.create_task(
                    asyncio.to_thread(
                        disk_image.make,
                        self._directory / "image",
                        size_bytes=plan.disk_bytes,
                        files_bytes=plan.files_bytes,
                        database_bytes=plan.database_bytes,
                        randomness=random.Random(plan.seed),
                    )
                )
                tasks.create_task(cluster.start_storage())
                tasks.create_task(cluster.make_vault())
            image = making.result()
            self._report.machine = cluster.machine
            self._report.file_bytes = sum(path.stat().st_size for path in image.source.rglob("*") if path.is_file())
            step.say(f"{plan.disk_bytes // MIB} MiB ext4, {self._report.file_bytes // MIB} MiB in files")
        return image

    async def _start_parts(self) -> None:
        cluster = self._cluster
        with self._display.step("start config server, process server and agent") as step:
            await cluster.start_config_server()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_in_turn(cluster.enrol_process_server, cluster.start_process_server))
                tasks.create_task(_in_turn(cluster.enrol_agent, cluster.start_agent))
            step.say("each a process of its own, enrolled by passphrase, TLS between them")

    async def _write(self, control: ControlClient, application: Application) -> list[Chosen]:
        """Everything that happens while the application writes; the points to recover."""
        plan, cluster = self._plan, self._cluster
        await self._replicate_initially(control)
        await asyncio.sleep(plan.phase_seconds)
        named = await self._mark(control)
        await asyncio.sleep(plan.phase_seconds)
        async with application.quiet() as instant:
            instant = instant // 1000 * 1000  # the command takes microseconds
        await asyncio.sleep(plan.phase_seconds)
        with self._display.step("kill the process server in mid-flow, start it again") as step:
            former = cluster.process_server.process_id
            cluster.process_server.kill()
            self._report.process_server_kills += 1
            await asyncio.sleep(plan.outage_seconds)
            await cluster.start_process_server()
            step.say(f"{former} got SIGKILL, {cluster.process_server.process_id} goes on; writes never stopped")
        await asyncio.sleep(plan.phase_seconds)
        with self._display.step("flush, and wait until all is in storage"):
            async with application.quiet():
                await application.flush()
                (await cluster.replicar("tag", cluster.machine, FINISHED, "--wait-stored", "--json")).require()
        return [named, Chosen("instant between two writes", ("--at", moment(instant)), instant)]

    async def _replicate_initially(self, control: ControlClient) -> None:
        cluster = self._cluster
        began = time.monotonic()
        with self._display.step("protect: initial replication beside live writes") as step:
            (await cluster.replicar("protect", cluster.machine, "--json")).require()
            while (await control.points(cluster.machine)).ordered_from is None:
                machine = await control.machine(cluster.machine)
                step.advance_to(machine.seed_done_bytes, machine.seed_total_bytes)
                step.say(machine.state)
                if time.monotonic() - began > self._plan.initial_replication_seconds:
                    raise PermanentError(
                        f"initial replication is at {machine.seed_done_bytes} of {machine.seed_total_bytes} bytes"
                        f" after {self._plan.initial_replication_seconds:.0f} s",
                        hint=f"the logs are in {cluster.directory / 'logs'} (keep them with --keep)",
                    )
                await asyncio.sleep(_POLL_SECONDS)
            self._report.initial_replication_seconds = time.monotonic() - began
            step.say("from here on every write is a recovery point")

    async def _mark(self, control: ControlClient) -> Chosen:
        """Have a named point made under load, and see to it that its time is one at which it can have been made."""
        with self._display.step(f"tag a recovery point: {NAMED}") as step:
            before = time.time_ns()
            (await self._cluster.replicar("tag", self._cluster.machine, NAMED, "--json")).require()
            after = time.time_ns()
            found = [point for point in (await control.points(self._cluster.machine)).points if point.name == NAMED]
            if len(found) != 1 or not before <= found[0].time_ns <= after:
                raise PermanentError(f"tagging {NAMED} gave {found}, asked for between {before} and {after}")
            step.say(f"sequence {found[0].sequence}, under load")
        return Chosen(f"named: {NAMED}", ("--point", NAMED), found[0].time_ns)

    def _count(self, application: Application, seconds: float) -> None:
        tally, report = application.tally, self._report
        report.writing_seconds = seconds
        report.writes = tally.operations - tally.flushes
        report.bytes_written, report.bytes_zeroed = tally.bytes_written, tally.bytes_zeroed

    async def _measure(self, control: ControlClient) -> None:
        machine, report = await control.machine(self._cluster.machine), self._report
        report.rpo_p50_seconds, report.rpo_p99_seconds = machine.rpo_p50_seconds, machine.rpo_p99_seconds
        report.bytes_captured, report.bytes_sent = machine.bytes_captured, machine.bytes_sent
        async with self._cluster.store() as store:
            for blob in await store.list("machines/"):
                report.bytes_stored += sum(length for _, length in await store.page_ranges(blob.name))

    async def _recover(self, image: DiskImage, oracle: Oracle, points: list[Chosen]) -> None:
        for point in points:
            with self._display.step(f"recover and check: {point.name}") as step:
                async with asyncio.TaskGroup() as tasks:
                    forms = [
                        tasks.create_task(self._recover_raw(image, oracle, point)),
                        tasks.create_task(self._recover_blob(image, oracle, point)),
                    ]
                proofs = [form.result() for form in forms]
                self._report.proofs += proofs
                _say_of(step, proofs)

    async def _recover_raw(self, image: DiskImage, oracle: Oracle, point: Chosen) -> Proof:
        path = self._directory / f"{point.arguments[0].strip('-')}.raw"
        seconds = await self._recover_to(point, "--raw", str(path))
        verdict = await asyncio.to_thread(recovered.judge, image, oracle, path, path.name, point.at_ns)
        path.unlink()
        return _proof(point, "raw file", seconds, verdict)

    async def _recover_blob(self, image: DiskImage, oracle: Oracle, point: Chosen) -> Proof:
        blob = f"recovered/{point.arguments[0].strip('-')}.vhd"
        path = self._directory / f"{point.arguments[0].strip('-')}.vhd.raw"
        seconds = await self._recover_to(point, "--blob", blob)
        async with self._cluster.store() as store:
            await recovered.fetch_vhd(store, blob, path)
        verdict = await asyncio.to_thread(recovered.judge, image, oracle, path, path.name, point.at_ns)
        path.unlink()
        return _proof(point, "VHD in a page blob", seconds, verdict)

    async def _recover_to(self, point: Chosen, *target: str) -> float:
        """Run `replicar recover`; the seconds it took."""
        began = time.monotonic()
        machine = self._cluster.machine
        command = ["recover", machine, *point.arguments, "--disk", DISK, *target, "--json"]
        (await self._cluster.replicar(*command)).require()
        return time.monotonic() - began

    async def _verify(self) -> None:
        with self._display.step("replicar verify: every segment decrypted, chained and checked") as step:
            result = await self._cluster.replicar("verify", self._cluster.machine, "--json")
            self._report.verify = result.json()
            if result.status:
                self._report.problems.append(f"`{result.command}` ended with status {result.status}")
            step.say("status 0" if not result.status else f"status {result.status}")


def moment(at_ns: int) -> str:
    """An instant as `replicar recover --at` takes it: UTC with microseconds."""
    seconds, rest = divmod(at_ns, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:06d}Z"


def _workload(image: DiskImage, plan: Plan) -> Iterator[tuple[float, Operation]]:
    """A database inside the disk's database files: the last is its log, the others hold its tables."""
    *tables, log = image.database_extents().values()
    space = Space([extent for extents in tables for extent in extents])
    randomness = random.Random(plan.seed)
    operations = Workload(Kind.OLTP).on(space, randomness, log=Space(log))
    return paced(operations, bytes_per_second=plan.churn_bytes_per_second)


async def _in_turn(*steps: Callable[[], Awaitable[None]]) -> None:
    for step in steps:
        await step()


def _proof(point: Chosen, form: str, seconds: float, verdict: Verdict) -> Proof:
    at_ns = 0 if point.at_ns == LATEST_NS else point.at_ns
    return Proof(point.name, at_ns, form, seconds, verdict)


def _say_of(step: Step, proofs: list[Proof]) -> None:
    failed = [f"{proof.form}: {proof.verdict.problems[0]}" for proof in proofs if not proof.holds]
    step.say("; ".join(failed) if failed else "VHD and raw file equal the oracle, fsck clean, files equal")
