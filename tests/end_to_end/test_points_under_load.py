"""Points of a disk under everything at once: a database, files made and removed, a file that is written, mapped, cut
and punched and checked all the while (`fsx`), fio's direct writes, discards.

Each point is recovered and held against what the disk was when it was frozen for it, byte for byte; by the file
system's own check; and by the database, which has to start, find its indexes sound, and have every commit that it had
acknowledged and none that came later. A disk that is shown as a file is frozen by the test. A traced one is frozen by
the agent itself, beside which a witness looks at it then (`witness`).

Of a hundred points the log has some GB. The last one is recovered from the log's beginning; then the index is brought
up to date, as an operator's timer does it, and each opens from the checkpoint before it.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from simulator.cluster import Cluster
from tests.end_to_end import witness
from tests.end_to_end.test_application import Commits
from tests.end_to_end.test_trace import DISK, SETTINGS, whole
from tests.mobility_agent.fuse.stage import looped, make_filesystem, mounted
from tests.mobility_agent.trace.rig import Churn, run
from tests.support import fsx
from tests.support.databases import PostgreSQL, postgresql, postgresql_programs
from tests.support.tools import need

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(900)]

MIB = 1 << 20
DISK_BYTES = 384 * MIB
#: A recovery, or the indexing of some GB of log, on a machine that is busy.
RECOVER_SECONDS = 600.0
#: So many points are recovered from the log's beginning; of more, the index is made first.
UNINDEXED_POINTS = 10
#: Of a hundred points, on a machine that is busy; alone it takes a fifth of that.
SOAK_SECONDS = 7200
#: What a witness, who reads all of the disk, adds to a freeze on a machine that is busy.
BUDGET_SECONDS = 20.0
TRIM_EVERY = 5


@dataclass(frozen=True)
class Kept:
    """What was known when a point was made: the frozen disk's digest, and which commit is the last."""

    name: str
    digest: str
    earliest: int
    latest: int


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the database's own user gets through to, by a path short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="replicar-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextmanager
def pgbench(server: PostgreSQL) -> Iterator[None]:
    """The benchmark's clients at work, at a rate that leaves room for the rest."""
    program = server.programs / "pgbench"
    command = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups", "--", str(program)]
    where = ["-h", str(server.sockets), "postgres"]
    subprocess.run([*command, "-i", "-q", *where], check=True, capture_output=True, cwd="/", timeout=60)
    load = subprocess.Popen(
        [*command, "-c", "4", "-T", "3600", "-R", "100", "-n", *where],
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        assert load.poll() is None, "pgbench ended early"
    finally:
        load.terminate()
        load.wait(30)


async def _shown(cluster: Cluster, image: Path, where: Path, commits: Commits, name: str) -> Kept:
    """A point of a disk that is shown as a file, made while it is frozen."""
    await asyncio.to_thread(run, "fsfreeze", "-f", where)
    try:
        acknowledged = commits.acknowledged
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        (await cluster.replicar("tag", cluster.machine, name)).require()
    finally:
        await asyncio.to_thread(run, "fsfreeze", "-u", where)
    return Kept(name, digest, acknowledged, acknowledged + 1)  # one may be on the disk and not be acknowledged


async def _traced(cluster: Cluster, image: Path, where: Path, commits: Commits, name: str) -> Kept:
    """A point of a traced disk, for which the agent freezes it; it makes no other ones."""
    before = commits.acknowledged
    (await cluster.replicar("tag", cluster.machine, name)).require()
    return Kept(name, witness.seen(_notes(image))[DISK], before, commits.acknowledged + 1)


def _notes(image: Path) -> Path:
    return image.with_suffix(".seen")


async def _story(directory: Path, place: Path, *, capture: str, kind: str, points: int) -> None:
    postgresql_programs()
    image, file, where = place / "disk.img", place / "shown" / "disk", place / "mounted"
    with image.open("wb") as made:
        made.truncate(DISK_BYTES)
    kept: list[Kept] = []
    with ExitStack() as closing:
        if capture == "trace":
            disk = closing.enter_context(looped(image))
            make_filesystem(kind, disk)
            closing.enter_context(mounted(disk, where))
            program = (sys.executable, witness.__file__, _notes(image))
            settings = {**SETTINGS, "freeze_budget_seconds": BUDGET_SECONDS, "mark_every_seconds": 0}
            cluster = Cluster(directory, disks={DISK: disk}, agent_settings=settings, agent_program=program)
        else:
            cluster = Cluster(directory, disks={DISK: image}, files={DISK: file})
        async with cluster:
            await cluster.start()
            (await cluster.replicar("protect", cluster.machine)).require()
            if capture == "trace":
                await whole(cluster)
            else:
                device = closing.enter_context(looped(file))
                await asyncio.to_thread(make_filesystem, kind, device)
                await asyncio.to_thread(lambda: closing.enter_context(mounted(device, where)))
                async with cluster.control() as control, asyncio.timeout(60):
                    while (await control.points(cluster.machine)).ordered_from is None:
                        await asyncio.sleep(0.1)
            point = _traced if capture == "trace" else _shown
            with postgresql(where / "data", place / "run") as server, pgbench(server), Commits(server) as commits:
                for number in range(points):
                    with Churn([where], seed=number), fsx.exercised(where / "exercised", seed=number):
                        await asyncio.sleep(0.3)
                        kept.append(await point(cluster, image, where, commits, f"p{number}"))
                    if number % TRIM_EVERY == 0:
                        await asyncio.to_thread(run, "fstrim", where)
            if capture != "trace":
                await asyncio.to_thread(closing.close)  # while there is an agent that answers
            (await cluster.replicar("tag", cluster.machine, "last", "--wait-stored")).require()
            if points > UNINDEXED_POINTS:
                await _from_the_beginning(cluster, kept[-1], place)
            seconds = []
            for found in kept:
                recovered = place / "recovered.raw"
                seconds.append(await _recover(cluster, found, recovered))
                await asyncio.to_thread(_judge, recovered, kind, found, place)
            print(f"{capture}, {kind}: {points} points, the median recovered in {statistics.median(seconds):.1f} s")


async def _recover(cluster: Cluster, kept: Kept, target: Path) -> float:
    """Recover a point; how long that took, seconds."""
    began = time.monotonic()
    arguments: list[str | Path] = ["--point", kept.name, "--disk", DISK, "--raw", target]
    (await cluster.replicar("recover", cluster.machine, *arguments, limit_seconds=RECOVER_SECONDS)).require()
    return time.monotonic() - began


async def _from_the_beginning(cluster: Cluster, kept: Kept, place: Path) -> None:
    """Recover a point from a log without an index; then make that."""
    recovered = place / "unindexed.raw"
    seconds = await _recover(cluster, kept, recovered)
    assert hashlib.sha256(recovered.read_bytes()).hexdigest() == kept.digest, kept.name
    recovered.unlink()
    arguments = ["--index-only", "--json"]
    done = await cluster.replicar("fold", cluster.machine, *arguments, limit_seconds=RECOVER_SECONDS)
    made = done.require().json()["index"]
    assert made["checkpoints"]
    print(f"{made['tail']} segments; without an index {kept.name} was recovered in {seconds:.1f} s")


def _judge(image: Path, kind: str, kept: Kept, place: Path) -> None:
    """Hold a recovered disk against what was known; it is used up by that."""
    assert hashlib.sha256(image.read_bytes()).hexdigest() == kept.digest, kept.name
    with looped(image) as device:
        if kind == "ext4":
            run(need("e2fsck"), "-fp", device)  # as at a boot: the journal is replayed, nothing else is mended
            run("e2fsck", "-fn", device)
        # XFS mounts no second one of the same identity, and the source may be mounted still.
        with mounted(device, place / "again", *(["-o", "nouuid"] if kind == "xfs" else [])) as where:
            (where / "data" / "postmaster.pid").unlink(missing_ok=True)
            with postgresql(where / "data", place / "run-again") as server:
                server.sql("CREATE EXTENSION amcheck")
                server.sql("SELECT bt_index_check(c.oid, true) FROM pg_class c WHERE relkind = 'i' AND relam = 403")
                count, last = map(int, server.sql("SELECT count(*), coalesce(max(n), 0) FROM commits").split("|"))
        if kind == "xfs":
            run("xfs_repair", "-n", device)
    assert count == last, kept.name
    assert kept.earliest <= last <= kept.latest, kept.name
    image.unlink()


async def test_points_of_a_disk_that_is_shown_as_a_file(tmp_path: Path, place: Path) -> None:
    await _story(tmp_path, place, capture="file", kind="xfs", points=2)


async def test_points_of_a_disk_that_stays_where_it_is(tmp_path: Path, place: Path) -> None:
    await _story(tmp_path, place, capture="trace", kind="ext4", points=1)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("capture", ["file", "trace"])
async def test_a_hundred_points(tmp_path: Path, place: Path, capture: str, kind: str) -> None:
    await _story(tmp_path, place, capture=capture, kind=kind, points=100)
