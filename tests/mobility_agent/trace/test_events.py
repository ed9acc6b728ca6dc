"""Events of real devices: that none is missing, that a lost one is noticed, and that nothing is left in the kernel."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mobility_agent.capture.trace import bpf
from mobility_agent.capture.trace.bpf import Assembler, Probe
from mobility_agent.capture.trace.choice import Method, open_source
from mobility_agent.capture.trace.counters import Counters
from mobility_agent.capture.trace.events import BpfEvents, EventSource, What
from mobility_agent.capture.trace.tracefs import PREFIX, TracefsEvents
from mobility_agent.capture.trace.tracing import root, tracepoint
from replicar.errors import PermanentError
from tests.mobility_agent.core import MIB
from tests.mobility_agent.trace.rig import loop_disk, random_direct_writes, run, tracing
from tests.support.tools import need

pytestmark = pytest.mark.needs_root

BOTH = pytest.mark.parametrize("method", [Method.BPF, Method.TRACEFS])


_PROG_GET_NEXT_ID, _PROG_GET_FD_BY_ID = 11, 13
NOTHING: tuple[set[int], set[str]] = set(), set()


def left_by(process: int) -> tuple[set[int], set[str]]:
    """What the kernel holds of one process: the numbers of its eBPF programs, its instances in tracefs.

    Other tests trace at the same time, so nothing but the names tells whose a program is.
    """
    found: set[int] = set()
    last = 0
    with suppress(FileNotFoundError):  # after the last one
        while True:
            last = int.from_bytes(bpf._bpf(_PROG_GET_NEXT_ID, struct.pack("<I", last))[4:8], "little")
            if program_name(last) == f"{bpf.NAME}{process}":
                found.add(last)
    instances = {name for name in os.listdir(root() / "instances") if name.startswith(f"{PREFIX}{process}-")}
    return found, instances


def program_name(number: int) -> str:
    numbers = bpf._NUMBERS[os.uname().machine]
    buffer = ctypes.create_string_buffer(struct.pack("<I", number), 144)
    fd = ctypes.CDLL(None).syscall(numbers[0], _PROG_GET_FD_BY_ID, buffer, 144)
    if fd < 0:
        return ""  # gone meanwhile
    try:
        info = ctypes.create_string_buffer(256)
        bpf._bpf(bpf._OBJ_GET_INFO, struct.pack("<IIQ", fd, len(info), ctypes.addressof(info)))
    finally:
        os.close(fd)
    return info.raw[64:80].rstrip(b"\0").decode()


@BOTH
def test_the_captured_sectors_are_those_that_the_kernel_counts(tmp_path: Path, method: Method) -> None:
    with loop_disk(tmp_path, "a", size_bytes=64 * MIB) as loop:
        source = open_source(method, discard_ranges=True)
        try:
            source.watch(loop.block.number)
            counters = Counters(loop.block.whole)
            before = counters.read()
            random_direct_writes(loop.device, 2000, seed=1, span=64 * MIB)
            run("blkdiscard", "-o", "0", "-l", str(4 * MIB), loop.device)
            run("blkdiscard", "-z", "-o", str(MIB), "-l", str(2 * MIB), loop.device)
            run("dd", f"of={loop.device}", "if=/dev/urandom", "bs=12k", "count=50", "conv=fsync")
            after = counters.read()
            parts = []
            while (part := source.drain()).size:
                parts.append(part)
            events = np.concatenate(parts)
            sums = {what: int(events["sectors"][events["what"] == what].sum(dtype=np.int64)) for what in What}
            assert sums[What.ISSUE] - sums[What.REQUEUE] == after.sectors - before.sectors
            assert sums[What.QUEUE] == after.discarded - before.discarded == 4 * MIB // 512
            assert source.lost() == 0
            letters = {bytes(rwbs)[:1] for rwbs in events["rwbs"]}
            assert letters == {b"W", b"D", b"N"}
            assert {*events["device"].tolist()} == {loop.block.number}
        finally:
            source.close()


@BOTH
def test_under_load_no_event_is_lost(tmp_path: Path, method: Method) -> None:
    with loop_disk(tmp_path, "a", size_bytes=64 * MIB) as loop:
        source = open_source(method)
        try:
            source.watch(loop.block.number)
            counters = Counters(loop.block.whole)
            before = counters.read().sectors
            options = "--rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 --number_ios=40000 --size=64M"
            load = subprocess.Popen(
                [need("fio"), "--name=x", f"--filename={loop.device}", *options.split()], stdout=subprocess.DEVNULL
            )
            captured = 0
            ended = False
            while True:
                events = source.drain()
                captured += int(events["sectors"][events["what"] == What.ISSUE].sum(dtype=np.int64))
                captured -= int(events["sectors"][events["what"] == What.REQUEUE].sum(dtype=np.int64))
                if not events.size:
                    if ended:
                        break
                    ended = load.poll() is not None
            assert captured == counters.read().sectors - before
            assert captured >= 16000 * 8
            assert source.lost() == 0
        finally:
            source.close()


def small_bpf() -> EventSource:
    return BpfEvents(ring_bytes=1 << 14)


def small_tracefs() -> EventSource:
    return TracefsEvents(buffer_bytes=1 << 14)


@pytest.mark.parametrize("make", [small_bpf, small_tracefs])
async def test_a_full_ring_is_noticed_and_costs_a_full_copy_but_never_truth(
    tmp_path: Path, make: Callable[[], EventSource]
) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        async with tracing(tmp_path, [loop], source=make()) as rig:
            await rig.point()
            read = rig.capture.copied_bytes + rig.capture.equal_bytes
            # On the loop's own thread, so that nobody drains meanwhile.
            run("dd", "if=/dev/urandom", f"of={loop.mountpoint / 'f'}", "bs=4k", "count=3000", "oflag=direct")
            assert rig.source.lost() > 0
            await rig.point()
            assert rig.disks[0].doubts >= 1
            assert rig.capture.copied_bytes + rig.capture.equal_bytes - read >= rig.disks[0].size_bytes
            await rig.point()


async def test_events_that_go_missing_without_a_trace_are_found_by_the_kernels_count(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        async with tracing(tmp_path, [loop]) as rig:
            await rig.point()
            rig.source.unwatch(loop.block.number)
            (loop.mountpoint / "unseen").write_bytes(os.urandom(300_000))
            os.sync()
            rig.source.watch(loop.block.number)
            assert rig.source.lost() == 0
            point = await rig.point()
            assert point.tries >= 2
            assert rig.disks[0].doubts == 1
            assert (await rig.point()).tries == 1


@BOTH
async def test_afterwards_nothing_is_left_in_the_kernel(tmp_path: Path, method: Method) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        async with tracing(tmp_path, [loop], method=method) as rig:
            await rig.point()
            assert left_by(os.getpid()) != NOTHING
    assert left_by(os.getpid()) == NOTHING


HOLDER = """
import asyncio, os, sys, time
from pathlib import Path
from mobility_agent.capture.trace.choice import Method
from tests.mobility_agent.trace.rig import LoopDisk, tracing
async def main():
    loop = LoopDisk(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    async with tracing(Path(sys.argv[4]), [loop], method=Method(sys.argv[5])) as rig:
        await rig.point()
        print("tracing", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


@BOTH
async def test_a_killed_agent_leaves_nothing_in_the_kernel(tmp_path: Path, method: Method) -> None:
    with loop_disk(tmp_path, "a", filesystem="ext4") as loop:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", HOLDER, loop.device, loop.image, loop.mountpoint, tmp_path, method),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"tracing\n"
        assert left_by(process.pid) != NOTHING
        process.send_signal(signal.SIGKILL)
        await process.wait()
        for _ in range(100):  # the guard removes the instance as soon as it sees that the agent is gone
            if left_by(process.pid) == NOTHING:
                break
            await asyncio.sleep(0.05)
        assert left_by(process.pid) == NOTHING


def test_an_instance_that_a_dead_agent_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process = 4194305  # a number that none can have
    (root() / "instances" / f"{PREFIX}{process}-0").mkdir()
    assert left_by(process) != NOTHING
    TracefsEvents().close()
    assert left_by(process) == NOTHING


def test_a_program_that_the_verifier_refuses_is_refused_with_its_words() -> None:
    code = Assembler()
    code.load(8, 0, 10, 16)  # beyond the stack
    code.exit()
    with pytest.raises(PermanentError, match="invalid"):
        Probe(tracepoint("block_rq_issue").number, code.code())
    assert left_by(os.getpid()) == NOTHING
