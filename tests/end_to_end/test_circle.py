"""The whole circle on real parts: a guest with a database under load is protected, drilled, failed over, changed there,
brought home, protected again, and failed over once more; and no row whose commit was acknowledged is missing anywhere.

A guest that boots has the database checked (integrity, the chain of digests, the count in another table) before it says
how many rows it kept; the digest of one row vouches for all before it.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from replicar.control.messages import Job, JobKind, JobParameters, PointChoice, PointKind
from simulator import e2fsprogs
from simulator.cluster import Cluster
from simulator.guest import PARTITION_BYTES, Guest, make_disk, missing
from simulator.recovery_host import RecoveryHost

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(900)]

DISK = "system"
OPTIONS = {"memory_mib": "256", "banner": "^record "}


def _said(lines: list[str], word: str) -> int:
    """The number behind a word on a console."""
    return next(int(found[1]) for line in lines if (found := re.match(rf"{word} (\d+)", line)))


def _rows(lines: list[str], word: str) -> dict[int, str]:
    """Rows that a console told of by this word, with their digests."""
    found = (re.fullmatch(rf"{word} (\d+) ([0-9a-f]{{64}})", line) for line in lines)
    return {int(each[1]): each[2] for each in found if each is not None}


def _kept(lines: list[str], acknowledged: dict[int, str], *, at_least: int) -> None:
    """Whoever booted has all rows up to there, as they were acknowledged to whoever wrote them."""
    assert not any(line.startswith(("damaged", "said")) for line in lines), lines
    assert _said(lines, "kept") >= at_least
    found = _rows(lines, "found")
    both = found.keys() & acknowledged.keys()
    assert both, (found, acknowledged)
    assert {number: found[number] for number in both} == {number: acknowledged[number] for number in both}


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
    make_disk(image, database=True)
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
                await guest.until("record", count=len(guest.records) + 3)  # the source never stopped
                _kept(host.console(_made(drill)), guest.records, at_least=known)
                await host.job(JobKind.CLEAN_UP, JobParameters(notes="all there"))
                assert list(host.processes()) == []
                await guest.until("record", count=len(guest.records) + 3)
            acknowledged = guest.records  # the source died with its last word

            failover = await host.job(JobKind.FAILOVER, JobParameters(options=OPTIONS))
            lines = host.console(_made(failover))
            _kept(lines, acknowledged, at_least=max(acknowledged))
            await host.job(JobKind.COMMIT)
            there: dict[int, str] = {}
            async with asyncio.timeout(240):
                while len(there) < 10:
                    await asyncio.sleep(0.1)
                    there = _rows(host.console(_made(failover)), "record")

            options = {"verify": "all", "shut_down_seconds": "1"}  # nobody in this guest hears the power button
            failback = await host.job(JobKind.FAILBACK, JobParameters(destination=home, options=options))
            moved, diverged = int(failback.result["moved_bytes"]), int(failback.result["diverged_bytes"])
            assert 0 < moved <= diverged * 1.05
            assert diverged < image.stat().st_size / 4
            await host.job(JobKind.REPROTECT)
            assert list(host.processes()) == []

            async with Guest(home) as guest:
                await guest.until("record", count=2)
                _kept(guest.lines, there, at_least=max(there))
                await guest.quit()
                again = guest.records
            failover = await host.job(JobKind.FAILOVER, JobParameters(options=OPTIONS))
            _kept(host.console(_made(failover)), again, at_least=max(again))
            await host.job(JobKind.CANCEL_FAILOVER)
            await _stored(cluster)
            recovered = tmp_path / "latest.raw"
            await _whole(cluster)
            arguments: list[str | Path] = ["--latest", "--disk", DISK, "--raw", recovered]
            (await cluster.replicar("recover", cluster.machine, *arguments)).require()
            assert recovered.read_bytes() == image.read_bytes()
    with image.open("rb") as file, (tmp_path / "partition").open("wb") as partition:
        file.seek(PARTITION_BYTES)
        shutil.copyfileobj(file, partition)
    e2fsprogs.check(tmp_path / "partition")
