"""The agent of the `datapath` benchmark: the product's change log and sender, over a log that is full to begin with.

A process of its own. It fills a change log through the interface that capture uses, so frames look as NBD clients'
writes make them: request headers and all, a descriptor for each write. Then it asks the config server whom to send to,
and sends. The clock starts when the first bytes are handed to TLS and stops when the server's acknowledgement says that
the last change is *stored*; at both moments it looks at the processor time of all the processes in the path.

    python -m bench.datapath_agent --directory D --bytes N ... process-server=PID sink=PID

prints one JSON object as its last line. What the log costs to fill is not measured: capture has benchmarks of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvloop

from bench import data as content, writes
from bench.measure import Moment, Window
from mobility_agent.changelog import FRAME_ROOM, RECORD_ROOM, ChangeLog
from mobility_agent.metrics import Metrics
from mobility_agent.retry import first_of
from mobility_agent.sender import Sender
from mobility_agent.state import StateDirectory, boot_id
from replicar.clock import SystemClock
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.control.messages import AgentAssignment, AgentHeartbeat, MachineState
from replicar.errors import LimitError, TransientError
from replicar.formats import record
from replicar.formats.frame import Flag, Kind
from replicar.nbd.protocol import REQUEST, REQUEST_MAGIC, Command
from simulator.workloads import Workload

FILE_BYTES: Final = 64 << 20
#: Of distinct data; the rest is it again.
DATA_BYTES: Final = 128 << 20
DISK: Final = "disk"
#: Until the config server has an assignment, and until everything is stored.
ASSIGNMENT_SECONDS: Final = 30.0
TRANSFER_SECONDS: Final = 300.0
_ASK_SECONDS: Final = 0.2


class _Writer:
    """Fills the change log as a connection does. An `Owner` of its open frame."""

    def __init__(self, log: ChangeLog) -> None:
        self.parsed = 0
        self._log = log

    def release(self, unparsed: bytes) -> None:
        assert not unparsed, "writes arrive whole here"

    def write_frame(self, writes: Iterator[tuple[int, memoryview]], count: int) -> None:
        """Put the next `count` writes (offset on the disk, bytes) into a frame and seal it."""
        log = self._log
        if not log.claim(self, b""):
            raise LimitError("the change log is full before its time")
        time_ns = log.now_ns()
        for _ in range(count):
            offset, data = next(writes)
            place = log.free + REQUEST.size
            REQUEST.pack_into(log.data, log.free, REQUEST_MAGIC, 0, Command.WRITE, 0, offset, len(data))
            log.data[place : place + len(data)] = data
            self.parsed = log.free = place + len(data)
            log.describe(Kind.WRITE, 0, offset, len(data), place, time_ns)
        log.seal()


class _Stopwatch(Metrics):
    """The sender's metrics; notes when the first frame went out and when the last one was stored."""

    def __init__(self, last_sequence: int, processes: dict[str, int]) -> None:
        super().__init__()
        self.began: Moment | None = None
        self.ended: Moment | None = None
        self.done = asyncio.Event()
        self._last_sequence = last_sequence
        self._processes = processes

    def frame_sent(self, last_sequence: int, time_ns: int) -> None:
        if self.began is None:
            self.began = Moment.now(self._processes)
        super().frame_sent(last_sequence, time_ns)

    def stored(self, stored_sequence: int, now_ns: int) -> None:
        super().stored(stored_sequence, now_ns)
        if stored_sequence >= self._last_sequence and self.ended is None:
            self.ended = Moment.now(self._processes)
            self.done.set()


def fill(log: ChangeLog, workload: Workload, *, total_bytes: int, frame_bytes: int) -> int:
    """Write so much, in frames of so much, where the workload says; what was written."""
    (write_bytes,) = workload.block_bytes
    log.append_record(Kind.DISK, record.Disk(0, DISK, total_bytes))
    log.append_record(Kind.GAP, record.Gap("initial replication"), flags=Flag.GAP_BEGIN)
    log.append_record(Kind.GAP, record.Gap("a benchmark has nothing to copy"), flags=Flag.GAP_END)
    writer = _Writer(log)
    data = content.mixed(min(DATA_BYTES, -(-total_bytes // content.MIB) * content.MIB))
    count = total_bytes // write_bytes
    places = writes.places(workload, count * write_bytes, count)
    made = iter(
        [(place, data[number * write_bytes % len(data) :][:write_bytes]) for number, place in enumerate(places)]
    )
    left = count
    while left:
        some = min(left, frame_bytes // write_bytes)
        writer.write_frame(made, some)
        left -= some
    return count * write_bytes


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fill the log, send it, say what that took."""
    state = StateDirectory(options.directory)
    identity = Identity.load(state.identity)
    total, frame_bytes = options.bytes, options.frame_kib << 10
    workload = writes.named(options.workload, options.write_kib << 10)
    log = ChangeLog(
        state.log,
        identity.id,
        first_sequence=identity.first_sequence,
        # Headers and tables come on top, and at each file's end a frame's room is left.
        limit_bytes=total * 9 // 8 + (4 + total // FILE_BYTES) * (FRAME_ROOM + RECORD_ROOM) + 4 * FILE_BYTES,
        boot_id=boot_id(),
        clock=SystemClock(),
        file_bytes=FILE_BYTES,
    )
    try:
        written = fill(log, workload, total_bytes=total, frame_bytes=frame_bytes)
        held = log.used_bytes
        await log.sync()
        processes = {name: int(number) for name, _, number in (each.partition("=") for each in options.process)}
        watch = _Stopwatch(log.next_sequence - 1, {"agent": os.getpid()} | processes)
        sender = Sender(log, identity, watch, SystemClock(), software="benchmark")
        sender.assign(await _assignment(identity))
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                await first_of(sender.run(), watch.done.wait())
        except TimeoutError:
            raise TransientError(
                f"not everything was stored within {TRANSFER_SECONDS:.0f} s", hint=str(sender.status.as_dict())
            ) from None
        return _result(watch, written, held)
    finally:
        log.abandon()


async def _assignment(identity: Identity) -> AgentAssignment:
    clock = SystemClock()
    async with ControlClient(identity) as client, asyncio.timeout(ASSIGNMENT_SECONDS):
        while True:
            heartbeat = AgentHeartbeat(time_ns=clock.now_ns(), state=MachineState.STARTING)
            instructions = await client.agent_heartbeat(heartbeat)
            if instructions.assignment is not None:
                return instructions.assignment
            await asyncio.sleep(_ASK_SECONDS)


def _result(watch: _Stopwatch, written: int, held: int) -> dict[str, Any]:
    assert watch.began is not None
    assert watch.ended is not None
    window = Window.between(watch.began, watch.ended)
    return {
        "seconds": window.seconds,
        "written_bytes": written,
        "frame_bytes": held,
        "sent_bytes": watch.bytes_sent,
        "connections": watch.connections,
        "resends": watch.resends,
        "cpu": {name: {"user": cpu.user, "system": cpu.system} for name, cpu in window.processes.items()},
        "page_faults": window.faults,
        "others_cores": window.others_cores,
    }


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(prog="python -m bench.datapath_agent", description="The datapath's agent.")
    parser.add_argument("--directory", type=Path, required=True, help="the agent's state directory")
    parser.add_argument("--bytes", type=int, required=True, help="of writes")
    parser.add_argument("--frame-kib", type=int, required=True)
    parser.add_argument("--write-kib", type=int, required=True)
    parser.add_argument("--workload", choices=writes.NAMES, required=True)
    parser.add_argument("process", nargs="*", help="NAME=PID of each other process in the path")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(run(options))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
