"""The copy is proven against the source: a sound one verifies, and a disk that was changed past the agent is found."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from replicar.control.client import ControlClient
from replicar.control.messages import AuditReport
from simulator.cluster import Cluster
from tests.end_to_end.stage import DISK, DISK_BYTES, stage

MIB = 1 << 20
ALTERED = 17 * MIB + 8192
AUDITS = {"audit_bytes_per_second": 64 * MIB, "mark_every_seconds": 1}


async def _rounds(cluster: Cluster, count: int) -> None:
    """Return when so many whole rounds of audits were begun and ended from now on."""
    async with asyncio.timeout(60), cluster.control() as control:
        for _ in range(count + 1):  # the first one to end had begun before
            before = (await _audit(control, cluster)).last_ended_ns
            while (await _audit(control, cluster)).last_ended_ns == before:
                await asyncio.sleep(0.1)


async def _audit(control: ControlClient, cluster: Cluster) -> AuditReport:
    (machine,) = await control.machines()
    assert machine.audit is not None
    return machine.audit


async def test_an_audited_machine_verifies_and_a_change_past_the_agent_is_named(tmp_path: Path) -> None:
    async with stage(tmp_path, agent_settings=AUDITS) as made:
        cluster = made.cluster
        async with made.writing():
            await _rounds(cluster, 1)
        await made.settle("sound")
        report = (await cluster.replicar("verify", cluster.machine, "--json")).require().json()
        assert report["sound"]
        assert report["audits"] >= DISK_BYTES // MIB
        assert report["audits_failed"] == 0

        # Every second a point that nobody asked for, to be recovered like any other; and how much of it is proven.
        async with cluster.control() as control:
            points = (await control.points(cluster.machine)).points
        named = [point.name for point in points if point.stored and point.name.startswith("auto-")]
        assert len(named) >= 2
        target = tmp_path / "auto.raw"
        recovering = await cluster.replicar("recover", cluster.machine, "--point", named[0], "--raw", target, "--json")
        (disk,) = recovering.require().json()["disks"]
        assert disk["audited_bytes"] > DISK_BYTES * 0.9
        assert disk["oldest_ns"] is not None

        with made.image.path.open("r+b") as behind:
            behind.seek(ALTERED)
            behind.write(b"written past the agent")
        await _rounds(cluster, 1)
        await made.settle("altered")
        verifying = await cluster.replicar("verify", cluster.machine, "--json")
        assert verifying.status != 0
        report = verifying.json()
        assert report["audits_failed"] == report["problem_count"] > 0
        for problem in report["problems"]:
            said = re.fullmatch(
                rf"at sequence (\d+) the source held other bytes at (\d+) of disk {DISK} \((\d+) bytes\).*",
                problem["text"],
            )
            assert said is not None, problem
            sequence, offset, length = map(int, said.groups())
            assert offset <= ALTERED < offset + length
            assert points[0].sequence < sequence <= report["last_sequence"]
