"""What an operator asks for that can't be had, as he meets it: each command says what, why and what to do, and harms
nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from recovery.worker.service import Worker
from recovery.worker.settings import WorkerSettings
from replicar.clock import SystemClock
from replicar.control.identity import Role
from replicar.control.messages import JobKind, KeptState, LifeState, MarkReport, Retention, TargetSettings, UpkeepReport
from replicar.storage import PageBlobStore, StorageTarget
from tests.cli.conftest import Ended, Operator, Stored
from tests.config_server.script import Script, life


def _says(ended: Ended, *words: str) -> None:
    """It failed, and said this and what to do next."""
    assert ended.status not in (0, 2), ended
    said = " ".join((ended.errors + ended.output).split())
    for word in (*words, "next step"):
        assert word in said, said


@pytest.fixture
async def protected(stored: Stored) -> Stored:
    """db1 with its log in a real Azurite, protected, with its points told; one of them lies in a gap."""
    cast, last = stored.cast, stored.builder.sequence - 1
    marks = [MarkReport(name=name, sequence=at, time_ns=at * 1000) for name, at in stored.points.items()]
    marks.append(MarkReport(name="torn", sequence=last, time_ns=last * 1000 + 1, in_gap=True))
    report = cast.house.machine_heartbeat(captured_sequence=last, marks=marks, ordered_from=(1, 1_000))
    await cast.machine.agent_heartbeat(report)
    await cast.operator.set_target("db1", TargetSettings(compute="qemu"), base_version=0)
    return stored


async def test_a_point_that_can_not_be_had_is_refused_by_name(protected: Stored, operator: Operator) -> None:
    beyond = protected.builder.sequence + 5
    for command in ("drill", "failover"):
        never = await operator(command, "db1", "--point", "never")
        _says(never, "machine db1 has no point 'never'", "replicar points db1")
        _says(await operator(command, "db1", "--point", "torn"), "lies in a gap")
        _says(await operator(command, "db1", "--sequence", beyond), f"sequence {beyond}")
    assert (await protected.cast.operator.jobs(going_only=True)).jobs == ()
    assert await life(protected.cast) is LifeState.PROTECTED


async def test_a_second_failover_during_one_names_the_first_and_leaves_it(
    protected: Stored, operator: Operator
) -> None:
    first = (await operator("failover", "db1", "--no-wait", "--json")).json
    for second in ("failover", "drill", "commit", "failback"):
        _says(await operator(second, "db1"), first["id"])
    (job,) = (await protected.cast.operator.jobs("db1", going_only=True)).jobs
    assert (job.id, job.cancel_requested) == (first["id"], False)
    assert (await operator("cancel", "db1")).status == 0
    assert await life(protected.cast) is LifeState.PROTECTED


async def test_a_point_that_was_thinned_is_refused_with_those_that_are_kept(
    protected: Stored, operator: Operator, worker: Script
) -> None:
    gone, kept, floor = (protected.points[name] for name in ("point-1", "point-2", "point-5"))
    states = (KeptState(sequence=kept, time_ns=kept * 1000, reason="hourly"),)
    left = Retention(generation=1, floor_sequence=floor, floor_time_ns=floor * 1000, kept=states)
    report = {"kind": "fold", "instance": "one", "machine_id": protected.cast.machine_id, "again_seconds": 900.0}
    await worker.client.report_upkeep(UpkeepReport.model_validate({**report, "retention": left}))
    _says(await operator("failover", "db1", "--point", "point-1"), "the point 'point-1' was thinned", f"{kept}")
    _says(await operator("drill", "db1", "--sequence", gone), f"sequence {gone} was thinned", f"--sequence {kept}")
    assert (await protected.cast.operator.jobs(going_only=True)).jobs == ()


async def test_a_failback_to_a_smaller_disk_writes_nothing_and_the_failover_stays(
    protected: Stored, operator: Operator, worker: Script, target: StorageTarget, tmp_path: Path
) -> None:
    sequence = str(protected.builder.sequence - 1)
    for kind in (JobKind.FAILOVER, JobKind.COMMIT):
        await protected.cast.operator.make_job("db1", kind)
        await worker.must_claim(kind)
        await worker.do_steps()
        await worker.end(result={"sequence": sequence, "compute": "qemu"} if kind is JobKind.FAILOVER else {})
    for disk in ("disk0", "disk1"):
        (tmp_path / f"{disk}.img").write_bytes(b"\xaa" * 4096)
    await protected.cast.house.enrol(tmp_path / "rw2", "rw2", Role.RECOVERY)
    settings = WorkerSettings(
        identity=tmp_path / "rw2",
        config_server=protected.cast.house.address,
        directory=tmp_path / "w",
        storage=target,
        fold_seconds=0,
        replica_seconds=0,
    )
    stop = asyncio.Event()
    working = asyncio.create_task(Worker(settings, None, SystemClock()).run(stop))
    try:
        ended = await operator("failback", "db1", "--to", f"{tmp_path}/{{disk}}.img")
    finally:
        stop.set()
        await working
    _says(ended, "disk disk0 has 153600 bytes, where it is to go there are 4096", "at least as large")
    assert [(tmp_path / f"{disk}.img").read_bytes() for disk in ("disk0", "disk1")] == [b"\xaa" * 4096] * 2
    assert await life(protected.cast) is LifeState.COMMITTED


async def test_a_missing_segment_is_named_and_nothing_half_recovered_is_left(
    protected: Stored, operator: Operator, store: PageBlobStore, tmp_path: Path
) -> None:
    blob, offset, length = protected.builder.placed[4]
    await store.clear_pages(blob, offset, length)
    checked = await operator("verify", "db1")
    assert checked.status != 0
    assert "segment 4 is missing" in checked.output + checked.errors
    path = tmp_path / "disk.raw"
    _says(await operator("recover", "db1", "--latest", "--disk", "disk0", "--raw", path), "segment 4")
    assert list(tmp_path.glob("disk.raw*")) == []
