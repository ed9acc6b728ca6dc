"""`seed`: the first copy of a disk and the next 40 MB, beside AzCopy and restic.

The disk is ext4 as disks become in use: real files in `LIVE` of it, what was deleted still lying in `STALE`, the rest
never written. AzCopy copies it as a page blob, zeros left out; Replicar replicates it by its own initial replication,
free space left out (`copy_free_space = false`), with a real agent, process server and config server, into the same
Azurite. So what AzCopy must carry and Replicar need not is deleted content, and what Replicar carries is compressed.

    speedup         AzCopy's time to Replicar's, from `protect` until a point behind the whole copy is in storage
    delta_speedup   restic's second run, 40 MB having changed, to Replicar's time from the first of these writes until
                    they are in storage; restic's repository is on the local disk
    delta_speedup_from_flush
                    the same from the last write's flush on, which is when restic's run begins: what was written before
                    is on its way by then, and the writing itself, which restic's time has not got, is left out
    delta_cpu_ratio restic's processor seconds in that run to those of all of Replicar's parts, writes included

The disk is recovered by the real command then, before anything is changed: e2fsck finds it clean, and every file on it
is the one that was put there. (Byte for byte it is not the disk, whose free space was left out on purpose.)

Weak: Azurite is the slower half of both first copies and takes one processor; which of the two tools comes first is
decided by `--replicar-first`, for whoever suspects that it matters.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import data as content, seed_peers
from bench.measure import Moment, Window, cores
from bench.report import Report
from bench.seed_peers import Restic, Took
from replicar.errors import PermanentError, ReplicarError
from replicar.nbd.client import NbdClient
from simulator import disk_image, e2fsprogs
from simulator.cluster import MIB, Cluster
from simulator.disk_image import FILES_DIRECTORY
from simulator.ext4_files import differing_files

DEFAULT_GIB: Final = 4.0
DEFAULT_DELTA_MIB: Final = 40
LIVE: Final = 0.4
STALE: Final = 0.3
DISK: Final = "disk"
#: Where Linux keeps programs, libraries and documents: what is on a system's disk.
ROOTS: Final = (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin"))
DELTA_WRITE_BYTES: Final = 256 << 10
STALE_FILES: Final = 4
SEED_SECONDS: Final = 1200.0
IN_FLIGHT: Final = 8
#: How often the parts say how far they are, which is how late it is noticed here that all is stored.
REPORT_SECONDS: Final = 0.25


def run(
    *,
    gib: float = DEFAULT_GIB,
    delta_mib: int = DEFAULT_DELTA_MIB,
    replicar_first: bool = False,
    directory: Path | None = None,
) -> Report:
    """The benchmark. Nothing of it is left in `directory`, and nothing left running."""
    if gib < 0.0625 or not 1 <= delta_mib <= gib * 1024 / 2:
        raise PermanentError("these sizes make no disk", hint="64 MiB at least, and a change of half of it at most")
    seed_peers.check_installed()
    place = directory or Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="replicar-seed-", dir=place) as name:
        figures, faults = asyncio.run(_seed(Path(name), int(gib * 1024) * MIB, delta_mib * MIB, replicar_first))
    parameters = {
        "gib": gib,
        "delta_mib": delta_mib,
        "replicar_first": replicar_first,
        "live_share": LIVE,
        "stale_share": STALE,
        "directory": str(place),
    }
    remarks = (
        "real files, deleted content (half text, half random bytes) in a part of the free space; Azurite, one process "
        "on the same cores, is storage for AzCopy and Replicar, the local disk for restic",
    )
    return Report("seed", parameters, figures, tuple(faults), remarks)


def make_disk(directory: Path, size_bytes: int) -> tuple[Path, Path]:
    """The disk and the directory whose files are on it."""
    source, deleted = directory / "source", directory / "source" / "deleted"
    copied = disk_image.gather_files(source / FILES_DIRECTORY, int(size_bytes * LIVE), ROOTS)
    deleted.mkdir()
    piece = content.mixed(16 * MIB)
    for number in range(STALE_FILES):
        with (deleted / f"old-{number}").open("wb") as file:
            for _ in range(int(size_bytes * STALE / STALE_FILES) // len(piece)):
                file.write(piece)
                file.write(os.urandom(4096))  # so that no two pieces are the same to whoever looks for that
    image = directory / "disk.img"
    with image.open("wb") as empty:
        empty.truncate(size_bytes)
    block = str(e2fsprogs.BLOCK_BYTES)
    e2fsprogs.run("mkfs.ext4", "-q", "-F", "-b", block, "-m", "0", "-d", str(source), str(image))
    for file_name in sorted(path.name for path in deleted.iterdir()):
        e2fsprogs.run("debugfs", "-w", "-R", f"rm deleted/{file_name}", str(image))
        (deleted / file_name).unlink()
    e2fsprogs.check(image)
    if copied < size_bytes * LIVE * 0.8:
        raise PermanentError(
            f"this machine has only {copied} bytes of files to put on a disk", hint="use a smaller one"
        )
    return image, source


async def _seed(
    directory: Path, size_bytes: int, delta_bytes: int, replicar_first: bool
) -> tuple[dict[str, Any], list[str]]:
    image, source = await asyncio.to_thread(make_disk, directory, size_bytes)
    often = {"heartbeat_seconds": REPORT_SECONDS}
    settings: dict[str, Any] = often | {
        "copy_free_space": False,
        "journal_bytes": 1024 * MIB,
        "audit_bytes_per_second": 0,
    }
    server: dict[str, Any] = often | {"cache_bytes": 1024 * MIB}
    async with Cluster(
        directory / "cluster", disks={DISK: image}, agent_settings=settings, process_server_settings=server
    ) as cluster:
        await cluster.start_storage()
        peer: Took | None = None
        if not replicar_first:
            # Before the parts start: a process server whose host has no processor to spare takes no new machine.
            peer = await _azcopy(cluster, image, directory)
        await cluster.start_parts()
        ours, cpu = await _replicate(cluster)
        if peer is None:
            peer = await _azcopy(cluster, image, directory)
        faults = await _recovered(cluster, directory, source)
        restic = await asyncio.to_thread(Restic, directory / "restic")
        first, first_mib = await asyncio.to_thread(restic.backup, image)
        delta = await _delta(cluster, size_bytes, delta_bytes)
        second, second_mib = await asyncio.to_thread(restic.backup, image)
        stored = cluster.agent_status()
    if second_mib < delta_bytes / MIB * 0.5:
        faults.append(f"restic added {second_mib:.0f} MiB, though {delta_bytes // MIB} had changed")
    figures = {
        "speedup": round(peer.seconds / ours, 2),
        "delta_speedup": round(second.seconds / delta.seconds, 1),
        "delta_speedup_from_flush": round(second.seconds / delta.seconds_from_flush, 1),
        "delta_cpu_ratio": round(second.cpu_seconds / delta.cpu_seconds, 1),
        "replicar_seconds": round(ours, 2),
        "azcopy_seconds": round(peer.seconds, 2),
        "replicar_delta_seconds": round(delta.seconds, 2),
        "replicar_delta_seconds_from_flush": round(delta.seconds_from_flush, 2),
        "restic_first_seconds": round(first.seconds, 2),
        "restic_second_seconds": round(second.seconds, 2),
        "restic_added_mib": [round(first_mib), round(second_mib)],
        "cpu_seconds": {
            "replicar": round(cpu, 2),
            "azcopy": round(peer.cpu_seconds, 2),
            "replicar_delta": round(delta.cpu_seconds, 2),
            "restic_first": round(first.cpu_seconds, 2),
            "restic_second": round(second.cpu_seconds, 2),
        },
        "left_out_mib": round(sum(disk.get("left_out_bytes") or 0 for disk in stored.get("disks", ())) / MIB),
        "recovered": "every file equal, e2fsck clean" if not faults else "NOT equal",
        "cores": cores(),
    }
    return figures, faults


async def _azcopy(cluster: Cluster, image: Path, directory: Path) -> Took:
    scratch = directory / "azcopy"
    scratch.mkdir()
    return await asyncio.to_thread(seed_peers.azcopy, cluster.azurite, image, "disk.vhd", scratch)


def _moment(cluster: Cluster) -> Moment:
    parts = (cluster.agent, cluster.process_server, cluster.config_server)
    return Moment.now({part.name: part.process_id or 0 for part in parts})


async def _replicate(cluster: Cluster) -> tuple[float, float]:
    """From `protect` until all of the disk is stored: wall seconds, and processor seconds of all parts."""
    before = _moment(cluster)
    async with asyncio.timeout(SEED_SECONDS), cluster.control() as control:
        await control.protect(cluster.machine)
        while (await control.points(cluster.machine)).ordered_from is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # another process tells us nothing but by being asked
        await control.mark(cluster.machine, "copied", wait_stored=True)
    window = Window.between(before, _moment(cluster))
    return window.seconds, sum(cpu.total for cpu in window.processes.values())


async def _recovered(cluster: Cluster, directory: Path, source: Path) -> list[str]:
    """What is wrong with the disk as it is recovered."""
    raw = directory / "recovered.raw"
    found = await cluster.replicar(
        "recover", cluster.machine, "--latest", "--disk", DISK, "--raw", raw, limit_seconds=SEED_SECONDS
    )
    found.require()
    try:
        await asyncio.to_thread(e2fsprogs.check, raw)
        count, unequal = await asyncio.to_thread(differing_files, raw, source, FILES_DIRECTORY)
    except ReplicarError as error:
        return [str(error)]
    finally:
        raw.unlink()
    if unequal or not count:
        return [f"{len(unequal)} of {count} files differ, among them {unequal[:1]}"]
    return []


@dataclass(frozen=True, slots=True)
class _Delta:
    """From the first write, and from the flush behind the last, until all is stored; processor seconds of it all."""

    seconds: float
    seconds_from_flush: float
    cpu_seconds: float


async def _delta(cluster: Cluster, size_bytes: int, delta_bytes: int) -> _Delta:
    """Write all over the disk through the agent, and wait until that is stored."""
    draw = random.Random(content.SEED)
    places = draw.sample(range(size_bytes // DELTA_WRITE_BYTES), delta_bytes // DELTA_WRITE_BYTES)
    fresh = content.mixed(max(1, delta_bytes // MIB) * MIB, seed=content.SEED + 1)
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with await NbdClient.connect(cluster.nbd(DISK), export=DISK) as client, cluster.control() as control:

        async def write(index: int, place: int) -> None:
            async with slots:
                start = index * DELTA_WRITE_BYTES
                await client.write(place * DELTA_WRITE_BYTES, fresh[start : start + DELTA_WRITE_BYTES])

        before = _moment(cluster)
        async with asyncio.timeout(SEED_SECONDS):
            await asyncio.gather(*(write(index, place) for index, place in enumerate(places)))
            await client.flush()
            flushed = _moment(cluster)
            await control.mark(cluster.machine, "changed", wait_stored=True)
        after = _moment(cluster)
    whole = Window.between(before, after)
    cpu_seconds = sum(cpu.total for cpu in whole.processes.values())
    return _Delta(whole.seconds, Window.between(flushed, after).seconds, cpu_seconds)
