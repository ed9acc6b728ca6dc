"""The whole circle on real parts: a guest is protected, drilled, failed over, changed there, brought home, protected
again, and failed over once more; and no record that it was told is durable is missing anywhere."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from replicar.control.messages import Job, JobKind, JobParameters, PointChoice, PointKind
from simulator.cluster import Cluster
from simulator.guest import Guest, make_disk, missing
from simulator.recovery_host import RecoveryHost

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]

DISK = "system"
OPTIONS = {"memory_mib": "256", "banner": "^record "}


def _said(lines: list[str], word: str) -> int:
    """The number behind a word on a console."""
    return next(int(found[1]) for line in lines if (found := re.match(rf"{word} (\d+)", line)))


def _records(lines: list[str]) -> int:
    """The last record that a console says is durable."""
    return max(int(found[1]) for line in lines if (found := re.match(r"record (\d+) [0-9a-f]{64}$", line)))


async def _whole(cluster: Cluster) -> None:
    async with asyncio.timeout(60), cluster.control() as control:
        while (await control.points(cluster.machine)).ordered_from is None:
            await asyncio.sleep(0.1)


async def _stored(cluster: Cluster) -> None:
    async with asyncio.timeout(60), cluster.control() as control:
        while True:
            summary = await control.machine(cluster.machine)
            if summary.stored_sequence == summary.captured_sequence:
                return
            await asyncio.sleep(0.1)


def _made(job: Job) -> str:
    return job.result["machine"]


async def test_the_whole_circle(tmp_path: Path) -> None:
    if words := missing():
        pytest.skip(words)
    image = tmp_path / "system.img"
    make_disk(image)
    async with Cluster(tmp_path / "cluster", disks={DISK: image}, in_memory=True) as cluster:
        await cluster.start()
        home = f"nbd+unix:///{DISK}?socket={cluster.nbd(DISK)}"
        (await cluster.replicar("protect", cluster.machine)).require()
        async with RecoveryHost(cluster) as host:
            async with Guest(home) as guest:
                await guest.until("record", count=3)
                await _whole(cluster)
                known = max(guest.records)
                (await cluster.replicar("tag", cluster.machine, "drill-me", "--wait-stored")).require()

                choice = PointChoice(kind=PointKind.NAMED, name="drill-me")
                drill = await host.job(JobKind.TEST_FAILOVER, JobParameters(point=choice, options=OPTIONS))
                lines = host.console(_made(drill))
                assert _said(lines, "kept") >= known
                assert guest.lines[-1].startswith("record")  # the source never stopped
                await host.job(JobKind.CLEAN_UP, JobParameters(notes="all there"))
                assert list(host.processes()) == []
                await guest.until("record", count=len(guest.records) + 3)
                acknowledged = max(guest.records)
            # the source died with its last word

            failover = await host.job(JobKind.FAILOVER, JobParameters(options=OPTIONS))
            lines = host.console(_made(failover))
            assert _said(lines, "kept") >= acknowledged
            await host.job(JobKind.COMMIT)
            while _records(host.console(_made(failover))) < _said(lines, "kept") + 3:
                await asyncio.sleep(0.1)

            options = {"verify": "all", "shut_down_seconds": "1"}  # nobody in this guest hears the power button
            failback = await host.job(JobKind.FAILBACK, JobParameters(destination=home, options=options))
            there = _records(_kept_console(host, failover))
            moved, diverged = int(failback.result["moved_bytes"]), int(failback.result["diverged_bytes"])
            assert 0 < moved <= diverged * 1.05
            assert diverged < image.stat().st_size / 4
            await host.job(JobKind.REPROTECT)
            assert list(host.processes()) == []

            async with Guest(home) as guest:
                await guest.until("record", count=2)
                assert guest.said("kept") >= there
                await guest.quit()
                again = max(guest.records)
            failover = await host.job(JobKind.FAILOVER, JobParameters(options=OPTIONS))
            assert _said(host.console(_made(failover)), "kept") >= again
            await host.job(JobKind.CANCEL_FAILOVER)
            await _stored(cluster)
            recovered = tmp_path / "latest.raw"
            await _whole(cluster)
            arguments: list[str | Path] = ["--latest", "--disk", DISK, "--raw", recovered]
            (await cluster.replicar("recover", cluster.machine, *arguments)).require()
            assert recovered.read_bytes() == image.read_bytes()


def _kept_console(host: RecoveryHost, job: Job) -> list[str]:
    path = host.directory / "evidence" / _made(job) / "console.log"
    return [line.strip() for line in path.read_text(errors="replace").splitlines()]
